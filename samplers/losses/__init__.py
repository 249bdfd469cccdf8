"""Losses as pure functions: `softmax` [B], `pairwise` [B, N]; and `streamed_softmax`, sums over the
columns block by block.
"""
