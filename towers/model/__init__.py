"""The Keras model: `two_tower` (the step), its `encoder`, optimizers, gradients, replicas.

`retrieval_task` is for stock TFRS. Imports `encoders` and what lies below.
"""
