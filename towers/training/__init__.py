"""`twotower train`: `train`, its `settings`, the `run_directory`, `checkpoints`, `failures`.

`frequency` and `earlier_run` are what a run may start from beside its data. Imports `model` and
what lies below.
"""
