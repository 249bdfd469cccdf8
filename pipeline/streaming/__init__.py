"""`twotower frequencies --streaming`: the streaming estimate of correct-sfx.

`job` (one run, the watch of a source, or a stream without end), `micro_batch` (one bounded run),
`steps`, `snapshots`, `estimator` (the recursion); `incoming` and `unbounded` are the source of an
endless stream, and its windows and snapshots. Imports
`counts.settings`, `prepare` and below.
"""
