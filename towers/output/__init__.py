"""What leaves the trainer: `bundle`, and `recommend` with its `settings`.

Imports `training` and what lies below.
"""
