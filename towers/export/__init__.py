"""What leaves the trainer: `bundle` (with its `query_model`) and `recommend`.

Imports `training` and what lies below.
"""
