"""How often each candidate is observed, estimated from the stream of batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from samplers.state import state_variable


class StreamingFrequency(tf.Module):
    """Probability that a batch holds a candidate, as one over the steps between two that do.

    Yi et al., RecSys 2019, doi:10.1145/3298689.3346996, streaming frequency estimation: at step
    t, once for every bucket with a candidate in the batch,
        w = (1 - α) w + α, then b = b + α/w (t - a - b), then a = t
    with a the last step of the bucket and b its mean interval; p = 1 / max_h b_h over several
    hash arrays h, because candidates that share a bucket make its intervals shorter. Starts
    with a = 0, b = 1, w = 0, t = 0. `update` is called once a step, after the gradient.

    Differs: the paper's b = (1 - α) b + α (t - a) is this with w = 1 throughout: p is near 1 until
    a candidate came some 1 / α times, because the start counts as much as all that comes after it.
    `published_start` has it so, by starting with w = 1.

    Args:
      fingerprints: int64 [N], of the raw id of each candidate, or any other different numbers.
      num_buckets: H, of each hash array; see `hash_buckets`.
      num_hashes: A, number of hash arrays.
      alpha: α, in (0, 1].
      primes: the buckets of a candidate are its fingerprint modulo each of these instead, in as
        many arrays; None for `hash_buckets`.

    Attributes:
      step: int64, t.
      last_step, interval, weight: [A · H], a, b and w, array after array.
      buckets: int64 [N, A], the bucket of each candidate in each array.
    """

    def __init__(
        self,
        fingerprints: np.ndarray,
        *,
        num_buckets: int,
        num_hashes: int = 5,
        alpha: float = 1e-4,
        published_start: bool = False,
        primes: Sequence[int] | None = None,
    ) -> None:
        super().__init__(name="streaming_frequency")
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha must be above 0 and at most 1, got {alpha}.")
        if primes is None:
            buckets = hash_buckets(fingerprints, num_buckets=num_buckets, num_hashes=num_hashes)
        else:
            num_buckets, num_hashes = max(primes), len(primes)
            buckets = np.asarray(fingerprints, np.int64)[:, None] % np.asarray(primes, np.int64)
        self.alpha, self._shape = alpha, (num_hashes, num_buckets)
        self.buckets = tf.constant(buckets)
        self.step = state_variable(tf.zeros([], tf.int64), "step")
        size, self._published_start = [num_hashes * num_buckets], published_start
        self.last_step = state_variable(tf.zeros(size, tf.int64), "last_step")
        self.interval = state_variable(tf.ones(size), "interval")
        self.weight = state_variable(tf.fill(size, float(published_start)), "weight")

    def log_q_with(self, ids: tf.Tensor) -> tf.Tensor:
        """log p after a step whose batch holds these candidates, [B]; the state stays."""
        return -tf.math.log(tf.reduce_max(self._updated(ids)[1], axis=1))

    def update(self, ids: tf.Tensor, *, valid: tf.Tensor | None = None) -> None:
        """Writes the state after a step whose batch holds these candidates, [B]."""
        if valid is not None:
            ids = tf.boolean_mask(ids, valid)
        places, interval, weight = self._updated(ids)
        step = self.step.assign_add(1)
        last_step = tf.fill(tf.shape(places), step)
        places = tf.reshape(places, [-1])
        # A bucket that is there several times is written several times, with the same value.
        news = ((self.interval, interval), (self.weight, weight), (self.last_step, last_step))
        for variable, values in news:
            variable.scatter_update(tf.IndexedSlices(tf.reshape(values, [-1]), places))

    def assign(
        self,
        *,
        step: int,
        last_step: np.ndarray,
        interval: np.ndarray,
        weight: np.ndarray | None = None,
    ) -> None:
        """Takes over estimates made elsewhere, for the same fingerprints: arrays [A, H].

        Without `weight`, or with the published start, they weigh 1. A ValueError where the
        arrays have another shape or hold impossible values.
        """
        if weight is None or self._published_start:
            weight = np.ones(self._shape)
        arrays = {"last_step": last_step, "interval": interval, "weight": weight}
        for name, values in arrays.items():
            if values.shape != self._shape:
                raise ValueError(
                    f"{name} must have shape [num_hashes, num_buckets] = {list(self._shape)}, "
                    f"got {list(values.shape)}: build the method with the sizes of the estimates."
                )
        if not (np.isfinite(interval).all() and (interval > 0).all()):
            raise ValueError(f"interval must be above 0 and finite, got {interval.min()}.")
        if not (weight >= 0).all() or weight.max() > 1:
            raise ValueError(f"weight must be in [0, 1], got {weight.min()} … {weight.max()}.")
        if last_step.min() < 0 or last_step.max() > step:
            raise ValueError(
                f"last_step must be in [0, step] = [0, {step}], "
                f"got {last_step.min()} … {last_step.max()}."
            )
        self.step.assign(step)
        self.last_step.assign(last_step.astype(np.int64).reshape(-1))
        self.interval.assign(interval.astype(np.float32).reshape(-1))
        self.weight.assign(weight.astype(np.float32).reshape(-1))

    def _updated(self, ids: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Places, intervals and weights after the step, [B, A] all three."""
        num_hashes, num_buckets = self._shape
        arrays = num_buckets * tf.range(num_hashes, dtype=tf.int64)  # where each begins
        places = tf.gather(self.buckets, ids) + arrays
        last_step, interval = tf.gather(self.last_step, places), tf.gather(self.interval, places)
        newest = tf.cast(self.step + 1 - last_step, tf.float32)
        weight = (1 - self.alpha) * tf.gather(self.weight, places) + self.alpha
        return places, interval + self.alpha / weight * (newest - interval), weight


def hash_buckets(fingerprints: np.ndarray, *, num_buckets: int, num_hashes: int) -> np.ndarray:
    """The bucket of each fingerprint in each hash array: int64 [N, A].

    bucket_h(f) = mix(f xor mix(h)) mod num_buckets for h = 0, 1, ..., all unsigned of 64 bits
    and mix the splitmix64 step of Steele, Lea and Flood, OOPSLA 2014,
    doi:10.1145/2660193.2660195. It is fixed: estimates of other programs rest on it.
    """
    keys = np.ascontiguousarray(fingerprints, np.int64).view(np.uint64)[:, None]
    arrays = _mix(np.arange(num_hashes, dtype=np.uint64))[None, :]
    return (_mix(keys ^ arrays) % np.uint64(num_buckets)).astype(np.int64)


def _mix(state: np.ndarray) -> np.ndarray:
    """The splitmix64 step."""
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
