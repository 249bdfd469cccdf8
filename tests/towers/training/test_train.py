import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from samplers.methods.by_name import METHODS
from towers.data.interactions import open_data
from towers.evaluation.evaluate import evaluate_run
from towers.evaluation.settings import EvaluateConfig
from towers.metrics.held_out import HeldOut
from towers.training.run_directory import only_writer, open_run
from towers.training.settings import TrainConfig
from towers.training.train import train

# Trains until a checkpoint inside the second epoch is two steps old, then kills itself.
KILLED = """
import json, os, signal, sys
from towers.training.checkpoints import RunRecorder
from towers.training.settings import TrainConfig
from towers.training.train import train

def on_train_batch_end(self, batch, logs=None):
    step = int(self.model.iteration) - self._steps
    if step == 2:
        self.save()
    if step == 4:
        os.kill(os.getpid(), signal.SIGKILL)

RunRecorder.on_train_batch_end = on_train_batch_end
train(TrainConfig(**json.loads(sys.argv[2]) | {"run": sys.argv[1]}))
"""


def config_for(prepared, run, **settings):
    fields = {"dim": 8, "batch_size": 32, "epochs": 4, "l2": 1e-4, "temperature": 0.5}
    fields["jit_compile"] = False
    return TrainConfig(data=str(prepared), run=str(run), **(fields | settings))


@pytest.fixture
def two_epochs(trained):
    """A finished run, and what its training returned."""
    config, summary = trained
    return Path(config.run), summary


def checkpoint_of(run):
    """Every variable in the last checkpoint of a run."""
    reader = tf.train.load_checkpoint(tf.train.latest_checkpoint(str(run / "checkpoints")))
    names = [name for name in reader.get_variable_to_shape_map() if name.startswith("model/")]
    assert any("optimizer" in name for name in names)
    return {name: reader.get_tensor(name) for name in names}


def history_of(run):
    """The history without what depends on the clock."""
    entries = json.loads((run / "training.json").read_text())["history"]
    return [{key: entry[key] for key in entry if key != "seconds"} for entry in entries]


RESUMED = [("lazy_adam", False), pytest.param(("rowwise_adagrad", True), marks=pytest.mark.long)]


@pytest.fixture(scope="module", params=RESUMED)
def whole(prepared, tmp_path_factory, request):
    """The settings of a run that was never interrupted, compiled with XLA or not."""
    run = tmp_path_factory.mktemp("whole") / "run"
    optimizer, compiled = request.param
    settings = {"optimizer": optimizer, "exclude_seen_negatives": True, "batch_size": 100}
    config = config_for(prepared, run, epochs=2, jit_compile=compiled, **settings)
    train(config)
    return config


def assert_same_run(run, other):
    one, two = checkpoint_of(run), checkpoint_of(other)
    assert one.keys() == two.keys()
    for name, values in one.items():
        assert values.tobytes() == two[name].tobytes(), name
    assert history_of(run) == history_of(other)


def test_a_run_goes_on_with_xla_or_without_as_it_began(prepared, tmp_path):
    config = config_for(prepared, tmp_path / "run", epochs=1, method="bpr")
    assert train(config)["compiled"] is False
    default = dataclasses.replace(config, epochs=2, jit_compile=None)
    assert METHODS["bpr"].faster_with_xla  # so that a new run is compiled
    assert train(default)["compiled"] is False
    with pytest.raises(ValueError, match=r"^jit_compile must be left out with --time_xla"):
        dataclasses.replace(config, time_xla=True)


@pytest.mark.long
def test_a_run_that_times_xla_is_the_run_that_was_told_so(prepared, tmp_path, caplog):
    config = config_for(prepared, tmp_path / "timed", epochs=1, method="xir", jit_compile=None)
    with caplog.at_level("INFO"):
        compiled = train(dataclasses.replace(config, time_xla=True))["compiled"]
    text = next(line for line in caplog.messages if "ms with XLA" in line)
    with_xla, without = (float(word) for word in re.findall(r"([\d.]+) ms", text))
    assert compiled == (with_xla < without)
    told = dataclasses.replace(config, run=str(tmp_path / "told"), jit_compile=compiled)
    train(told)
    assert_same_run(tmp_path / "timed", tmp_path / "told")


@pytest.mark.long
def test_killed_and_resumed_is_never_interrupted(prepared, whole, tmp_path):
    run = tmp_path / "killed"
    fields = json.dumps(dataclasses.asdict(whole))
    killed = subprocess.run([sys.executable, "-c", KILLED, str(run), fields])
    assert killed.returncode == -signal.SIGKILL
    left = json.loads((run / "training.json").read_text())
    assert left["steps"] == open_data(prepared).steps_per_epoch(100) + 2
    assert not left["finished"]
    assert train(dataclasses.replace(whole, run=str(run)))["finished"]
    assert_same_run(Path(whole.run), run)


@pytest.mark.long
def test_interrupted_between_the_last_step_and_the_end_of_an_epoch(whole, tmp_path, monkeypatch):
    cut = dataclasses.replace(whole, run=str(tmp_path / "cut"), checkpoint_minutes=1e-9)
    measure, calls = HeldOut.measure, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(HeldOut, "measure", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(cut)
    assert train(cut)["epochs"] == 2
    assert_same_run(Path(whole.run), tmp_path / "cut")


def test_more_epochs_go_on_with_a_finished_run(prepared, two_epochs, tmp_path, caplog):
    caplog.set_level("INFO", "towers")
    run, whole = two_epochs
    train(config_for(prepared, tmp_path / "parts", epochs=1))
    again = train(config_for(prepared, tmp_path / "parts", epochs=1))
    assert again["epochs"] == 1
    assert "is finished after 1 epochs" in caplog.text
    parts = train(config_for(prepared, tmp_path / "parts", epochs=2))
    assert parts["steps"] == whole["steps"]
    for name, values in checkpoint_of(run).items():
        np.testing.assert_array_equal(values, checkpoint_of(tmp_path / "parts")[name])


def test_run_directory(prepared, two_epochs):
    run, summary = two_epochs
    assert json.loads((run / "training.json").read_text()) == summary
    config = json.loads((run / "config.json").read_text())["configuration"]
    assert (config["method"], config["dim"]) == ("ssl_pop", 8)
    assert summary["steps"] == 2 * open_data(prepared).steps_per_epoch(32)
    assert [entry["epoch"] for entry in summary["history"]] == [1, 2]
    assert {"loss", "val_recall@50", "val_ndcg@10", "seconds"} <= set(summary["history"][0])
    assert summary["seconds"] > 0
    assert list((run / "logs" / "train").iterdir())
    assert len(list((run / "checkpoints").glob("*.index"))) <= 2


def test_another_configuration_and_other_data_are_refused(
    prepared, checkerboard, make_prepared, two_epochs, tmp_path
):
    run = shutil.copytree(two_epochs[0], tmp_path / "run")
    with pytest.raises(ValueError, match=r"dim 8 → 4, temperature 0.5 → 2.0.*--overwrite"):
        train(config_for(prepared, run, epochs=2, dim=4, temperature=2.0))
    with pytest.raises(ValueError, match="epochs 2 → 1"):
        train(config_for(prepared, run, epochs=1))
    other = make_prepared(checkerboard)
    with pytest.raises(ValueError, match="the content of the data"):
        train(config_for(other, run, epochs=2))
    with pytest.raises(ValueError, match="trained on other data"):
        open_run(run, open_data(other))
    settings = {"epochs": 1, "dim": 4, "exclude_seen_negatives": True}
    config = config_for(prepared, run, overwrite=True, **settings)
    assert train(config)["epochs"] == 1
    model, opened = open_run(config.run, open_data(prepared))
    assert model.method.seen is not None
    assert opened.recorded()["exclude_seen_negatives"] is True
    with pytest.raises(ValueError, match="exclude_seen_negatives True → False"):
        train(dataclasses.replace(config, exclude_seen_negatives=False, overwrite=False))


def test_one_process_at_a_time(prepared, tmp_path):
    with (
        only_writer(tmp_path / "run"),
        pytest.raises(ValueError, match="another process is training"),
    ):
        train(config_for(prepared, tmp_path / "run"))


def test_early_stopping_keeps_the_best_weights(prepared, tmp_path, caplog):
    caplog.set_level("INFO", "towers")
    config = config_for(
        prepared,
        tmp_path / "run",
        epochs=60,
        patience=2,
        learning_rate=0.1,
        validation_metric="ndcg@5",
    )
    summary = train(config)
    values = [entry["val_ndcg@5"] for entry in summary["history"]]
    assert summary["stopped_early"]
    assert summary["finished"]
    assert summary["best_epoch"] == int(np.argmax(values)) + 1
    assert len(values) == summary["best_epoch"] + 2
    data = open_data(prepared)
    model, _ = open_run(config.run, data)
    means, _ = HeldOut(data, "validation").measure(
        model.query_embeddings().numpy(), model.candidate_embeddings().numpy(), (5,)
    )
    assert means["ndcg@5"] == max(values)
    names = {path.name for path in (tmp_path / "run" / "checkpoints").glob("best-*.index")}
    assert names == {f"best-{summary['best_epoch']}.index"}
    more = dataclasses.replace(config, epochs=99)
    assert train(more)["epochs"] == len(values)  # stays stopped, and does not say that it would not
    assert "patience ended it, --overwrite begins again" in caplog.text
    assert "more --epochs" not in caplog.text


def test_early_stopping_needs_a_validation_part(checkerboard, make_prepared, tmp_path):
    config = config_for(make_prepared(checkerboard), tmp_path / "run", patience=1)
    with pytest.raises(ValueError, match="patience must be 0 without a validation part"):
        train(config)


def test_wrong_methods_leave_nothing_behind(prepared, tmp_path):
    for settings in ({"method": "nothing"}, {"options": ("alpha=1",)}):
        with pytest.raises(ValueError, match="must be one of"):
            train(config_for(prepared, tmp_path / "run", **settings))
    assert not (tmp_path / "run").exists()


def test_evaluate(prepared, two_epochs, tmp_path, capsys):
    run, summary = shutil.copytree(two_epochs[0], tmp_path / "run"), two_epochs[1]
    result = evaluate_run(EvaluateConfig(data=str(prepared), run=str(run), ks=(5, 10)))
    assert json.loads((run / "metrics.json").read_text()) == result
    assert result["users"] == (open_data(prepared).positives("test").sizes > 0).sum()
    assert result["seconds"]["train"] == summary["seconds"]
    assert result["test"].keys() == result["confidence_95"].keys()
    assert result["test"]["recall@5"] < result["test"]["recall@10"]
    assert result["popularity"]["recall@10"] > 0
    table = capsys.readouterr().out
    assert f"{result['test']['ndcg@10']:.4f} ± " in table
    assert "popularity" in table
    surely = result["test"]["ndcg@10"] - result["confidence_95"]["ndcg@10"]
    is_weak = surely <= result["popularity"]["ndcg@10"]
    assert is_weak
    assert 'not clearly above popularity: see "No better than popularity" in docs' in table
    assert f"(0 of {result['users']} users have no train rows)" in table
    same = evaluate_run(EvaluateConfig(data=str(prepared), run=str(run), split="validation"))
    assert same["validation"]["recall@10"] == summary["history"][-1]["val_recall@10"]


def test_what_is_not_there_cannot_be_evaluated(prepared, checkerboard, make_prepared, tmp_path):
    with pytest.raises(ValueError, match="holds no trained run"):
        evaluate_run(EvaluateConfig(data=str(prepared), run=str(tmp_path)))
    board = make_prepared(checkerboard)
    with pytest.raises(ValueError, match="no validation rows"):
        evaluate_run(EvaluateConfig(data=str(board), run=str(tmp_path), split="validation"))
