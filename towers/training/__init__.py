"""`twotower train`: `train`, its `settings`, `run_directory`, `checkpoints`, `frequency`,
`warm_start`, `teacher`, `divergence`. Imports `model` and what lies below.
"""
