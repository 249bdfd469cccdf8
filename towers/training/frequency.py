"""How often candidates occur, for the method: by the train split, by a log, or by a stream.

A run keeps what it began with in `frequency.npz`: it goes on with that, whatever has become of the
log's counts or of the stream in the meantime. Only with correct_sfx and a directory of snapshots it
takes, and keeps, the newest one at each epoch.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.contract import hashing, schema, stores
from pipeline.contract.files import is_remote, written_aside
from samplers.methods.by_name import METHODS
from samplers.methods.in_batch import CorrectSfx
from samplers.methods.method import Method
from towers.data.interactions import RetrievalData, find_ids
from towers.training.run_directory import CONFIG, FREQUENCY, read_json
from towers.training.settings import TrainConfig

log = logging.getLogger(__name__)


class Frequency(dict[str, Any]):
    """What a method starts from, as `frequency.npz` keeps it; empty where the train split says it.

    Else `counts`, float64 [N] by dense id; or the state of a stream in steps of the trainer, the
    start of correct_sfx: `step` int64, `last_step` int64 [A, H], `interval` and `weight` float64
    [A, H], `alpha` float64.

    `directory` is that of the snapshots, where each epoch begins with the newest.
    """

    directory = ""

    def counted(self, data: RetrievalData) -> RetrievalData:
        """The data as the method shall see them: with these counts for its train rows."""
        return data.with_counts(self["counts"]) if "counts" in self else data

    def start(self, method: Method) -> None:
        """Gives the state of the stream to a new method."""
        if "last_step" in self:
            assert isinstance(method, CorrectSfx)
            arrays = {name: self[name] for name in ("last_step", "interval", "weight")}
            method.estimates.assign(step=int(self["step"]), **arrays)

    def keep(self, run: str) -> None:
        """Writes it into the directory of its run."""
        path = Path(run) / FREQUENCY
        if not self:
            path.unlink(missing_ok=True)  # of a run that was overwritten
            return
        with written_aside(path) as aside, open(aside, "wb") as file:
            np.savez_compressed(file, **self)

    def read(self, run: str) -> None:
        """Takes what `keep` wrote."""
        with np.load(Path(run) / FREQUENCY) as arrays:
            self.update(arrays)

    def renew(self, config: TrainConfig, data: RetrievalData) -> None:
        """Keeps the newest snapshot of the directory, if it can be read and has the same sizes."""
        try:
            source = newest_snapshot(self.directory)
            stream = _of_stream(source, data, config.batch_size)
            _with_sizes(config, stream)
            stream.keep(config.run)
            log.info("train: an epoch begins with %s", source)
        except (OSError, ValueError) as error:
            log.warning("train: an epoch begins with the snapshot before it: %s", error)


def newest_snapshot(source: str) -> str:
    """The newest snapshot of a directory of them, or the path itself."""
    if is_remote(source):
        return stores.newest(source)
    return str([Path(source), *schema.snapshot_directories(source)][-1])


def open_frequency(config: TrainConfig, data: RetrievalData) -> tuple[TrainConfig, Frequency]:
    """What `config.frequency` names, from the run itself where it has begun.

    Returns:
      The settings with all that the source decides: the snapshot itself where a directory of
      them was named, and the sizes and alpha of correct_sfx among its options; and the start.

    Raises:
      ValueError: there is nothing of that kind, it knows none of the candidates, the method has
        no use for it, or an option differs from that of the stream.
    """
    kind, _, path = config.frequency.partition(":")
    if not path:
        return config, Frequency()
    streams = METHODS.get(config.method) is CorrectSfx
    if kind == "counts" and streams:
        raise ValueError(
            "correct_sfx estimates frequencies by itself, got counts: use --frequency "
            "streaming:PATH, or another --method."
        )
    source = given = path.rstrip("/") if is_remote(path) else os.path.abspath(path)
    run, begun = Path(config.run), ""
    if not config.overwrite and (run / CONFIG).exists():
        begun = read_json(run / CONFIG)["configuration"]["frequency"]
    if kind == "streaming":  # of snapshots the one that the run began with, or else the newest
        before = begun.removeprefix("streaming:")
        if before and source in (before, os.path.dirname(before)):
            source = before
        else:
            source = newest_snapshot(source)
    config = dataclasses.replace(config, frequency=f"{kind}:{source}")
    frequency = Frequency()
    if begun == config.frequency and (run / FREQUENCY).exists():
        frequency.read(config.run)
    if ("weight" if streams else "counts") not in frequency:
        if kind == "counts":
            frequency = Frequency(counts=_counts_of_log(source, data))
        else:
            frequency = _of_stream(source, data, config.batch_size if streams else None)
    if streams and source != given:
        frequency.directory = given
    return (_with_sizes(config, frequency) if streams else config), frequency


def _with_sizes(config: TrainConfig, stream: Frequency) -> TrainConfig:
    """The settings with the options that a stream decides; a ValueError where one differs."""
    num_hashes, num_buckets = stream["last_step"].shape
    alpha, given = float(stream["alpha"]), config.method_options
    sizes = {"num_buckets": num_buckets, "num_hashes": num_hashes, "alpha": alpha}
    for name, value in sizes.items():
        try:
            same = float(given.get(name, value)) == value
        except ValueError:
            same = False
        if not same:
            raise ValueError(
                f"{name} must be {value}, as in {config.frequency}, got {given[name]}: leave it "
                "out of --options."
            )
    missing = tuple(f"{name}={value!r}" for name, value in sizes.items() if name not in given)
    return dataclasses.replace(config, options=(*config.options, *missing))


def _of_stream(source: str, data: RetrievalData, batch_size: int | None) -> Frequency:
    """The state of a stream in steps of `batch_size` rows; without one, counts from it.

    The estimate of a candidate, 1 / max_h b_h, is the probability that a step of the stream holds
    it; the steps since its last one belong to b as well, or what came once, early, would look
    frequent. Counts are in proportion to it and add up to the train rows. A candidate whose bucket
    in some array is untouched never was in the stream: it gets the smallest of the estimates.
    """
    directory = stores.local_copy(source)
    manifest = schema.read_snapshot(directory)
    names = (schema.STREAMING_LAST_STEP, schema.STREAMING_INTERVAL, schema.STREAMING_WEIGHT)
    last_step, interval, weight = (np.load(directory / name) for name in names)
    step, alpha = manifest.details["step"], manifest.configuration["alpha"]
    num_hashes, num_buckets = last_step.shape
    buckets = hashing.hash_buckets(
        data.candidate_vocabulary.fingerprints, num_buckets=num_buckets, num_hashes=num_hashes
    )
    arrays = np.arange(num_hashes)
    seen = (last_step[arrays, buckets] > 0).all(axis=1)
    if not seen.any():
        raise ValueError(
            f"none of the {len(seen)} candidates of the data was in the stream of {source}: make "
            "both from the same raw ids."
        )
    log.info("train: %d of %d candidates were in the stream", seen.sum(), len(seen))
    if batch_size is not None:
        ratio = manifest.details["rows_per_step"] / batch_size
        state = in_steps_of_the_trainer(step, last_step, interval, ratio)
        names = ("step", "last_step", "interval")
        return Frequency(zip(names, state, strict=True), weight=weight, alpha=np.array(alpha))
    interval = interval + alpha / np.where(weight > 0, weight, 1) * (step - last_step)
    estimates = 1 / interval[arrays, buckets].max(axis=1)
    estimates[~seen] = estimates[seen].min()
    return Frequency(counts=estimates * (data.num_rows("train") / estimates.sum()))


def in_steps_of_the_trainer(
    step: int, last_step: np.ndarray, interval: np.ndarray, ratio: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The state of a stream whose steps hold `ratio` times the rows of a step of the trainer.

    An interval of b steps is one of b · ratio steps, but never less than one; and so is the time
    since the last step of a bucket. This takes rows as spread evenly over time, so it is an
    approximation, but where the steps are equal: then nothing changes. A bucket that the stream
    never touched stays as at the start, a = 0 and b = 1.

    Arguments are t; a, int64 [A, H]; b, float64 [A, H]; and the ratio, above 0.
    """
    if ratio == 1:
        return np.array(step), last_step, interval
    now = round(step * ratio)
    since = np.rint((step - last_step) * ratio).astype(np.int64)
    touched = last_step > 0
    return (
        np.array(now),
        np.where(touched, np.maximum(now - since, 0), 0),
        np.where(touched, np.maximum(interval * ratio, 1), 1.0),
    )


def _counts_of_log(source: str, data: RetrievalData) -> np.ndarray:
    """The counts of a log by dense id, float64 [N]; 0 for candidates that it does not hold."""
    directory = stores.local_copy(source)
    manifest = schema.read_manifest(directory, "frequencies")
    columns = [schema.FINGERPRINT, schema.COUNT]
    paths = [directory / name for name in manifest.files_of(schema.FREQUENCIES)]
    table = pa.concat_tables([pq.read_table(path, columns=columns) for path in paths])
    prints, counts = (table[name].to_numpy() for name in columns)
    places, known = find_ids(data.candidate_vocabulary.fingerprints, prints)
    by_id = np.zeros(len(places))
    by_id[known] = counts[places[known]]
    uncounted = np.flatnonzero((by_id == 0) & (data.train_counts > 0))
    if len(uncounted):
        raise ValueError(
            f"{len(uncounted)} candidates have train rows and no count in {source}, such as "
            f"{data.candidate_vocabulary.raw_ids[uncounted[0]].as_py()!r}: their log_q would be "
            "that of what never occurs; count a log that holds the train rows."
        )
    return by_id
