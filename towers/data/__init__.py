"""Prepared data in memory: `interactions`, `dataframe` and `attribute_frames`, `shards`, `epochs`,
`attributes`, `history` of queries, `ragged` lists.

Imports `pipeline.contract`, for data frames what `prepare` has without Beam, and
`samplers.selection.seen`.
"""
