"""Ranking of the whole corpus, and how good it is.

`definitions`, `ranking`, `held_out`, the callback `full_corpus_metrics`. Imports `data`.
"""
