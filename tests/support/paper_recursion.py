"""Streaming frequency estimation as a plain loop, and the documented hash."""


class Paper:
    """The recursion: one step after the other, one bucket at a time.

    As in the paper but for the weights, which leave the start b = 1 out of the mean.
    """

    def __init__(self, num_buckets, num_hashes, alpha):
        self.alpha = alpha
        self.last_step = [[0] * num_buckets for _ in range(num_hashes)]
        self.interval = [[1.0] * num_buckets for _ in range(num_hashes)]
        self.weight = [[0.0] * num_buckets for _ in range(num_hashes)]

    def step(self, t, fingerprints):
        arrays = zip(self.last_step, self.interval, self.weight, strict=True)
        for h, (a, b, w) in enumerate(arrays):
            for bucket in {bucket_of(f, h, len(a)) for f in fingerprints}:
                w[bucket] = (1 - self.alpha) * w[bucket] + self.alpha
                b[bucket] += self.alpha / w[bucket] * (t - a[bucket] - b[bucket])
                a[bucket] = t

    @classmethod
    def over(cls, events, **sizes):
        """The loop over (step, fingerprint) pairs, in the order of the steps."""
        paper = cls(**sizes)
        for t in sorted({step for step, _ in events}):
            paper.step(t, {f for step, f in events if step == t})
        return paper

    def check(self, state):
        assert state["last_step"].tolist() == self.last_step
        assert state["interval"].tolist() == self.interval  # equal bits, no tolerance
        assert state["weight"].tolist() == self.weight


def bucket_of(fingerprint, h, num_buckets):
    """The documented hash on Python's integers."""

    def mix(state):
        state = (state + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        return state ^ (state >> 31)

    mask = 2**64 - 1
    return mix((int(fingerprint) & mask) ^ mix(h)) % num_buckets
