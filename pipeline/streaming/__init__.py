"""`twotower frequencies --streaming`: the streaming estimate of correct-sfx.

`job` (one run, or the watch of a source), `micro_batch` (one bounded run), `steps`,
`snapshots`, `estimator` (the recursion); `unbounded` for endless collections. Imports
`counts.settings`, `prepare` and below.
"""
