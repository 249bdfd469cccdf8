"""How often each candidate is observed, as log probabilities."""

from __future__ import annotations

import numpy as np


def log_pop(counts: np.ndarray) -> np.ndarray:
    """log(f_j / Σ f): the log-probability that a random train row holds candidate j.

    The logQ correction of Yi et al., RecSys 2019, doi:10.1145/3298689.3346996, for candidates
    that come as the positives of other rows. Never clipped: a floor on the probability would
    silently stop the correction of rare candidates.

    Args:
      counts: [N], train rows of each candidate by dense id; at least one above 0.

    Returns:
      float32 [N], -inf for candidates without train rows; computed in float64.

    Raises:
      ValueError: counts is not a vector, or has negative, non-finite or only zero entries.
    """
    counts = np.asarray(counts, np.float64)
    if counts.ndim != 1:
        raise ValueError(f"counts must have shape [N], one per candidate, got {counts.shape}.")
    if not np.all(np.isfinite(counts)) or np.any(counts < 0):
        raise ValueError(
            f"counts must be finite and at least 0, got {counts.min()} … {counts.max()}: "
            "pass the number of train rows of each candidate."
        )
    total = counts.sum()
    if total == 0:
        raise ValueError(
            f"counts must have an entry above 0, got {len(counts)} zeros: "
            "check that the train split is not empty."
        )
    with np.errstate(divide="ignore"):  # log 0 = -inf is what is meant
        return (np.log(counts) - np.log(total)).astype(np.float32)
