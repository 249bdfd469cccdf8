"""Losses as pure functions, [B] each: `softmax`, `pairwise`; below them `streamed_softmax` for
the sum over columns, and `scores`.
"""
