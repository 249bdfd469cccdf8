"""What the data are like: `measures` (on Beam), `histogram`, `report`, and `page` with its `plots`.

Imports `prepare` and what lies below.
"""
