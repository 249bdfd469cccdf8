"""`twotower audit`: weights on scores, measures of known methods, the command from end to end."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from browser import assert_file_fits, assert_shared_look

import twotower
from samplers.methods.by_name import METHODS, build
from towers.audit.job import DRAWS, Bench, audit
from towers.audit.measures import (
    Sums,
    half_mass_rank,
    measure,
    popularity_buckets,
    references,
    shares_by_rank,
    summarize,
)
from towers.audit.report import PAGE, RECORD
from towers.audit.settings import AuditConfig, Spec, Target
from towers.audit.subjects import Batches, Frozen, Stopwatch, Subject
from towers.data.interactions import Positives
from towers.training.settings import TrainConfig
from towers.training.train import train

U, N, D = 40, 120, 6  # queries, candidates, size


@pytest.fixture(scope="module")
def frozen():
    """Towers of nobody's training, and a log where few candidates have most rows."""
    rng = np.random.default_rng(3)
    rows = 4000
    return Frozen(
        rng.normal(size=(U, D)).astype(np.float32),
        rng.normal(size=(N, D)).astype(np.float32) * 0.7,
        rng.integers(0, U, rows),
        (N * rng.random(rows) ** 2.5).astype(np.int64),
    )


def measured(frozen, name, batch_size=128, draws=12, pairs=8, k=5, **options):
    """The summary of a method, its sums, and the subject."""
    n = len(frozen.query_ids)
    batches = Batches.of(n, batches=6, pairs=pairs, batch_size=batch_size, seed=1)
    subject = make_subject(frozen, batches, name, **options)
    few = np.arange(0, n, 20)  # or a query would have chosen nearly all candidates
    positives = Positives(frozen.query_ids[few], frozen.candidate_ids[few], U)
    expected = references(frozen, batches, positives)
    counts = np.bincount(frozen.candidate_ids, minlength=N)
    sums = measure(subject, frozen, expected, popularity_buckets(counts), draws)
    return summarize(sums, k), sums


def make_subject(frozen, batches, name, **options):
    num_queries = batches.pairs.size if METHODS[name].row_by_row else U
    counts = np.bincount(frozen.candidate_ids, minlength=N)
    method = build(name, frequency=counts, num_candidates=N, num_queries=num_queries, **options)
    subject = Subject(method, frozen, batches)
    subject.warm_up(3)
    return subject


@pytest.fixture
def eagerly():
    """No graph is made for the few calls of a test."""
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def test_weights_of_the_full_softmax_are_probabilities_less_the_positive(frozen, eagerly):
    batches = Batches.of(4000, batches=2, pairs=4, batch_size=32, seed=0)
    weights = make_subject(frozen, batches, "full_softmax").weights(1, 0)
    pairs = batches.pairs[1]
    expected = softmax(frozen.query[frozen.query_ids[pairs]] @ frozen.candidate.T)
    expected[range(4), frozen.candidate_ids[pairs]] -= 1
    np.testing.assert_allclose(weights, expected, atol=1e-6)


def test_weights_of_ssl_pop_by_a_loop_over_columns(frozen, eagerly):
    batches = Batches.of(4000, batches=2, pairs=4, batch_size=32, seed=0)
    weights = make_subject(frozen, batches, "ssl_pop").weights(1, 3)
    rows = batches.rows(1, 3)
    np.testing.assert_array_equal(rows[:4], batches.pairs[1])
    assert len(np.unique(rows)) == 32
    ids = frozen.candidate_ids[rows]
    pop = np.bincount(frozen.candidate_ids, minlength=N) / 4000
    for a, row in enumerate(rows[:4]):
        query = frozen.query[frozen.query_ids[row]]
        shares = softmax(frozen.candidate[ids] @ query - np.log(pop[ids]))
        expected = np.zeros(N)
        for column, candidate in enumerate(ids):
            expected[candidate] += shares[column]
        expected[frozen.candidate_ids[row]] -= 1
        np.testing.assert_allclose(weights[a], expected, atol=2e-6)


def test_the_queue_of_cbns_has_weights(frozen, eagerly):
    batches = Batches.of(4000, batches=2, pairs=4, batch_size=32, seed=0)
    subject = make_subject(frozen, batches, "cbns", num_cached=40)
    weights = subject.weights(1, 0)
    outside = np.setdiff1d(np.arange(N), frozen.candidate_ids[batches.rows(1, 0)])
    assert (weights[:, outside].sum(axis=1) > 0.1).all()
    assert Stopwatch(subject, batches).seconds(0) > 0  # of a step that embeds no queue


QUICK = ("bmns", "dns_mn", "cbns")
SMALL = {
    "xir": {"cache_size": 32},
    "cbns": {"warm_up": 1, "num_cached": 24},
    "adasir_w": {"pool_size": 16},
    "dns_mn": {"num_negatives": 20},
}


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in METHODS],
)
def test_weights_give_the_gradient_by_the_query(frozen, name, eagerly):
    batches = Batches.of(4000, batches=2, pairs=4, batch_size=32, seed=0)
    subject, twin = (make_subject(frozen, batches, name, **SMALL.get(name, {})) for _ in range(2))
    weights = subject.weights(0, 2)
    if name.startswith("adasir"):
        twin._end_epoch()
    batch = twin.batch(0, 2)
    encoders = twin.encoders(batch)
    with tf.GradientTape() as tape:
        tape.watch(encoders.query)
        total = tf.reduce_sum(twin.method(encoders, batch, seed=batches.draw_seed(0, 2)))
    gradient = tape.gradient(total, encoders.query)[:4].numpy()
    np.testing.assert_allclose(weights @ frozen.candidate, gradient, atol=2e-5)
    assert np.abs(gradient).max() > 1e-3


def test_the_full_softmax_is_itself(frozen, eagerly):
    found, sums = measured(frozen, "full_softmax", draws=3)
    assert abs(found["bias"]["value"]) < 1e-6
    assert abs(found["noise"]["value"]) < 1e-9
    assert abs(found["kl"]["value"]) < 1e-9
    assert found["norm_ratio"]["value"] == pytest.approx(1, abs=1e-6)
    assert found["bias"]["error"] < 1e-6
    np.testing.assert_allclose(sums.buckets, sums.full_buckets, rtol=1e-5)
    assert sums.ranked.sum() + sums.seen.sum() == pytest.approx(sums.pairs.sum())


@pytest.mark.long
def test_bias_of_ssl_pop_falls_as_the_batch_grows(frozen):
    small, _ = measured(frozen, "ssl_pop", batch_size=32, draws=16)
    large, _ = measured(frozen, "ssl_pop", batch_size=512, draws=16)
    gap = small["bias"]["value"] - large["bias"]["value"]
    assert gap > 3 * (small["bias"]["error"] + large["bias"]["error"])
    assert large["bias"]["value"] < 0.01
    assert large["noise"]["value"] < small["noise"]["value"]


def test_ssl_looks_at_popular_candidates_and_corrected_methods_do_not(frozen):
    ssl, by_ssl = measured(frozen, "ssl", batch_size=256, draws=8)
    pop, by_pop = measured(frozen, "ssl_pop", batch_size=256, draws=8)
    bir, _ = measured(frozen, "bir", batch_size=256, draws=8)
    for corrected in (pop, bir):
        assert ssl["kl"]["value"] > 10 * corrected["kl"]["value"]
    assert ssl["bias"]["value"] > pop["bias"]["value"] + 3 * ssl["bias"]["error"]
    full = by_ssl.full_buckets.sum(axis=0) / by_ssl.pairs.sum()
    share = by_ssl.buckets.sum(axis=0) / by_ssl.pairs.sum()
    assert share[0] > 2 * full[0]
    assert share[-1] < full[-1] / 2
    assert abs(by_pop.buckets.sum(axis=0)[0] / by_pop.pairs.sum() - full[0]) < 0.03
    # The draws of bir follow the softmax, and its loss weighs them by e^s once more.
    assert bir["top_share"]["value"] > 1.3 * pop["top_share"]["value"]


@pytest.mark.long
def test_fewer_kept_of_the_same_draws_are_harder(frozen):
    found = [measured(frozen, "dns_mn", num_kept=m, num_negatives=20)[0] for m in (1, 4, 20)]
    top = [one["top_share"]["value"] for one in found]
    half = [one["half_mass_rank"]["value"] for one in found]
    assert top[0] > 1.5 * top[1] > 2 * top[2]
    assert half[0] < half[1] < half[2]


def test_noise_is_not_taken_for_bias(frozen):
    """The mean of a few draws is far off; the bias of a method is not."""
    few, _ = measured(frozen, "bir", batch_size=256, draws=4, num_resampled=1)
    many, _ = measured(frozen, "bir", batch_size=256, draws=32, num_resampled=1)
    assert many["noise"]["value"] > 0.2
    gap = abs(few["bias"]["value"] - many["bias"]["value"])
    assert gap < 3 * (few["bias"]["error"] + many["bias"]["error"])
    assert gap < 0.1 * many["noise"]["value"]


def test_gradients_along_a_cosine_do_not_count(frozen):
    unit = dataclasses.replace(
        frozen,
        query=10 * frozen.query / np.linalg.norm(frozen.query, axis=1, keepdims=True),
        candidate=frozen.candidate / np.linalg.norm(frozen.candidate, axis=1, keepdims=True),
        normalize=True,
    )
    batches = Batches.of(4000, batches=2, pairs=4, batch_size=32, seed=0)
    for one in references(unit, batches, Positives(np.arange(U), np.arange(U), U)):
        assert np.abs((one.gradient * one.query).sum(axis=1)).max() < 1e-6
        assert np.abs(one.gradient).max() > 1e-3


def test_ranks_leave_out_what_a_query_has_chosen(frozen):
    batches = Batches.of(4000, batches=2, pairs=4, batch_size=32, seed=0)
    positives = Positives(frozen.query_ids[::20], frozen.candidate_ids[::20], U)
    reference = references(frozen, batches, positives)[1]
    for row, query_id in enumerate(frozen.query_ids[batches.pairs[1]]):
        scores = frozen.candidate @ frozen.query[query_id]
        chosen = set(positives.of(query_id))
        free = [j for j in sorted(range(N), key=lambda j: -scores[j]) if j not in chosen]
        assert [reference.ranks[row, j] for j in free] == list(range(len(free)))
        assert all(reference.ranks[row, j] == N for j in chosen)


def test_a_batch_holds_no_row_twice():
    batches = Batches.of(40, batches=3, pairs=16, batch_size=64, seed=0)
    assert batches.pairs.shape == (3, 10)  # a quarter
    assert sorted(batches.rows(2, 1)) == list(range(40))
    np.testing.assert_array_equal(batches.rows(2, 1)[:10], batches.pairs[2])


def test_measures_by_hand():
    assert popularity_buckets(np.array([5, 0, 9, 5, 1, 2]), 3).tolist() == [0, 2, 0, 1, 2, 1]
    assert popularity_buckets(np.array([1, 2])).tolist() == [1, 0]
    assert half_mass_rank(np.array([0.1, 0.3, 0.2, 0.4])) == 3
    mass = np.array([[0.5, 0.3, 0.2, 0.0], [0.0, 0.0, 0.25, 0.75]])
    ranks = np.array([[4, 1, 0, 2], [0, 1, 2, 4]])  # 4: what the query has chosen
    seen, ranked = shares_by_rank(mass, ranks)
    assert seen == 1.25
    np.testing.assert_allclose(ranked, [0.2, 0.3, 0.25, 0.0])


@pytest.mark.parametrize(
    ("implied", "kl"),
    [
        ([1.0, 3.0], 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)),
        ([1, 0], None),
        ([0, 0], None),
    ],
)
def test_kl_by_hand(implied, kl):
    """None, for JSON's sake, where a bucket is missed or there are no negatives."""
    ones = np.ones(2)
    buckets = np.array([implied] * 2)
    sums = Sums(ones, ones, ones, ones, ones, buckets, np.full((2, 2), 2.0), ones, buckets)
    assert summarize(sums, 1)["kl"]["value"] == (None if kl is None else pytest.approx(kl))


def test_knobs_follow_k():
    softer, harder, hardest = (Target.of(k, 40_000) for k in (400, 50, 5))
    assert softer.specs[0] == "dns_mn:num_kept=2,num_negatives=200"
    assert softer.rho == pytest.approx(np.log(100))
    assert (harder.num_kept, harder.num_drawn) == (1, 800)
    assert (hardest.num_kept, hardest.num_drawn) == (1, 1000)
    assert hardest.rho == pytest.approx(np.log(1000))  # more than N draws can tell


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory):
    return shutil.copytree(trained[0].run, tmp_path_factory.mktemp("audit") / "run")


@pytest.fixture(scope="module")
def config(prepared, run):
    return AuditConfig(
        data=str(prepared),
        run=str(run),
        methods=("full_softmax", "ssl", "correct_sfx", "dns_mn:num_kept=1,num_negatives=9"),
        k=5,
        batches=3,
        pairs=4,
        draws=3,
        warm_up=1,
        timed_steps=1,
    )


@pytest.fixture(scope="module")
def found(config):
    """What the command writes."""
    names = ("data", "run", "k", "batches", "pairs", "draws", "warm_up", "timed_steps")
    words = [word for name in names for word in (f"--{name}", str(getattr(config, name)))]
    assert twotower.main(["audit", *words, "--methods", *config.methods]) == 0
    return json.loads((Path(config.run) / "audit" / RECORD).read_text())


@pytest.mark.long
def test_the_command_from_end_to_end(config, found):
    assert list(found["methods"]) == list(config.methods)
    assert abs(found["methods"]["full_softmax"]["bias"]["value"]) < 1e-5
    assert sum(found["full_softmax_buckets"]) == pytest.approx(1)
    for one in found["methods"].values():
        assert sum(one["buckets"]) == pytest.approx(1)
        assert one["mass_by_rank"][-1] == pytest.approx(1)
        assert one["seconds"] > 0
    kl = {label: one["kl"]["value"] for label, one in found["methods"].items()}
    assert kl["correct_sfx"] < kl["ssl"] / 3  # its estimates are not those of a first step
    output = Path(config.run) / "audit"
    page = (output / PAGE).read_text().replace("<wbr>", "")
    assert "<td>dns_mn:num_kept=1,num_negatives=9</td>" in page
    assert "K = 5" in page
    assert "<td>estimates as after endless training</td>" in page
    assert page.count("<figure>") == 3
    assert_shared_look(page)


@pytest.mark.long
def test_the_page_fits_into_a_narrow_window(config, found):
    assert_file_fits(Path(config.run) / "audit" / PAGE)


def test_the_same_seed_gives_the_same_figures_and_no_time_one_method(config, found):
    again = audit(dataclasses.replace(config, methods=("ssl", "bpr"), max_seconds=1e-6))
    assert list(again["methods"]) == ["ssl"]
    assert again["left_out"] == {"bpr": "max_seconds were over"}
    for name in ("bias", "noise", "kl", "buckets", "mass_by_rank"):
        assert again["methods"]["ssl"][name] == found["methods"]["ssl"][name]
    first, other = (
        Batches.of(100, batches=2, pairs=4, batch_size=32, seed=seed) for seed in (10, 11)
    )
    assert (first.pairs != other.pairs).any()
    assert (first.rows(0, 0) != first.rows(0, 1)).any()
    assert (first.rows(0, 0) != other.rows(0, 0)).any()


@pytest.mark.long
def test_the_state_of_the_run_is_taken_over(config, tmp_path):
    run, label = str(tmp_path / "xir"), "xir:cache_size=32"
    trained = TrainConfig(
        data=config.data,
        run=run,
        dim=8,
        batch_size=64,
        epochs=1,
        method="xir",
        options=("cache_size=32",),
    )
    train(trained)
    bench = Bench(dataclasses.replace(config, run=run, methods=(label,)))
    subject, state = bench.make(Spec.parse(label))
    assert state == "state of the run"
    occurrences = subject.method.cache.occurrences.numpy()
    assert occurrences.max() > 1000  # a step draws B² candidates
    np.testing.assert_array_equal(occurrences, bench.model.method.cache.occurrences)
    other, state = bench.make(Spec.parse("xir:cache_size=16"))
    assert state == "state after 1 steps"
    assert other.method.cache.occurrences.numpy().sum() < occurrences.sum()


@pytest.mark.long
def test_all_methods_by_default(config):
    found = audit(dataclasses.replace(config, methods=()))
    assert set(found["left_out"]) == {"sl_at_k"}  # the run scores by dot products
    named = {one["method"] for one in found["methods"].values()}
    assert named == set(METHODS) - {"sl_at_k"}
    assert {*DRAWS, *found["target"]["specs"]} < set(found["methods"])


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"methods": ("sslpop",)}, "Did you mean 'ssl_pop'"),
        ({"methods": ("ssl", "ssl")}, "must differ"),
        ({"methods": ("dns_mn:num_kept",)}, "name:option=value"),
        ({"methods": ("dns_mn:kept=3",)}, "Did you mean 'num_kept'"),
        ({"run": "nowhere"}, "holds no trained run"),
    ],
)
def test_mistakes_are_told_and_leave_nothing(config, tmp_path, fields, text):
    fields = fields | {"output": str(tmp_path / "audit")}
    with pytest.raises(ValueError, match=text):
        audit(dataclasses.replace(config, **fields))
    assert not (tmp_path / "audit").exists()


def test_other_data_are_refused(config, make_prepared, checkerboard):
    other = dataclasses.replace(config, data=str(make_prepared(checkerboard)))
    with pytest.raises(ValueError, match="trained on other data"):
        audit(other)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"k": 0}, "k must be at least 1"),
        ({"draws": 1}, "draws must be at least 2"),
        ({"batch_size": 1}, "batch_size must be 0 or at least 2"),
        ({"max_seconds": 0}, "max_seconds must be above 0"),
        ({"run": ""}, "run must be given"),
    ],
)
def test_settings_are_checked(fields, text):
    with pytest.raises(ValueError, match=text):
        AuditConfig(**{"data": "d", "run": "r", **fields})


def test_a_spec_is_a_name_and_options():
    spec = Spec.parse("softmax_v:rho=6.68,num_negatives=800")
    assert (spec.name, spec.options) == ("softmax_v", {"rho": "6.68", "num_negatives": "800"})
    assert Spec.parse("ssl").options == {}
