"""Losses as pure functions, [B] each: `softmax`, `pairwise`; `streamed_softmax` for large ones,
`scoring`.
"""
