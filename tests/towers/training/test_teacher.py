import dataclasses
import json
import shutil

import numpy as np
import pytest
import scipy.sparse as sp

import twotower
from towers.data.interactions import open_data
from towers.evaluation.evaluate import evaluate_run
from towers.evaluation.settings import EvaluateConfig
from towers.model.optimizers import CoupledAdam
from towers.model.two_tower import TwoTower
from towers.presets import FLAGS
from towers.training.run_directory import open_run
from towers.training.settings import TrainConfig
from towers.training.teacher import graph_scores, soft_targets
from towers.training.train import train


@pytest.fixture(scope="module")
def teacher(prepared, tmp_path_factory):
    """A trained run."""
    run = tmp_path_factory.mktemp("teacher") / "run"
    settings = {"dim": 16, "batch_size": 100, "epochs": 3, "jit_compile": False}
    train(TrainConfig(data=str(prepared), run=str(run), **settings))
    return run


@pytest.fixture
def student(prepared, teacher, tmp_path):
    """Settings of a run that learns from it."""
    return TrainConfig(
        data=str(prepared),
        run=str(tmp_path / "student"),
        method="full_softmax",
        teacher=str(teacher),
        teacher_candidates=5,
        dim=8,
        batch_size=16,
        epochs=40,
        l2=0.0,
        jit_compile=False,
    )


def top(run, prepared, k=5):
    data = open_data(prepared)
    model, _ = open_run(run, data)
    return soft_targets(model, data, k)


def overlap(some, others):
    """Mean share of the same candidates in the rows of two rankings."""
    pairs = zip(some, others, strict=True)
    return np.mean([len(set(mine) & set(theirs)) / len(theirs) for mine, theirs in pairs])


def test_targets_are_the_top_of_the_teacher_without_what_was_chosen(data):
    model = TwoTower(data, 4, init_stddev=1.0)
    found = soft_targets(model, data, 6)
    scores = model.query_embeddings().numpy() @ model.candidate_embeddings().numpy().T
    chosen = data.positives("train")
    assert len(data.positives("validation").candidate_ids)  # which are ranked with the rest
    for query in range(data.num_queries):
        own = chosen.of(query)
        np.testing.assert_array_equal(
            found.chosen[found.offsets[query] : found.offsets[query + 1]], own
        )
        scores[query, own] = -np.inf
        expected = np.argsort(-scores[query])[:6]
        np.testing.assert_array_equal(found.ids[query], expected)
        np.testing.assert_allclose(found.scores[query], scores[query, expected], rtol=1e-5)


def standard(scores):
    return (scores - scores.mean(axis=1, keepdims=True)) / scores.std(axis=1, keepdims=True)


def matrix(data):
    """R of the train split, dense: what each query chose."""
    rows, result = data.arrays("train"), np.zeros((data.num_queries, data.num_candidates))
    result[rows["query_id"], rows["candidate_id"]] = 1
    return result


def test_the_graph_says_where_walks_end_and_what_passes_a_low_filter(data):
    chose = matrix(data)
    of_query, of_item = (np.maximum(chose.sum(axis=axis), 1) for axis in (1, 0))
    walk = chose / of_item @ chose.T / of_query @ chose
    scaled = chose / np.sqrt(of_query)[:, None] / np.sqrt(of_item)
    right = np.linalg.svd(scaled, full_matrices=False)[2][: min(256, min(chose.shape) - 1)]
    low = (chose / np.sqrt(of_item)) @ right.T @ right * np.sqrt(of_item)
    found = graph_scores(sp.csr_matrix(chose.astype(np.float32)))(np.array([3, 0]))
    expected = standard(walk) + 0.5 * standard(low)
    np.testing.assert_allclose(found, expected[[3, 0]], rtol=1e-3, atol=1e-4)


def test_targets_beside_the_graph_are_those_of_both(data):
    model = TwoTower(data, 4, init_stddev=1.0)
    found = soft_targets(model, data, 6, 0.7)
    scores = standard(model.query_embeddings().numpy() @ model.candidate_embeddings().numpy().T)
    chose = matrix(data)
    graph = graph_scores(sp.csr_matrix(chose.astype(np.float32)))
    scores += 0.7 * graph(np.arange(data.num_queries))
    scores[chose > 0] = -np.inf
    expected = np.sort(scores, axis=1)[:, ::-1][:, :6]
    np.testing.assert_allclose(found.scores, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(scores, found.ids, 1), expected, rtol=1e-4)
    assert overlap(found.ids, soft_targets(model, data, 6).ids) < 0.95
    everything = soft_targets(model, data, 1000, 0.7)
    free = data.num_candidates - data.positives("train").sizes
    np.testing.assert_array_equal((everything.ids >= 0).sum(axis=1), free)


def test_by_query_has_a_row_for_each_query(data):
    rows = data.by_query().arrays("train")
    sizes = data.positives("train").sizes
    np.testing.assert_array_equal(rows["query_id"], np.flatnonzero(sizes))
    for query, candidate in zip(rows["query_id"], rows["candidate_id"], strict=True):
        assert candidate in data.positives("train").of(query)
    sizes = sizes[sizes > 0]
    np.testing.assert_allclose(rows["weight"] ** 2, sizes / sizes.mean(), rtol=1e-5)
    held_out = data.arrays("validation"), data.by_query().arrays("validation")
    np.testing.assert_array_equal(*(part["candidate_id"] for part in held_out))


def test_a_small_corpus_leaves_the_end_of_a_ranking_empty(data):
    found = soft_targets(TwoTower(data, 4), data, 1000)
    assert found.ids.shape == (data.num_queries, data.num_candidates)
    free = data.num_candidates - data.positives("train").sizes
    np.testing.assert_array_equal((found.ids >= 0).sum(axis=1), free)
    TwoTower(data, 4, method="full_softmax", targets=found)


@pytest.mark.long
def test_a_student_ranks_as_its_teacher(data, prepared, teacher):
    targets = top(teacher, prepared)
    shares = []
    for taught in (targets, None):
        model = TwoTower(data, 8, "full_softmax", targets=taught, jit_compile=False)
        model.compile(optimizer=CoupledAdam(0.01))
        model.fit(data.by_query().train(16), epochs=30, verbose=0)
        shares.append(overlap(soft_targets(model, data, 5).ids, targets.ids))
    assert shares[0] > shares[1] + 0.1


@pytest.mark.long
def test_a_student_that_goes_on_is_one_that_never_stopped(prepared, student, tmp_path):
    straight = dataclasses.replace(student, run=str(tmp_path / "straight"), epochs=2)
    train(straight)
    train(dataclasses.replace(student, epochs=1))
    train(dataclasses.replace(student, epochs=2))
    for mine, theirs in zip(*(top(c.run, prepared) for c in (student, straight)), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_a_student_is_used_without_its_teacher(prepared, teacher, student, tmp_path):
    copy = tmp_path / "teacher"
    shutil.copytree(teacher, copy)
    summary = train(dataclasses.replace(student, teacher=str(copy), epochs=1))
    queries = len(np.unique(open_data(prepared).arrays("train")["query_id"]))
    assert summary["steps"] == -(-queries // 16)
    shutil.rmtree(copy)
    assert evaluate_run(EvaluateConfig(data=str(prepared), run=student.run))["test"]
    model, config = open_run(student.run, open_data(prepared))
    assert config.recorded()["teacher"] is True
    assert not hasattr(model.method, "targets")


def test_a_student_does_not_go_on_with_another_teacher(prepared, teacher, student, tmp_path):
    copy = tmp_path / "teacher"
    shutil.copytree(teacher, copy)
    student = dataclasses.replace(student, teacher=str(copy), epochs=1)
    train(student)
    training = json.loads((copy / "training.json").read_text())
    (copy / "training.json").write_text(json.dumps(training | {"seconds": 1.5}))  # trained again
    more = dataclasses.replace(student, epochs=2)
    with pytest.raises(ValueError, match="another configuration: the content of the teacher"):
        train(more)
    assert train(dataclasses.replace(more, overwrite=True))["steps"]


@pytest.mark.long
def test_a_student_learns_from_a_run_of_the_other_preset(prepared, tmp_path):
    command = f"train --data {prepared} --dim 8 --batch_size 16 --epochs 1 --jit_compile false"
    teacher, run = tmp_path / "teacher", tmp_path / "run"
    assert twotower.main(f"{command} --run {teacher} --preset best".split()) == 0
    learns = f"--preset student --teacher {teacher} --init_from {teacher}"
    assert twotower.main(f"{command} --run {run} {learns}".split()) == 0
    told = json.loads((run / "config.json").read_text())["configuration"]
    assert (told["method"], told["teacher_graph"], told["share_items"]) == (
        "full_softmax",
        FLAGS["student"]["teacher_graph"],
        False,
    )
    assert "teacher_weight=1.0" in told["options"]


def test_what_cannot_be_a_teacher_is_told(student, tmp_path):
    nothing = dataclasses.replace(student, teacher=str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match=r"nothing holds no trained run"):
        train(nothing)
    assert not (tmp_path / "student").exists()
    for changes, text in (
        ({"method": "ssl_pop"}, "^teacher goes with --method full_softmax alone"),
        ({"teacher": student.run}, "^teacher must be another directory than run"),
        ({"teacher_graph": -0.1}, "^teacher_graph must be at least 0"),
        ({"teacher_graph": 0.1, "teacher": ""}, "^teacher_graph must be 0 without --teacher"),
        ({"options": ("teacher_weight=1",), "teacher": ""}, "teacher_weight without --teacher"),
        ({"teacher_candidates": 0}, "^teacher_candidates must be at least 1"),
    ):
        with pytest.raises(ValueError, match=text):
            dataclasses.replace(student, **changes)
