import numpy as np
import pytest
import tensorflow as tf

from samplers.proposals.streaming_frequency import StreamingFrequency, hash_buckets

MASK = 2**64 - 1


def mix(state):
    """splitmix64 on Python's integers."""
    state = (state + 0x9E3779B97F4A7C15) & MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def test_buckets_are_those_of_the_documented_hash():
    fingerprints = np.array([0, 1, -1, 2**63 - 1, -(2**63)], np.int64)
    actual = hash_buckets(fingerprints, num_buckets=1009, num_hashes=3)
    expected = [[mix((int(f) & MASK) ^ mix(h)) % 1009 for h in range(3)] for f in fingerprints]
    assert actual.tolist() == expected
    assert mix(0) == 0xE220A8397B1DCDAF  # the first output of the published generator


def test_buckets_are_spread_evenly_and_arrays_differ():
    buckets = hash_buckets(np.arange(20_000), num_buckets=50, num_hashes=5)
    for array in buckets.T:
        counts = np.bincount(array, minlength=50)
        assert counts.min() > 320  # 400 ± 4 standard deviations
        assert counts.max() < 480
    same = (buckets[:, :1] == buckets[:, 1:]).mean()
    assert same == pytest.approx(1 / 50, rel=0.2)


def test_probability_converges_to_the_share_of_batches():
    stream = StreamingFrequency(np.arange(3), num_buckets=64, alpha=0.02)
    rng = np.random.default_rng(0)

    @tf.function
    def step(ids):
        stream.update(ids)

    for t in range(1500):
        present = [0] + [1] * (t % 4 == 0) + [2] * (rng.random() < 0.1)
        step(tf.constant((present * 3)[:6] + [0] * (6 - len((present * 3)[:6])), tf.int64))
    arrays = stream.interval.numpy().reshape(5, 64)
    probability = 1 / arrays[np.arange(5), stream.buckets.numpy()].max(1)
    np.testing.assert_allclose(probability, [1, 0.25, 0.1], rtol=0.3)


@pytest.mark.parametrize("published", [False, True])
def test_the_start_counts_only_where_it_is_as_published(published):
    stream = StreamingFrequency(np.arange(1), num_buckets=1, published_start=published)
    for step in range(1, 41):
        stream.step.assign(20 * step - 1)
        stream.update(tf.constant([0], tf.int64))
    b = 20 - 19 * (1 - 1e-4) ** 40 if published else 20
    np.testing.assert_allclose(stream.interval, b, rtol=1e-5)


def test_candidates_that_share_a_bucket_do_not_hide_each_other():
    stream = StreamingFrequency(np.arange(2), num_buckets=2, num_hashes=5, alpha=0.1)
    shared = stream.buckets.numpy()[0] == stream.buckets.numpy()[1]
    assert shared.any()
    assert not shared.all()
    update = tf.function(stream.update, reduce_retracing=True)
    for t in range(1, 610):
        update(tf.constant([0, 0] if t % 10 else [0, 1], tf.int64))
    rare = np.exp(stream.log_q_with(tf.constant([1], tf.int64)))  # as if it came at t = 610
    assert rare == pytest.approx(0.1, rel=0.02)


def test_estimates_made_elsewhere_are_taken_over():
    stream = StreamingFrequency(np.arange(3), num_buckets=4, num_hashes=2, alpha=0.25)
    last_step, interval = np.arange(8).reshape(2, 4), np.arange(2.0, 10.0).reshape(2, 4)
    stream.assign(step=9, last_step=last_step, interval=interval)
    buckets = hash_buckets(np.arange(3), num_buckets=4, num_hashes=2)
    after = [
        max(
            0.75 * interval[h, buckets[1, h]] + 0.25 * (10 - last_step[h, buckets[1, h]])
            for h in range(2)
        )
    ]
    actual = stream.log_q_with(tf.constant([1], tf.int64))
    np.testing.assert_allclose(actual, -np.log(after), rtol=1e-6)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"last_step": np.zeros((4, 2))}, "last_step must have shape"),
        ({"interval": np.zeros((2, 4))}, "interval must be above 0"),
        ({"interval": np.full((2, 4), np.inf)}, "interval must be above 0"),
        ({"weight": np.full((2, 4), -1)}, r"weight must be in \[0, 1\]"),
        ({"weight": np.ones((4, 2))}, "weight must have shape"),
        ({"last_step": np.full((2, 4), 10)}, r"last_step must be in \[0, step\]"),
    ],
)
def test_impossible_estimates_are_errors(changed, text):
    stream = StreamingFrequency(np.arange(3), num_buckets=4, num_hashes=2)
    estimates = {"last_step": np.zeros((2, 4)), "interval": np.ones((2, 4))} | changed
    with pytest.raises(ValueError, match=text):
        stream.assign(step=9, **estimates)
