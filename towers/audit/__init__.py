"""`twotower audit`: how far each sampler is from the full softmax on a trained run.

`job.audit` measures methods on `subjects` (frozen towers) with `measures`, and `report` writes
audit.json and audit.html. Imports `training` and what lies below.
"""
