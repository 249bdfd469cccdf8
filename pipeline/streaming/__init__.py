"""`twotower frequencies --streaming`: the streaming estimate of correct-sfx.

`estimator` (the recursion), `job`, `micro_batch` (one bounded run), `steps`, `order`, `snapshots`,
`watch`; `unbounded` for endless collections. Imports `counts.settings`, `prepare` and below.
"""
