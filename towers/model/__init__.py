"""The Keras model: `two_tower`, its `step`, `encoder` and `top_k`, `saved`, optimizers, replicas.

`retrieval_task` is for stock TFRS, `method_layer` for Keras 3. Imports `encoders` and what lies
below.
"""
