"""The pipelines of `twotower prepare` on rows: `ingest` (rows, ids, dead letters), `k_core`,
`vocabulary`, `split`, `assemble`, `shards`, `settings`. Imports `read`, `beam`, `contract`.
"""
