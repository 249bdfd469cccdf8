"""The pipelines of `twotower prepare` on rows: `ingest` (distinct rows, ids), `k_core`,
`vocabulary`, `split`, `assemble`, `shards`, `settings`. Imports `read`, `beam`, `contract`.
"""
