"""`twotower frequencies`: exact counts. `job`, `merge` (its pipelines), `settings`.

Imports `quality.histogram`, `prepare` and what lies below.
"""
