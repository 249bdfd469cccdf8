"""Prepared data in memory: `interactions`, `dataframe`, `shards`, `epochs`, `attributes`,
`history` of queries, `ragged` lists.

Imports `pipeline.contract` and `samplers.selection.seen`.
"""
