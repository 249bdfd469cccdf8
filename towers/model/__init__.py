"""The Keras model: `two_tower` (the step), its `encoder`, `top_k`, `saved` models, optimizers,
gradients, replicas.

`retrieval_task` is for stock TFRS, `method_layer` for Keras 3. Imports `encoders` and what lies
below.
"""
