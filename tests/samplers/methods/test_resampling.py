import numpy as np
import pytest
import tensorflow as tf
from table_encoders import seen_hits

import samplers
from samplers.methods.by_name import build
from samplers.proposals.candidate_cache import CandidateCache
from samplers.random_numbers import split_seed_in_step
from samplers.selection.draws import resample
from samplers.selection.resampling import Resampling

SEED = tf.constant([5, 2], tf.int64)  # of the losses, see conftest


def counts_of(query, candidates, log_q, n, seed, *, allowed=None, draws="rounded"):
    """The draws of a method, which depend on its float32 scores."""
    scores = tf.matmul(tf.constant(query), tf.constant(candidates), transpose_b=True)
    if allowed is not None:
        scores = tf.where(allowed, scores, -float("inf"))
    return resample(scores, tf.cast(log_q, tf.float32), n, seed, draws).counts.numpy()


def resampled_loss(query, positive, candidates, counts):
    """log(e^(s_ui) + Σ_j n_uj e^(s_uj)) - s_ui as a loop."""
    losses = np.zeros(len(query))
    for b in range(len(query)):
        own = query[b] @ positive[b]
        total = np.exp(own)
        for j in range(len(candidates)):
            total += counts[b, j] * np.exp(query[b] @ candidates[j])
        losses[b] = np.log(total) - own
    return losses


def equally_weighed_loss(query, positive, candidates, counts):
    """Whose gradient is the estimate of section 3.1, -∇s_ui + (1/m) Σ_j n_uj ∇s_uj, as a loop."""
    losses = np.zeros(len(query))
    for b in range(len(query)):
        for j in range(len(candidates)):
            losses[b] += counts[b, j] / counts[b].sum() * (query[b] @ candidates[j])
        losses[b] -= query[b] @ positive[b]
    return losses


def importance_weighed_loss(query, positive, candidates, counts, log_q, drawn_by):
    """log(e^(s_ui) + Σ_j n_uj e^(s_uj) / (m w_uj)) - s_ui, w as a constant, as a loop."""
    losses = np.zeros(len(query))
    for b in range(len(query)):
        own = query[b] @ positive[b]
        exponents = np.exp(
            [s - q if q > -np.inf else -np.inf for s, q in zip(drawn_by[b], log_q, strict=True)]
        )
        total = np.exp(own)
        for j in range(len(candidates)):
            if counts[b, j]:
                m, w = counts[b].sum(), exponents[j] / exponents.sum()
                total += counts[b, j] * np.exp(query[b] @ candidates[j]) / (m * w)
        losses[b] = np.log(total) - own
    return losses


def weighed_loss(weights, query, candidates, counts, log_q):
    """The loop of these weights: (query, positive, candidates) → [B]."""
    if weights == "equal":
        return lambda q, v, c: equally_weighed_loss(q, v, c, counts)
    drawn_by = query.astype(np.float64) @ candidates.T.astype(np.float64)
    return lambda q, v, c: importance_weighed_loss(q, v, c, counts, log_q, drawn_by)


@pytest.mark.parametrize("options", [{}, {"num_resampled": 3}, {"draws": "independent"}])
@pytest.mark.parametrize("weights", ["equal", "importance"])
def test_bir_with_other_weights_equals_its_equation(problem, log_popularity, weights, options):
    p = problem(unseen=True)
    log_q = log_popularity(p.counts)[p.batch.candidate_ids.numpy()]
    n, draws = options.get("num_resampled", 7), options.get("draws", "rounded")
    counts = counts_of(p.query, p.positive, log_q, n, SEED, draws=draws)
    method = build("bir", frequency=p.counts, weights=weights, **options)
    loop = weighed_loss(weights, p.query, p.positive, counts, log_q)
    p.check(method, lambda q, v, _: loop(q, v, v))


@pytest.mark.parametrize("weights", ["equal", "importance"])
def test_xir_with_other_weights_equals_its_equation(problem, log_popularity, weights):
    p, method, proposed = xir_problem(problem, weights=weights)
    log_pop = log_popularity(p.counts)
    batch_q, cache_q = log_pop[p.batch.candidate_ids.numpy()], log_pop[proposed.ids.numpy()]
    from_batch, from_cache = xir_counts(p, proposed, log_pop, 4)
    on_batch = weighed_loss(weights, p.query, p.positive, from_batch, batch_q)
    on_cache = weighed_loss(weights, p.query, p.proposed, from_cache, cache_q)
    loop = lambda q, v, c: 0.2 * on_cache(q, v, c) + 0.8 * on_batch(q, v, v)  # noqa: E731
    p.check(method, loop, proposed)


def test_equal_weights_estimate_the_gradient_of_the_full_softmax():
    rng = np.random.default_rng(4)
    corpus, pop = rng.normal(size=(12, 3)).astype(np.float32), rng.dirichlet(np.ones(12))
    query, ids = rng.normal(size=(1, 3)).astype(np.float32), rng.choice(12, 4096, p=pop)
    softmax = np.exp(corpus @ query[0])
    expected = corpus.T @ (softmax / softmax.sum()) - corpus[ids[0]]
    batch = samplers.Batch(tf.zeros(4096, tf.int64), tf.constant(ids))
    distances = {}
    for weights in ("published", "equal"):
        with tf.GradientTape() as tape:
            queries, positives = tf.constant(np.repeat(query, 4096, 0)), tf.constant(corpus[ids])
            tape.watch(queries)
            encoders = samplers.Encoders(queries, positives, None, None)
            method = build("bir", frequency=pop, weights=weights)
            loss = method.loss(encoders, batch, None, seed=SEED)[0]
        actual = tape.gradient(loss, queries)[0]
        distances[weights] = np.abs(actual - expected).max()
    assert distances["equal"] < 0.1 < distances["published"]


@pytest.mark.parametrize("weights", ["published", "equal", "importance"])
def test_bir_of_a_row_without_draws_is_0(problem, weights):
    p = problem()
    nothing = p.batch._replace(log_pop=tf.fill([7], -np.inf))
    losses, gradients = p.run(build("bir", weights=weights), batch=nothing)
    assert (losses == 0).all()
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_resampled": 3},
        {"draws": "independent"},
        {"draws": "expected"},
        {"block_size": 3},
        {"block_size": 100},
        {"block_size": 3, "draws": "expected"},
    ],
)
def test_bir_equals_its_equation(problem, log_popularity, options):
    p = problem(unseen=True)
    log_q = log_popularity(p.counts)[p.batch.candidate_ids.numpy()]
    n, draws = options.get("num_resampled", 7), options.get("draws", "rounded")
    counts = counts_of(p.query, p.positive, log_q, n, SEED, draws=draws)
    if draws != "rounded":
        np.testing.assert_allclose(counts.sum(1), n, rtol=1e-5)
    assert not counts[:, np.isneginf(log_q)].any()
    method = build("bir", frequency=p.counts, **options)
    p.check(method, lambda q, v, _: resampled_loss(q, v, v, counts))


@pytest.mark.parametrize("block_size", [None, 2])
def test_bir_leaves_out_hits_and_padding(problem, log_popularity, block_size):
    p = problem(seed=1, num_candidates=5)
    ids, valid = p.batch.candidate_ids.numpy(), np.arange(7) < 6
    seen = np.full((7, 5), -1)
    seen[1, :2], seen[2] = [ids[1], 3], np.arange(5)
    batch = p.batch._replace(
        valid=tf.constant(valid), seen=seen_hits(seen, ids), weight=tf.linspace(1.0, 2.0, 7)
    )
    allowed = (ids[:, None] != ids[None, :]) & (ids[None, :, None] != seen[:, None, :]).all(-1)
    log_q = np.where(valid, log_popularity(p.counts)[ids], -np.inf)
    counts = counts_of(p.query, p.positive, log_q, 6, SEED, allowed=allowed)
    assert not counts[2].any()  # nothing is left for this row
    assert (counts[[0, 1, 3, 4, 5]].sum(1) > 0).all()
    method = build("bir", frequency=p.counts, mask_accidental_hits=True, block_size=block_size)

    def losses(query, positive, _):
        plain = resampled_loss(query, positive, positive, counts)
        return plain * np.linspace(1, 2, 7) * valid

    p.check(method, losses, batch=batch)


@pytest.mark.long
def test_bir_in_blocks_draws_the_same_for_a_large_batch():
    rng = np.random.default_rng(0)
    rows = [(rng.normal(size=(1024, 16)) / 2).astype(np.float32) for _ in range(2)]
    counts = rng.integers(1, 50, 300)
    batch = samplers.Batch(tf.zeros(1024, tf.int64), tf.constant(rng.integers(0, 300, 1024)))

    @tf.function
    def run(method):
        with tf.GradientTape() as tape:
            query, positive = tf.constant(rows[0]), tf.constant(rows[1])
            tape.watch([query, positive])
            encoders = samplers.Encoders(query, positive, None, None)
            loss = tf.reduce_mean(method.loss(encoders, batch, None, seed=SEED))
        return loss, *tape.gradient(loss, [query, positive])

    whole = run(build("bir", frequency=counts))
    blocks = run(build("bir", frequency=counts, block_size=200))
    for ours, theirs in zip(blocks, whole, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("draws", ["rounded", "independent"])
def test_bir_draws_follow_the_softmax_over_the_corpus(draws):
    rng = np.random.default_rng(1)
    corpus, pop = rng.normal(size=(12, 3)).astype(np.float32), rng.dirichlet(np.ones(12))
    query = rng.normal(size=(4, 3)).astype(np.float32)
    softmax = np.exp(query @ corpus.T)
    softmax /= softmax.sum(1, keepdims=True)
    distances = []
    for size in (64, 8192):
        shares = np.zeros((4, 12))
        for repeat in range(8):
            ids = rng.choice(12, size, p=pop)
            seed = tf.constant([repeat, size])
            counts = counts_of(query, corpus[ids], np.log(pop[ids]), size, seed, draws=draws)
            for j in range(12):
                shares[:, j] += counts[:, ids == j].sum(1) / size / 8
        distances.append(np.abs(shares - softmax).sum(1).max() / 2)
    assert distances[1] < 0.03
    assert distances[1] < distances[0]


def xir_problem(problem, **options):
    p = problem(rows=8, columns=6, unseen=True)
    method = build("xir", frequency=p.counts, cache_size=6, **options)
    return p, method, method.propose(None, p.batch, seed=tf.constant([3, 4]))


def xir_counts(p, proposed, log_pop, n):
    seeds = split_seed_in_step(SEED, 2)
    from_batch = counts_of(p.query, p.positive, log_pop[p.batch.candidate_ids.numpy()], n, seeds[0])
    from_cache = counts_of(p.query, p.proposed, log_pop[proposed.ids.numpy()], n, seeds[1])
    return from_batch, from_cache


@pytest.mark.parametrize(
    "options",
    [{}, {"cache_weight": 0.7}, {"cache_weight": 0.0}, {"num_resampled": 3}, {"block_size": 4}],
)
def test_xir_equals_its_equation(problem, log_popularity, options):
    p, method, proposed = xir_problem(problem, **options)
    share = options.get("cache_weight", 0.2)
    n = options.get("num_resampled", 4)
    from_batch, from_cache = xir_counts(p, proposed, log_popularity(p.counts), n)

    def losses(query, positive, cache):
        on_batch = resampled_loss(query, positive, positive, from_batch)
        return share * resampled_loss(query, positive, cache, from_cache) + (1 - share) * on_batch

    p.check(method, losses, proposed)


@pytest.mark.parametrize("block_size", [None, 4])
def test_xir_occurrences_grow_by_all_draws_of_a_step(problem, log_popularity, block_size):
    p, method, proposed = xir_problem(problem, block_size=block_size)
    valid = np.arange(8) != 3
    ids = p.batch.candidate_ids.numpy()
    batch = p.batch._replace(valid=tf.constant(valid))
    log_pop = log_popularity(p.counts)
    seeds = split_seed_in_step(SEED, 2)
    log_q = np.where(valid, log_pop[ids], -np.inf)
    from_batch = counts_of(p.query, p.positive, log_q, 3, seeds[0])
    from_cache = counts_of(p.query, p.proposed, log_pop[proposed.ids.numpy()], 3, seeds[1])
    expected = (p.counts > 0).astype(np.int64)
    for b in np.flatnonzero(valid):
        for j, candidate in enumerate(ids):
            expected[candidate] += from_batch[b, j]
        for j, candidate in enumerate(proposed.ids.numpy()):
            expected[candidate] += from_cache[b, j]
    start = method.cache.occurrences.numpy()
    p.run(method, proposed, batch=batch)
    p.run(method, proposed, batch=batch)  # a loss without update has no trace
    np.testing.assert_array_equal(method.cache.occurrences, start)
    method.update(batch)
    np.testing.assert_array_equal(method.cache.occurrences, expected)


def assign(cache, occurrences):
    """Sets o, [N], by steps that draw nothing else."""
    wanted = np.asarray(occurrences) - cache.occurrences.numpy()
    cache.expect(tf.range(len(wanted), dtype=tf.int64))
    cache.record(tf.constant(wanted))
    cache.update()


def test_xir_cache_is_uniform_at_first_and_then_follows_the_occurrences():
    counts = np.array([0, 4, 1, 2, 7])
    method = build("xir", frequency=counts, cache_size=40_000)
    for weights in ([0, 1, 1, 1, 1], [0, 3, 1, 16, 0]):
        assign(method.cache, weights)
        cache = method.cache.sample(40_000, seed=SEED)
        observed = np.bincount(cache.ids, minlength=5) / 40_000
        expected = np.array(weights) / sum(weights)
        np.testing.assert_allclose(observed, expected, atol=4 * np.sqrt(0.25 / 40_000))
        np.testing.assert_allclose(np.exp(cache.log_q), expected[cache.ids.numpy()], rtol=1e-5)


@pytest.mark.parametrize("from_drawn", [False, True])
def test_a_step_of_the_cache_passes_over_no_tensor_of_all_candidates(from_drawn):
    size, ids = 500_003, tf.constant([7, 500_002, 7], tf.int64)
    cache = CandidateCache(np.ones(size), from_drawn=from_drawn)

    def step():
        cache.expect(tf.concat([ids, cache.sample(20, seed=SEED).ids], axis=0))
        cache.record(tf.ones_like(cache.ids))
        cache.update()

    def shapes(graph):
        inner = [g.graph for g in getattr(graph, "_functions", {}).values() if hasattr(g, "graph")]
        ops = [op for g in (graph, *inner) for op in g.get_operations()]
        return [output.shape for op in ops for output in op.outputs]

    traced = tf.function(step).get_concrete_function()
    sizes = [s.num_elements() for s in shapes(traced.graph) if s.is_fully_defined()]
    assert max(sizes) < size / 20  # the sums of blocks are the largest
    traced()
    assert cache.occurrences.numpy().sum() == size + 23
    assert cache.occurrences.numpy()[[7, 500_002]].tolist() >= [3, 2]
    np.testing.assert_array_equal(
        cache._in_blocks, np.add.reduceat(cache.occurrences.numpy(), np.arange(0, size, 22))
    )


def test_the_cache_is_drawn_as_by_a_cumulative_sum_of_all():
    size, draws = 5003, 20
    rng = np.random.default_rng(4)
    cache = CandidateCache(rng.integers(0, 3, size))
    assign(cache, rng.integers(0, 4, size) * cache.occurrences.numpy())
    cumulative = np.cumsum(cache.occurrences.numpy())
    points = tf.random.stateless_uniform([draws], SEED, dtype=tf.float64) * cumulative[-1]
    sample = cache.sample(draws, seed=SEED)
    np.testing.assert_array_equal(sample.ids, np.searchsorted(cumulative, points, "right"))


def test_xir_cache_half_follows_occurrences_times_softmax_over_popularity():
    rng = np.random.default_rng(2)
    corpus = rng.normal(size=(12, 3)).astype(np.float32)
    query = rng.normal(size=(4, 3)).astype(np.float32)
    counts, occurrences = rng.integers(1, 20, 12), rng.integers(1, 9, 12)
    method = build("xir", frequency=counts, cache_size=8192)
    assign(method.cache, occurrences)
    log_pop = np.log(counts / counts.sum())
    shares = np.zeros((4, 12))
    for repeat in range(8):
        ids = method.cache.sample(8192, seed=tf.constant([repeat, 1])).ids.numpy()
        draws = counts_of(query, corpus[ids], log_pop[ids], 4096, tf.constant([repeat, 2]))
        for j in range(12):
            shares[:, j] += draws[:, ids == j].sum(1) / 4096 / 8
    expected = occurrences * np.exp(query @ corpus.T - log_pop)
    expected /= expected.sum(1, keepdims=True)
    assert np.abs(shares - expected).sum(1).max() / 2 < 0.03


def test_xir_may_redraw_from_the_last_draws(problem):
    p, method, proposed = xir_problem(problem, redraw="drawn")
    first = method.propose(None, p.batch, seed=SEED)  # from the corpus
    assert set(first.ids.numpy()) <= set(np.flatnonzero(p.counts))
    p.run(method, proposed)
    method.update(p.batch)
    drawn = np.isin(np.arange(9), method.cache.ids.numpy()[method.cache.drawn.numpy() > 0])
    assert 0 < drawn.sum() < (p.counts > 0).sum()
    weights = np.where(drawn, method.cache.occurrences.numpy(), 0)
    many = method.cache.sample(20_000, seed=SEED)
    observed = np.bincount(many.ids, minlength=9) / 20_000
    np.testing.assert_allclose(observed, weights / weights.sum(), atol=0.015)


def test_xir_draws_the_same_after_a_checkpoint(problem, tmp_path):
    p, method, proposed = xir_problem(problem)
    for _ in range(3):
        p.run(method, proposed)
        method.update(p.batch)
    path = tf.train.Checkpoint(method=method).write(str(tmp_path / "method"))
    other = build("xir", frequency=p.counts, cache_size=6)
    tf.train.Checkpoint(method=other).read(path).assert_consumed()
    for seed in range(3):
        ours, theirs = (m.propose(None, p.batch, seed=[seed, 1]).ids for m in (method, other))
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", ["bir", "xir"])
def test_a_batch_of_one_is_finite(problem, name):
    p = problem(rows=1, columns=4)
    method = build(name, frequency=p.counts, **({"cache_size": 4} if name == "xir" else {}))
    losses, gradients = p.run(method, method.propose(None, p.batch, seed=SEED))
    assert np.isfinite(losses).all()
    assert all(np.isfinite(x).all() for x in gradients)


def test_seeds_make_different_draws(problem):
    p = problem()
    method = build("bir", frequency=p.counts)
    first, again, other = (
        p.run(method, seed=tf.constant(seed, tf.int64))[0] for seed in ([1, 2], [1, 2], [1, 3])
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("bir", {"num_resampled": 0}, "num_resampled must be at least 1"),
        ("bir", {"draws": "some"}, "draws must be one of rounded, independent, expected"),
        ("bir", {"block_size": 8, "draws": "independent"}, "draws must be rounded or expected"),
        ("xir", {"draws": "expected"}, "draws must be whole, for the cache counts them"),
        ("bir", {"weights": "none"}, "weights must be one of published, equal, importance"),
        ("bir", {"block_size": 8, "weights": "equal"}, "weights must be published with block_size"),
        ("xir", {"weights": "equal", "mask_accidental_hits": True}, "mask_accidental_hits"),
        ("xir", {"cache_weight": -0.1}, "cache_weight must be between 0 and 1, got -0.1"),
        ("xir", {"cache_weight": 1.1}, "cache_weight must be between 0 and 1"),
        ("xir", {"cache_size": 0}, "cache_size must be at least 1"),
        ("xir", {"redraw": "batch"}, "redraw must be corpus or drawn"),
        ("xir", {"frequency": None}, "needs frequency="),
        ("bir", {"frequency": np.zeros(3)}, "above 0"),
    ],
)
def test_wrong_arguments_are_errors(name, options, text):
    with pytest.raises(ValueError, match=text):
        build(name, **{"frequency": np.ones(4)} | options)


def test_draws_are_counted_without_a_product_that_a_gpu_would_round():
    @tf.function(jit_compile=True)
    def counts(query, candidates):
        resampling = Resampling(query, candidates, tf.zeros([5]), 10_000, SEED)
        return resampling.column_sums()

    specs = tf.TensorSpec([4, 3]), tf.TensorSpec([5, 3])
    lowered = counts.experimental_get_compiler_ir(*specs)(stage="hlo", platform_name="GPU")
    assert lowered.count(" dot(") == 2  # the scores, and the sum of the weights of a row
