"""`twotower export`: `publish.publish` makes a version of a bundle, with a measured index.

`tuning` chooses the index by what `measuring` says; `model_card` is for people.
Imports `version` and what lies below.
"""
