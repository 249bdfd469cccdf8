"""Where candidates are drawn from, with their log probabilities: `popularity` (also uniform, and
`log_pop`), `candidate_cache`, `query_pool`, `kernel_tree`, `adaptive_oversampling`; and
`streaming_frequency`. Imports `selection`, `losses`.
"""
