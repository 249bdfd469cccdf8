"""Which candidates count, and how much, without gradient: `draws` and `resampling`, `mixing`,
`running_top_k`, `weights`, `validity` and `seen`. Imports `losses`.
"""
