"""Checkpoints of a run: all that is needed to go on as if nothing had happened."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import tensorflow as tf

from towers.legacy_keras import tf_keras
from towers.model.two_tower import TwoTower
from towers.training.run_directory import (
    CHECKPOINTS,
    CONFIG,
    TRAINING,
    UNREADABLE,
    check_checkpoint,
    fixed_settings,
    write_json,
)
from towers.training.settings import TrainConfig

log = logging.getLogger(__name__)

_KEPT = 2  # checkpoints: the last one, and one more in case it cannot be read


@dataclasses.dataclass(eq=False)
class Progress(tf.train.experimental.PythonState):
    """What a run remembers beside its variables; part of every checkpoint."""

    configuration: dict[str, Any]  # the settings that no resume may change
    seconds: float = 0.0  # spent in training steps, over all resumes
    epoch_seconds: float = 0.0  # the same for the epoch that is under way
    # of each finished epoch: epoch (from 1), loss, seconds, metrics
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)
    best: tuple[int, float] = (0, -math.inf)  # the best epoch (0 for none), and its value
    waited: int = 0  # epochs since then
    stopped: bool = False  # by `patience`
    compiled: bool | None = None  # steps by XLA; None before the first checkpoint

    def serialize(self) -> str:
        return json.dumps({name: getattr(self, name) for name in self.__dataclass_fields__})

    def deserialize(self, string_value: str | bytes) -> None:
        for name, value in json.loads(string_value).items():
            setattr(self, name, value)


class RunRecorder(tf_keras.callbacks.Callback):
    """Writes checkpoints and training.json, and stops a run that no longer gets better.

    The optimizer of the model is built. Of several processes only the `chief` writes; the others
    follow, and restore what it wrote.
    """

    _supports_tf_logs = True  # spares a copy of the loss to the host at every step

    def __init__(
        self, config: TrainConfig, model: TwoTower, steps_per_epoch: int, *, chief: bool = True
    ) -> None:
        super().__init__()
        self._chief = chief
        self.progress = Progress(fixed_settings(config))
        self._config, self._steps = config, steps_per_epoch
        self._directory = Path(config.run) / CHECKPOINTS
        self._checkpoint = tf.train.Checkpoint(model=model, progress=self.progress)
        # A variable, which workers can only make together; the first save is the chief's alone.
        assert self._checkpoint.save_counter is not None
        self._manager = tf.train.CheckpointManager(
            self._checkpoint, str(self._directory), max_to_keep=_KEPT
        )
        self._interrupted_loss: list[Any] = []
        self._clock = self._saved = time.monotonic()

    def restore(self) -> bool:
        """Goes to the last checkpoint that can be read; a ValueError where none of some can."""
        self._sweep()
        last = self._manager.checkpoints
        for path in reversed(last):
            try:
                check_checkpoint(path, self._config)
                self._checkpoint.restore(path).assert_existing_objects_matched()
            except UNREADABLE as error:
                log.warning("train: %s cannot be read: %s", path, str(error).splitlines()[0])
                continue
            model = self._checkpoint.model
            self._interrupted_loss = model.mean_loss.get_weights()
            if self.progress.compiled is not None and self._config.jit_compile is None:
                model.compiled = self.progress.compiled
                model.make_step()
            return True
        if last:
            raise ValueError(
                f"no checkpoint in {self._directory} can be read: begin again with --overwrite."
            )
        return False

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Starts the clock; goes on with the mean loss of an epoch that was interrupted."""
        if self._interrupted_loss and int(self.model.iteration.numpy()) % self._steps:
            self.model.mean_loss.set_weights(self._interrupted_loss)
        self._interrupted_loss = []
        self._clock = time.monotonic()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Writes a checkpoint when it is time, except where the end of the epoch will."""
        now = time.monotonic()
        self.progress.epoch_seconds += now - self._clock
        due = now - self._saved >= 60 * self._config.checkpoint_minutes
        if due and int(self.model.iteration.numpy()) % self._steps:
            self.save()
        self._clock = time.monotonic()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Takes the metrics into the history and a log, looks at patience, writes a checkpoint."""
        progress = self.progress
        metrics = {name: float(value) for name, value in (logs or {}).items()}
        seconds = progress.epoch_seconds
        progress.history.append({"epoch": epoch + 1, "seconds": round(seconds, 3)} | metrics)
        progress.seconds, progress.epoch_seconds = progress.seconds + seconds, 0.0
        if self._chief and not sys.stdout.isatty():  # a terminal shows a progress bar
            names = {"loss", f"val_{self._config.validation_metric}"} & metrics.keys()
            values = ", ".join(f"{name} {metrics[name]:.4f}" for name in sorted(names))
            of_all = f"epoch {epoch + 1} of {self._config.epochs}, {seconds:.0f} s"
            print(f"{of_all}: {values}", flush=True)
        if self._config.patience:
            value = metrics[f"val_{self._config.validation_metric}"]
            progress.waited += 1
            if value > progress.best[1]:
                progress.best, progress.waited = (epoch + 1, value), 0
                if self._chief:
                    self._checkpoint.write(str(self._directory / f"best-{epoch + 1}"))
            progress.stopped = progress.waited >= self._config.patience
            self.model.stop_training = progress.stopped
        self.save()
        for path in self._directory.glob("best-*") if self._chief else ():
            if path.name.split(".")[0] != f"best-{progress.best[0]}":
                path.unlink()

    def save(self) -> None:
        """Writes a checkpoint, then the record that names it; both as a whole or not at all."""
        if not self._chief:
            return
        steps = int(self._checkpoint.model.iteration.numpy())
        self.progress.compiled = self._checkpoint.model.compiled
        try:
            self._manager.save(checkpoint_number=steps)
            write_json(Path(self._config.run) / TRAINING, self.summary())
        except BaseException:
            self._sweep()
            raise
        self._saved = time.monotonic()

    def _sweep(self) -> None:
        """Removes what was half written when a process was killed or a disk was full."""
        if not self._chief:
            return
        kept = {Path(path).name for path in self._manager.checkpoints}
        for path in self._directory.glob("ckpt-*"):
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name.split(".")[0] not in kept:
                path.unlink()
        for name in (TRAINING, CONFIG):
            for path in Path(self._config.run).glob(f".{name}.*"):
                path.unlink()

    def summary(self) -> dict[str, Any]:
        """What training.json says."""
        progress = self.progress
        steps = int(self._checkpoint.model.iteration.numpy())
        best_epoch = progress.best[0]
        last = Path(self._manager.latest_checkpoint or "").name
        return {
            "finished": progress.stopped or steps >= self._config.epochs * self._steps,
            "stopped_early": progress.stopped,
            "steps": steps,
            "epochs": len(progress.history),
            "best_epoch": best_epoch or None,
            "weights": f"best-{best_epoch}" if best_epoch else last,
            "seconds": round(progress.seconds + progress.epoch_seconds, 3),
            "compiled": self._checkpoint.model.compiled,
            "history": progress.history,
        }
