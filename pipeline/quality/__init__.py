"""What the data are like: `measures` (on Beam), `histogram`, `report`, `page` (quality.html).

Imports `prepare` and what lies below.
"""
