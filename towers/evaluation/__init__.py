"""`twotower evaluate` and `compare`: hits of each query, parts of a split, paired tests.

Imports `report`, `training` and what lies below.
"""
