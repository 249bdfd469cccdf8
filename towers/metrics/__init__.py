"""Ranking of the whole corpus, and how good it is.

`definitions`, `ranking`, `held_out` and its callback, `opauc`. Imports `data`.
"""
