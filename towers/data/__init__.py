"""Prepared data in memory: `interactions`, `dataframe`, `shards`, `epochs`, attributes, histories.

Imports `pipeline.contract` and `samplers.selection.seen`.
"""
