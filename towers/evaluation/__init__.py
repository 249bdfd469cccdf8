"""`twotower evaluate` and `compare`.

`evaluate` writes the metrics, `hits_by_query` and the `breakdown` of a run; `compare` sets runs
side by side, with paired tests. Imports `report`, `training` and what lies below.
"""
