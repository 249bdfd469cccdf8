"""Where candidates are drawn from, with their log probabilities: uniform, popularity, cache, pool,
kernel tree; and frequencies. Imports `selection`, `losses`.
"""
