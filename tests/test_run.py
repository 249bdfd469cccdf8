"""`twotower run`: the whole path on a small log, and what a second run skips."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv as pa_csv
import pytest
import tensorflow as tf

import towers
import twotower
import twotower_run
from pipeline.contract import schema
from pipeline.prepare.settings import PrepareConfig
from serving.publish.settings import ExportConfig
from serving.retrieval.retriever import Retriever
from towers.report import pages
from towers.training.settings import TrainConfig

CONFIG = """
workdir: {workdir}
prepare:
  source: {source}
  validation_ratio: 0.1
train:
  dim: 16
  normalize: true
  temperature: 0.1
  batch_size: 256
  epochs: {epochs}
  l2: 0
evaluate:
  ks: [5, 10]
export:
  k: 20
"""


EVERYTHING = ["prepare", "train", "evaluate", "export"]


@pytest.fixture
def workdir(tmp_path):
    """A log in which users of one taste buy the items of that taste."""
    rng = np.random.default_rng(3)
    users = rng.integers(0, 200, 6000)
    items = rng.integers(0, 40, 6000) * 4 + users % 4
    log = pa.table({"user_id": [f"u{u}" for u in users], "item_id": [f"i{i}" for i in items]})
    pa_csv.write_csv(log, tmp_path / "log.csv")
    return tmp_path


def run(workdir, capsys, epochs, status=0, train=""):
    text = CONFIG.format(workdir=workdir / "work", source=workdir / "log.csv", epochs=epochs)
    text = text.replace("train:\n", f"train:\n{train}")
    (workdir / "run.yaml").write_text(text)
    assert twotower.main(["run", "--config", str(workdir / "run.yaml")]) == status
    return capsys.readouterr().out


def stages(out, word):
    return [line.split("]")[0].strip("[") for line in out.splitlines() if f"] {word}" in line]


@pytest.mark.long
def test_the_whole_path_then_only_what_changed(workdir, capsys):
    assert stages(run(workdir, capsys, epochs=3), "starts") == EVERYTHING
    metrics = json.loads((workdir / "work" / "run" / "metrics.json").read_text())
    assert metrics["test"]["recall@10"] > 2 * metrics["popularity"]["recall@10"]
    assert set(metrics["seconds"]) >= {"train", "evaluate"}
    assert {"ndcg@10", "ndcg_xir@10", "mrr@10", "hit_rate@10", "precision@10"} <= set(
        metrics["test"]
    )

    out = run(workdir, capsys, epochs=3)
    assert stages(out, "skipped") == EVERYTHING
    assert f"{metrics['test']['recall@10']:.4f}" in out  # the results are shown all the same

    out = run(workdir, capsys, epochs=4)
    assert stages(out, "skipped") == ["prepare"]
    assert stages(out, "starts") == EVERYTHING[1:]
    assert sorted(
        p.name for p in (workdir / "work" / "models" / "twotower").iterdir() if p.name.isdigit()
    ) == ["1", "2"]

    models = str(workdir / "work" / "models")
    arguments = ["query", "--models", models, "--query", "u6", "--k", "5", "--json"]
    assert twotower.main([*arguments, "--exclude_seen"]) == 0
    answer = json.loads(capsys.readouterr().out)
    tastes = [int(result["candidate_id"][1:]) % 4 for result in answer["results"]]
    assert tastes.count(6 % 4) >= 4
    assert not {result["candidate_id"] for result in answer["results"]} & set(answer["history"])

    assert twotower.main(["query", "--models", models, "--query", "nobody"]) == 2
    assert "'nobody' is not known" in capsys.readouterr().err


@pytest.fixture
def stubs(workdir, monkeypatch):
    """Stages that only write what shows that they ended; it is the settings of their calls."""
    work, calls = workdir / "work", []

    def call(settings, *beam_arguments):
        calls.append(settings)
        content = repr(len(calls))  # another one at each call
        if isinstance(settings, PrepareConfig):
            (work / "prepared").mkdir(exist_ok=True)
            schema.Manifest("prepared", "", {"call": content}, {}, {}).write(work / "prepared")
        elif isinstance(settings, TrainConfig):
            (work / "run").mkdir(exist_ok=True)
            (work / "run" / "training.json").write_text(content)
        elif isinstance(settings, ExportConfig):
            (work / "models" / "twotower" / content).mkdir(parents=True)
            (work / "models" / "twotower" / content / "manifest.json").write_text("{}")
        else:
            scores = {"recall@10": 0.5}
            metrics = {"split": "test", "method": "x", "test": scores, "popularity": scores}
            (work / "run" / "metrics.json").write_text(json.dumps(metrics))

    monkeypatch.setattr(twotower_run, "resolve", lambda name: call)
    monkeypatch.setattr(pages, "write_report", lambda *arguments: None)
    monkeypatch.setattr(twotower_run, "_version_of", lambda *arguments: None)
    return calls


def test_a_new_log_and_a_stage_that_did_not_end(workdir, capsys, stubs, monkeypatch):
    run(workdir, capsys, epochs=3)
    with open(workdir / "log.csv", "a") as log:
        log.write('"new","i1"\n')
    assert stages(run(workdir, capsys, epochs=3), "starts") == EVERYTHING
    prepare, train, *_ = stubs[-4:]
    assert prepare.overwrite
    assert train.overwrite

    def fail(settings):
        raise ValueError("the machine was switched off")

    with monkeypatch.context() as failing:
        failing.setattr(twotower_run, "resolve", lambda name: fail)
        run(workdir, capsys, epochs=5, status=2)
    assert stages(run(workdir, capsys, epochs=5), "starts") == EVERYTHING[1:]
    assert not stubs[-3].overwrite  # a training that was interrupted goes on


@pytest.mark.parametrize("name", ["init_from", "teacher", "refit", "frequency"])
def test_a_training_begins_anew_once_what_it_learns_from_is_another(
    workdir, capsys, stubs, monkeypatch, name
):
    source = workdir / "source"
    changed = source / ("00000001/manifest.json" if name == "frequency" else "training.json")
    train = f"  {name}: {'streaming:' * (name == 'frequency')}{source}\n"
    train += "  method: full_softmax\n" * (name == "teacher")

    def again(content=None):
        if content:
            changed.parent.mkdir(parents=True, exist_ok=True)
            changed.write_text(content)
        return stages(run(workdir, capsys, epochs=3, train=train), "starts")

    assert again("one") == EVERYTHING
    assert again() == []
    assert again("two") == EVERYTHING[1:]
    assert stubs[-3].overwrite

    def fail(settings):
        raise ValueError("the machine was switched off")

    with monkeypatch.context() as failing:
        failing.setattr(twotower_run, "resolve", lambda name: fail)
        changed.write_text("three")
        run(workdir, capsys, epochs=3, status=2, train=train)
    assert again("four") == EVERYTHING[1:]
    goes_on = name in ("init_from", "frequency")  # with what it took at its first step
    assert stubs[-3].overwrite != goes_on
    assert again() == EVERYTHING[1:] * goes_on
    assert again() == []


@pytest.mark.parametrize(
    "settings",
    [pytest.param({}, id="id"), pytest.param({"tower": "fism"}, id="fism", marks=pytest.mark.long)],
)
def test_a_model_becomes_the_version_that_answers_as_it_does(tmp_path, settings):
    rng = np.random.default_rng(4)
    log = pd.DataFrame({"user": rng.integers(0, 30, 400), "item": rng.integers(0, 25, 400)})
    items = pd.DataFrame({"item": range(27), "title": [f"Item {n}" for n in range(27)]})
    data = towers.from_dataframe(
        log, user="user", item="item", validation_ratio=0.1, item_features=items
    )
    model = towers.TwoTower(data, dim=8, **settings)
    version = towers.export(model, tmp_path, name="shop", scann=False)
    assert version == tmp_path / "shop" / "1"
    retriever = Retriever.load(tmp_path, "shop")
    asked = [{"ids": ["3", "4"]}, *([{"history": [["7", "8"]]}] if settings else [])]
    for question in asked:
        given = {"query_ids": question.get("ids")}
        if "history" in question:
            given = {"queries": [{"history": chosen} for chosen in question["history"]]}
        served = retriever.top_k(**given, k=5, exclude_seen=True)
        answer = model.recommend(
            question.get("ids"), history=question.get("history"), k=5, exclude_seen=True
        )
        for result, (_, rows) in zip(served, answer.groupby("query_id"), strict=True):
            assert rows["candidate_id"].tolist() == result.candidate_ids
            np.testing.assert_allclose(rows["score"], result.scores, rtol=1e-5, atol=1e-7)
            assert rows["title"].tolist() == [f"Item {item}" for item in result.candidate_ids]
    stock = tf.saved_model.load(str(version)).signatures["serving_default"]
    top = stock(query_id=tf.constant(["3"]))
    answer = model.recommend(["3"], k=5)["candidate_id"].tolist()
    [ids] = [v.numpy() for v in top.values() if v.dtype == tf.string and v.shape.rank == 2]
    assert [name.decode() for name in ids[0, :5]] == answer
    assert towers.export(model, tmp_path, name="shop", scann=False).name == "2"
    with pytest.raises(ValueError, match="filter_columns must be among"):
        towers.export(model, tmp_path, name="shop", filter_columns=["colour"])
    assert sorted(path.name for path in (tmp_path / "shop").iterdir()) == ["1", "2"]


@pytest.mark.long  # a process of its own, as its libraries write where no test reads
def test_a_log_holds_nothing_that_means_nothing_to_a_user(workdir):
    text = CONFIG.format(workdir=workdir / "work", source=workdir / "log.csv", epochs=2)
    (workdir / "run.yaml").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "twotower", "run", "--config", str(workdir / "run.yaml")],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.stderr == ""
    epochs = [line for line in done.stdout.splitlines() if line.startswith("epoch ")]
    assert len(epochs) == 2
    assert all(
        re.fullmatch(r"epoch \d of 2, \d+ s: loss [\d.]+, val_\S+ [\d.]+", e) for e in epochs
    )
    assert not re.search("WARNING|AutoGraph|[IWE]0000 |absl|cuda", done.stdout)
