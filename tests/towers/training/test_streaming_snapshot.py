"""Frequencies that a job made, in the trainer: snapshot → trainer → checkpoint → trainer."""

import dataclasses
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf

import twotower
from pipeline.commands import frequencies
from pipeline.contract import hashing, schema
from pipeline.counts.settings import FrequenciesConfig
from samplers.proposals import streaming_frequency as trainer_side
from towers.audit.job import audit
from towers.audit.settings import AuditConfig
from towers.data.interactions import open_data
from towers.evaluation.evaluate import evaluate_run
from towers.evaluation.settings import EvaluateConfig
from towers.legacy_keras import tf_keras
from towers.training.checkpoints import RunRecorder
from towers.training.frequency import in_steps_of_the_trainer, open_frequency
from towers.training.run_directory import make_model, open_run
from towers.training.settings import TrainConfig
from towers.training.train import train

BATCH = 32
SIZES = {"num_buckets": 211, "num_hashes": 5, "alpha": 0.05}

# raw id → fingerprint, its bucket in each of five arrays of 1009 and of 262,144. Snapshots and
# trained models rest on these numbers: they may never change.
GOLDEN = {
    "": (-5426141060434712860, [406, 916, 635, 125, 863], [107753, 81695, 23941, 101430, 88441]),
    "42": (8820412187630416983, [562, 182, 234, 194, 601], [58155, 30143, 177154, 50847, 191973]),
    "käse": (7584503891383709300, [858, 257, 23, 225, 543], [107890, 107643, 19806, 34856, 223798]),
    "B00005N5PF": (
        -3556317823898743481,
        [180, 476, 308, 251, 409],
        [77032, 41344, 166280, 223109, 36313],
    ),
}


@pytest.mark.parametrize("hash_buckets", [hashing.hash_buckets, trainer_side.hash_buckets])
def test_job_and_trainer_have_the_same_buckets(hash_buckets):
    prints = np.array([hashing.fingerprint(raw) for raw in GOLDEN])
    assert prints.tolist() == [row[0] for row in GOLDEN.values()]
    for num_buckets, column in ((1009, 1), (262_144, 2)):
        buckets = hash_buckets(prints, num_buckets=num_buckets, num_hashes=5)
        assert buckets.tolist() == [row[column] for row in GOLDEN.values()]


def write_log(path, items):
    pq.write_table(pa.table({"item_id": items, "timestamp": range(len(items))}), path)
    return str(path)


def estimate(source, output, **settings):
    fields = {"streaming": True, "batch_size": BATCH, "partitions": 2} | SIZES | settings
    frequencies(FrequenciesConfig(source=str(source), output=str(output), **fields), [])


@pytest.fixture(scope="module")
def log(prepared, tmp_path_factory):
    """Many rows of the items of the prepared data, but for the last five; and of others."""
    known = open_data(prepared).candidate_vocabulary.raw_ids.to_pylist()[:-5]
    places = np.random.default_rng(3).random(2001) ** 2
    items = [known[int(place * len(known))] for place in places] + ["elsewhere"]
    return write_log(tmp_path_factory.mktemp("log") / "log.parquet", items)


@pytest.fixture(scope="module")
def snapshots(log, tmp_path_factory):
    """A directory with one snapshot."""
    root = tmp_path_factory.mktemp("stream") / "snapshots"
    estimate(log, root)
    return root


def config_for(prepared, run, frequency, **settings):
    fields = {"dim": 4, "batch_size": BATCH, "epochs": 1, "method": "correct_sfx"}
    fields["jit_compile"] = False
    return TrainConfig(data=str(prepared), run=str(run), frequency=frequency, **(fields | settings))


def arrays_of(snapshot):
    manifest = schema.read_manifest(snapshot, "streaming_frequency")
    names = (schema.STREAMING_LAST_STEP, schema.STREAMING_INTERVAL, schema.STREAMING_WEIGHT)
    return manifest.details["step"], *(np.load(snapshot / name) for name in names)


def with_open_intervals(step, last_step, interval, weight):
    """b where the steps since the last one count as well."""
    return interval + 0.05 / np.where(weight > 0, weight, 1) * (step - last_step)


def started(config, data):
    """The model of a run before its first step."""
    config, frequency = open_frequency(config, data)
    model = make_model(config, frequency.counted(data))
    frequency.start(model.method)
    return config, model


def checkpoint_of(run):
    """Every variable in the last checkpoint of a run."""
    reader = tf.train.load_checkpoint(tf.train.latest_checkpoint(str(run / "checkpoints")))
    names = [name for name in reader.get_variable_to_shape_map() if name.startswith("model/")]
    return {name: reader.get_tensor(name) for name in names}


@pytest.fixture(scope="module")
def whole(prepared, snapshots, tmp_path_factory):
    """A run of correct_sfx from the snapshot that was never interrupted: to be read or copied."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(config_for(prepared, run, f"streaming:{snapshots}"))
    return run


# --- correct_sfx ----------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["", "00000001"])
def test_the_trainer_takes_over_a_snapshot(prepared, snapshots, tmp_path, which):
    data = open_data(prepared)
    path = snapshots / which if which else snapshots
    config, model = started(config_for(prepared, tmp_path / "run", f"streaming:{path}"), data)
    estimates = model.method.estimates
    step, last_step, interval, weight = arrays_of(snapshots / "00000001")
    assert int(estimates.step) == step == -(-2002 // BATCH)
    np.testing.assert_array_equal(estimates.last_step.numpy().reshape(5, -1), last_step)
    expected = interval.astype(np.float32)
    np.testing.assert_array_equal(estimates.interval.numpy().reshape(5, -1), expected)
    expected = weight.astype(np.float32)
    np.testing.assert_array_equal(estimates.weight.numpy().reshape(5, -1), expected)
    assert estimates.alpha == 0.05
    raw_ids = data.candidate_vocabulary.raw_ids.to_pylist()
    prints = np.array([hashing.fingerprint(raw) for raw in raw_ids])
    buckets = hashing.hash_buckets(prints, num_buckets=211, num_hashes=5)
    np.testing.assert_array_equal(estimates.buckets, buckets)
    assert config.frequency == f"streaming:{snapshots / '00000001'}"
    assert set(config.options) == {"num_buckets=211", "num_hashes=5", "alpha=0.05"}


def test_the_trainer_goes_on_with_the_recursion(prepared, snapshots, tmp_path):
    """One step of the model is step t + 1 of the stream."""
    data = open_data(prepared)
    _, model = started(config_for(prepared, tmp_path / "run", f"streaming:{snapshots}"), data)
    step, last_step, interval, weight = arrays_of(snapshots / "00000001")
    batch = next(iter(data.train(BATCH)))
    model.compile(optimizer="sgd")
    model.train_step(batch)
    raw_ids = data.candidate_vocabulary.raw_ids.to_pylist()
    for candidate in np.unique(batch["candidate_id"]):
        print_ = np.array([hashing.fingerprint(raw_ids[candidate])])
        for h, bucket in enumerate(
            hashing.hash_buckets(print_, num_buckets=211, num_hashes=5)[0].tolist()
        ):
            share = 0.05 / (0.95 * weight[h, bucket] + 0.05)
            b = interval[h, bucket] + share * (
                step + 1 - last_step[h, bucket] - interval[h, bucket]
            )
            actual = model.method.estimates.interval.numpy().reshape(5, -1)[h, bucket]
            assert actual == pytest.approx(b, rel=1e-6)
    assert int(model.method.estimates.step) == step + 1


def test_a_published_start_takes_estimates_for_what_they_are(prepared, snapshots, tmp_path):
    options = ("published_start=true",)
    source = f"streaming:{snapshots}"
    config = config_for(prepared, tmp_path / "run", source, options=options)
    _, model = started(config, open_data(prepared))
    _, _, interval, _ = arrays_of(snapshots / "00000001")
    estimates = model.method.estimates
    np.testing.assert_allclose(estimates.interval.numpy().reshape(5, -1), interval, rtol=1e-6)
    assert (estimates.weight.numpy() == 1).all()


def test_options_are_those_of_the_stream(prepared, snapshots, tmp_path):
    data = open_data(prepared)
    source = f"streaming:{snapshots}"
    same = ("alpha=5e-2", "num_buckets=211", "positive_twice=true")
    config, model = started(config_for(prepared, tmp_path / "run", source, options=same), data)
    assert config.options == (*same, "num_hashes=5")
    assert model.method.positive_twice
    for option in ("alpha=0.1", "num_buckets=none", "num_hashes=4"):
        with pytest.raises(ValueError, match=r"must be .* as in streaming:.*leave it out"):
            started(config_for(prepared, tmp_path / "run", source, options=(option,)), data)


def test_steps_of_another_size_worked_by_hand():
    last_step, interval = np.array([[0, 1, 6, 10]]), np.array([[1.0, 2.5, 1.2, 4.0]])
    step, last, mean = in_steps_of_the_trainer(10, last_step, interval, 0.5)  # larger batches
    assert (int(step), last.tolist()) == (5, [[0, 1, 3, 5]])  # 9, 4 and 0 steps → 4, 2 and 0
    np.testing.assert_allclose(mean, [[1, 1.25, 1, 2]])
    step, last, mean = in_steps_of_the_trainer(10, last_step, interval, 4.0)
    assert (int(step), last.tolist()) == (40, [[0, 4, 24, 40]])
    np.testing.assert_allclose(mean, [[1, 10, 4.8, 16]])


def test_a_stream_by_time_comes_in_steps_of_the_trainer(prepared, log, tmp_path):
    """2002 rows in 2002 seconds: 20 rows a step, but for the last one."""
    estimate(log, tmp_path / "stream", step_seconds=20)
    _, model = started(
        config_for(prepared, tmp_path / "run", f"streaming:{tmp_path / 'stream'}"),
        open_data(prepared),
    )
    step, last_step, interval, _ = arrays_of(tmp_path / "stream" / "00000001")
    ratio = 2002 / 101 / BATCH
    estimates = model.method.estimates
    assert int(estimates.step) == round(101 * ratio)
    touched = last_step.reshape(-1) > 0
    expected = np.maximum(interval.reshape(-1) * ratio, 1)[touched]
    np.testing.assert_allclose(estimates.interval.numpy()[touched], expected, rtol=1e-6)
    gaps = int(estimates.step) - estimates.last_step.numpy()[touched]
    assert np.abs(gaps - (step - last_step.reshape(-1)[touched]) * ratio).max() <= 0.5
    assert (estimates.interval.numpy()[~touched] == 1).all()


def interrupt_after(steps, monkeypatch):
    original = RunRecorder.on_train_batch_end

    def on_train_batch_end(self, batch, logs=None):
        original(self, batch, logs)
        if int(self.model.iteration) == steps:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunRecorder, "on_train_batch_end", on_train_batch_end)


@pytest.mark.parametrize("steps", [3, pytest.param(1, marks=pytest.mark.long)])
def test_going_on_needs_no_stream(prepared, snapshots, whole, tmp_path, monkeypatch, steps):
    """A run that ends before or behind a checkpoint; the stream has gone on, then it is gone."""
    stream = tmp_path / "stream"
    shutil.copytree(snapshots, stream)
    source = f"streaming:{stream}"
    with monkeypatch.context() as patch:
        interrupt_after(steps, patch)
        minutes = 1e-9 if steps > 1 else 60
        with pytest.raises(KeyboardInterrupt):
            train(config_for(prepared, tmp_path / "cut", source, checkpoint_minutes=minutes))
    assert (tmp_path / "cut" / "training.json").exists() == (steps > 1)
    shutil.copytree(stream / "00000001", stream / "00000002")
    interval = np.load(stream / "00000002" / schema.STREAMING_INTERVAL)
    np.save(stream / "00000002" / schema.STREAMING_INTERVAL, interval * 7)
    shutil.rmtree(stream / "00000001")
    train(config_for(prepared, tmp_path / "cut", source))
    expected, cut = checkpoint_of(whole), checkpoint_of(tmp_path / "cut")
    assert expected.keys() == cut.keys()
    for name, values in expected.items():
        assert values.tobytes() == cut[name].tobytes(), name
    shutil.rmtree(stream)
    record = json.loads((tmp_path / "cut" / "config.json").read_text())["configuration"]
    assert record["frequency"] == f"streaming:{stream / '00000001'}"
    evaluate_run(EvaluateConfig(data=str(prepared), run=str(tmp_path / "cut")))


class AtTheEnd(tf_keras.callbacks.Callback):
    """Calls a function after the first epoch, and keeps the estimates before each one's steps."""

    def __init__(self, function):
        super().__init__()
        self.function, self.begun = function, []

    def on_epoch_begin(self, epoch, logs=None):
        state = self.model.method.estimates
        self.begun.append((int(state.step), state.interval.numpy().reshape(5, -1)))

    def on_epoch_end(self, epoch, logs=None):
        if epoch == 0:
            self.function()


@pytest.mark.long
def test_each_epoch_begins_with_the_newest_snapshot(prepared, log, tmp_path, caplog):
    """One that `--watch` writes while the run trains; then the stream begins anew elsewhere."""
    source, stream = tmp_path / "log", tmp_path / "stream"
    source.mkdir()
    rows = pq.read_table(log)
    pq.write_table(rows.slice(0, 1000), source / "a.parquet")
    watch = {"watch": True, "step_seconds": BATCH, "max_polls": 1}
    estimate(source, stream, **watch)

    def arrive():
        pq.write_table(rows.slice(1000), source / "b.parquet")
        estimate(source, stream, **watch)

    epochs = AtTheEnd(arrive)
    config = config_for(prepared, tmp_path / "run", f"streaming:{stream}", epochs=2)
    train(config, [epochs])
    snapshots = [stream / "00000001", stream / "00000002"]
    for (step, interval), snapshot in zip(epochs.begun, snapshots, strict=True):
        ratio = schema.read_snapshot(snapshot).details["rows_per_step"] / BATCH
        expected = in_steps_of_the_trainer(*arrays_of(snapshot)[:3], ratio)
        assert step == expected[0]
        np.testing.assert_array_equal(interval, expected[2].astype(np.float32))
    estimate(source, stream, **watch, overwrite=True, num_hashes=4)
    other = AtTheEnd(lambda: None)
    train(dataclasses.replace(config, epochs=4), [other])
    assert "begins with the snapshot before it: num_hashes must be 4" in caplog.text
    for old, before in other.begun:
        assert old == step
        np.testing.assert_array_equal(before, interval)


def test_another_stream_is_another_run(prepared, snapshots, whole, tmp_path):
    shutil.copytree(snapshots, tmp_path / "other")
    run = shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(ValueError, match=r"frequency .*snapshots/00000001.*other/00000001"):
        train(config_for(prepared, run, f"streaming:{tmp_path / 'other'}"))
    with pytest.raises(ValueError, match="holds a run with another configuration"):
        train(config_for(prepared, run, f"streaming:{snapshots}", method="ssl_pop"))
    train(config_for(prepared, run, "counts", overwrite=True))
    assert not (run / "frequency.npz").exists()


# --- other methods --------------------------------------------------------------------------


def test_other_methods_start_from_a_stream(prepared, snapshots, tmp_path):
    """p = 1 / max b of each candidate, with its open interval; the rarest where it never came."""
    data = open_data(prepared)
    config = config_for(prepared, tmp_path / "run", f"streaming:{snapshots}", method="bmns")
    _, model = started(config, data)
    _, last_step, *_ = arrays = arrays_of(snapshots / "00000001")
    interval = with_open_intervals(*arrays)
    expected, seen = [], []
    for raw in data.candidate_vocabulary.raw_ids.to_pylist():
        prints = np.array([hashing.fingerprint(raw)])
        buckets = hashing.hash_buckets(prints, num_buckets=211, num_hashes=5)[0].tolist()
        expected.append(1 / max(interval[h, bucket] for h, bucket in enumerate(buckets)))
        seen.append(all(last_step[h, bucket] > 0 for h, bucket in enumerate(buckets)))
    assert 0 < seen.count(False) <= 5
    least = min(p for p, was in zip(expected, seen, strict=True) if was)
    expected = np.array([p if was else least for p, was in zip(expected, seen, strict=True)])
    frequency = model.method.frequency
    assert frequency.sum() == pytest.approx(data.num_rows("train"))
    np.testing.assert_allclose(frequency / frequency.sum(), expected / expected.sum())
    assert np.corrcoef(frequency, data.train_counts)[0, 1] > 0.5  # the log is like the data
    np.testing.assert_array_equal(data.train_counts, open_data(prepared).train_counts)


def test_counts_of_a_log(prepared, log, tmp_path):
    data = open_data(prepared)
    raw_ids = data.candidate_vocabulary.raw_ids.to_pylist()
    absent = [raw for raw, rows in zip(raw_ids, data.train_counts, strict=True) if rows == 0]
    items = [raw for place, raw in enumerate(raw_ids) for _ in range(place % 4 + 1)]
    items = [raw for raw in items if raw not in absent] + ["elsewhere"] * 9
    source = write_log(tmp_path / "counted.parquet", items)
    frequencies(FrequenciesConfig(source=source, output=str(tmp_path / "counts")), [])
    config = config_for(
        prepared, tmp_path / "run", f"counts:{tmp_path / 'counts'}", method="ssl_pop"
    )
    _, model = started(config, data)
    expected = [0 if raw in absent else place % 4 + 1 for place, raw in enumerate(raw_ids)]
    assert model.method.frequency.tolist() == expected
    assert train(config)["finished"]
    frequencies(FrequenciesConfig(source=log, output=str(tmp_path / "few")), [])
    config = config_for(prepared, tmp_path / "few-run", f"counts:{tmp_path / 'few'}", method="bmns")
    with pytest.raises(ValueError, match=rf"such as '{raw_ids[-5]}'.* count a log that holds"):
        train(config)
    assert not (tmp_path / "few-run").exists()


@pytest.mark.parametrize("kind", [pytest.param("counts", marks=pytest.mark.long), "streaming"])
def test_a_run_is_opened_with_the_counts_that_it_was_trained_with(
    prepared, log, snapshots, tmp_path, kind
):
    """Lengths of embeddings and what the method corrects by, wherever the run has gone since."""
    data, trained, source = open_data(prepared), {}, tmp_path / "source"
    if kind == "counts":
        raw_ids = data.candidate_vocabulary.raw_ids.to_pylist()
        items = [raw for place, raw in enumerate(raw_ids) for _ in range(place % 4 + 1)]
        frequencies(
            FrequenciesConfig(
                source=write_log(tmp_path / "log.parquet", items), output=str(source)
            ),
            [],
        )
    else:
        shutil.copytree(snapshots, source)
    keep = tf_keras.callbacks.LambdaCallback(
        on_train_end=lambda logs: trained.update(model=keep.model)
    )
    settings = {"method": "ssl_pop", "normalize": True, "popularity_power": 0.5}
    config = config_for(prepared, tmp_path / "run", f"{kind}:{source}", **settings)
    train(config, [keep])
    shutil.rmtree(source)
    assert train(config)["finished"]  # it goes on with the counts that it has kept
    (tmp_path / "run").rename(tmp_path / "moved")
    model, _ = open_run(tmp_path / "moved", data)
    expected = trained["model"]
    assert np.array_equal(model.candidate_embeddings(), expected.candidate_embeddings())
    np.testing.assert_array_equal(model.method.frequency, expected.method.frequency)
    config = AuditConfig(str(prepared), str(tmp_path / "moved"), methods=("ssl_pop",), k=5)
    assert "ssl_pop" in audit(config)["methods"]
    (tmp_path / "moved" / "frequency.npz").unlink()
    with pytest.raises(ValueError, match=r"frequency.npz is missing: put it back"):
        open_run(tmp_path / "moved", data)


# --- mistakes -------------------------------------------------------------------------------


def without_weights(snapshot, output):
    """A snapshot as it was made before there were weights."""
    shutil.copytree(snapshot, output)
    (output / schema.STREAMING_WEIGHT).unlink()
    manifest = json.loads((output / schema.MANIFEST).read_text())
    del manifest["files"][schema.STREAMING_WEIGHT]
    (output / schema.MANIFEST).write_text(json.dumps(manifest))
    return output


def test_an_old_snapshot_is_refused(prepared, snapshots, log, tmp_path):
    old = without_weights(snapshots / "00000001", tmp_path / "old")
    with pytest.raises(ValueError, match=r"has no weight.npy: an older twotower made it"):
        started(config_for(prepared, tmp_path / "run", f"streaming:{old}"), open_data(prepared))
    with pytest.raises(ValueError, match=r"has no weight.npy.*make it again from its log"):
        estimate(log, tmp_path / "out", previous=str(old))


def test_mistakes_are_one_line(prepared, snapshots, tmp_path, capsys):
    other = write_log(tmp_path / "log.parquet", ["a", "b"])
    estimate(other, tmp_path / "other", num_buckets=10_007)
    flags = ["train", "--data", str(prepared), "--run", str(tmp_path / "run"), "--epochs", "1"]
    for frequency, method, expected in (
        ("streming:x", "correct_sfx", "must be counts, counts:DIR or streaming:DIR"),
        ("streaming:", "correct_sfx", "must be counts, counts:DIR or streaming:DIR"),
        (f"streaming:{tmp_path}", "correct_sfx", "no finished streaming_frequency data"),
        (f"streaming:{prepared}", "ssl_pop", "'prepared' directory"),
        (f"counts:{snapshots}", "ssl_pop", "no finished frequencies data"),
        (f"counts:{snapshots}", "correct_sfx", "correct_sfx estimates frequencies by itself"),
        (f"streaming:{tmp_path / 'other'}", "correct_sfx", "candidates of the data was in the"),
    ):
        arguments = [*flags, "--method", method, "--frequency", frequency, "--batch_size", "32"]
        assert twotower.main(arguments) == 2
        error = capsys.readouterr().err.strip()
        assert expected in error, error
        assert "\n" not in error
    assert not (tmp_path / "run").exists()
