"""Losses as pure functions, [B] each: `softmax`, `pairwise`; and `streamed_softmax`, their sum over
columns.
"""
