"""Top-k with filters and fallback, without a network: `retriever.Retriever`.

`requests` is what it takes and gives, `search` an index and what follows it, `filters` and `corpus`
say who may be found; `query` is the command. Imports `version` and what lies below.
"""
