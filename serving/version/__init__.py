"""A model version on disk: `versions` finds it and says whether all of it has arrived.

`served_model` is its SavedModel, `index` the search in it, `warmup_requests` what a server replays,
`names` what it is called and where in its life it is. Imports nothing else of serving.
"""
