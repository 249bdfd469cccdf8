"""Which candidates count, and how much, without gradient: resampling, mixing, the hardest, weights,
what is valid, what was seen. Imports `losses`.
"""
