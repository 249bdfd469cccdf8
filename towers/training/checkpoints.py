"""Checkpoints of a run: all that is needed to go on as if nothing had happened."""

from __future__ import annotations

import json
import logging
import math
import shutil
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
_REMEMBERED = ["seconds", "epoch_seconds", "history", "best", "waited", "stopped", "configuration"]


class Progress(tf.train.experimental.PythonState):
    """What a run remembers beside its variables; part of every checkpoint.

    Attributes:
      seconds: spent in training steps, over all resumes.
      epoch_seconds: the same for the epoch that is under way.
      history: one dict for each finished epoch: epoch (from 1), loss, seconds, metrics.
      best: the epoch (from 1) with the best validation metric, 0 for none, and its value.
      waited: epochs since then.
      stopped: whether `patience` has ended the run.
      configuration: the settings that no resume may change.
    """

    def __init__(self, configuration: dict[str, Any]) -> None:
        self.configuration = configuration
        self.seconds = self.epoch_seconds = 0.0
        self.history: list[dict[str, float]] = []
        self.best: tuple[int, float] = (0, -math.inf)
        self.waited, self.stopped = 0, False

    def serialize(self) -> str:
        """The attributes as JSON."""
        return json.dumps({name: getattr(self, name) for name in _REMEMBERED})

    def deserialize(self, string_value: str | bytes) -> None:
        """Sets the attributes from JSON."""
        for name, value in json.loads(string_value).items():
            setattr(self, name, value)


class RunRecorder(tf_keras.callbacks.Callback):
    """Writes checkpoints and training.json, and stops a run that no longer gets better.

    Args:
      config: the settings of the run.
      model: compiled, its optimizer built.
      steps_per_epoch: batches of an epoch.
      chief: whether this process writes; the others follow, and restore what it wrote.
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
        self._mean_loss = model.mean_loss
        self._best = tf.train.Checkpoint(model=model, progress=self.progress)
        self._interrupted_loss: list[Any] | None = None
        self._clock = self._saved = time.monotonic()

    def restore(self) -> bool:
        """Goes to the last checkpoint that can be read, if there is one.

        Raises:
          ValueError: there are some, and none can be read.
        """
        self._sweep()
        last = self._manager.checkpoints
        for path in reversed(last):
            try:
                check_checkpoint(path, self._config)
                self._checkpoint.restore(path).assert_existing_objects_matched()
            except UNREADABLE as error:
                log.warning("train: %s cannot be read: %s", path, str(error).splitlines()[0])
                continue
            self._interrupted_loss = [variable.numpy() for variable in self._mean_loss.variables]
            return True
        if last:
            raise ValueError(
                f"no checkpoint in {self._directory} can be read: begin again with --overwrite."
            )
        return False

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Starts the clock; goes on with the mean loss of an epoch that was interrupted."""
        if self._interrupted_loss is not None and int(self.model.iteration.numpy()) % self._steps:
            for variable, value in zip(
                self._mean_loss.variables, self._interrupted_loss, strict=True
            ):
                variable.assign(value)
        self._interrupted_loss = None
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
        """Takes the metrics into the history, looks at patience, writes a checkpoint."""
        progress = self.progress
        metrics = {name: float(value) for name, value in (logs or {}).items()}
        seconds = progress.epoch_seconds
        progress.history.append({"epoch": epoch + 1, "seconds": round(seconds, 3)} | metrics)
        progress.seconds, progress.epoch_seconds = progress.seconds + seconds, 0.0
        if self._config.patience:
            self._look_at_patience(epoch + 1, metrics[f"val_{self._config.validation_metric}"])
        self.save()
        for path in self._directory.glob("best-*") if self._chief else ():
            if path.name.split(".")[0] != f"best-{progress.best[0]}":
                path.unlink()

    def _look_at_patience(self, epoch: int, value: float) -> None:
        progress = self.progress
        if value > progress.best[1]:
            progress.best, progress.waited = (epoch, value), 0
            if self._chief:
                self._best.write(str(self._directory / f"best-{epoch}"))
        else:
            progress.waited += 1
        progress.stopped = progress.waited >= self._config.patience
        self.model.stop_training = progress.stopped

    def save(self) -> None:
        """Writes a checkpoint, then the record that names it; both as a whole or not at all."""
        if not self._chief:
            return
        steps = int(self._checkpoint.model.iteration.numpy())
        try:
            path = self._manager.save(checkpoint_number=steps)
            write_json(Path(self._config.run) / TRAINING, self.summary(Path(path).name))
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

    def summary(self, checkpoint: str = "") -> dict[str, Any]:
        """What training.json says; `checkpoint` is the last one by default."""
        progress = self.progress
        steps = int(self._checkpoint.model.iteration.numpy())
        best_epoch = progress.best[0]
        last = checkpoint or Path(self._manager.latest_checkpoint or "").name
        return {
            "finished": progress.stopped or steps >= self._config.epochs * self._steps,
            "stopped_early": progress.stopped,
            "steps": steps,
            "epochs": len(progress.history),
            "best_epoch": best_epoch or None,
            "weights": f"best-{best_epoch}" if best_epoch else last,
            "seconds": round(progress.seconds + progress.epoch_seconds, 3),
            "history": progress.history,
        }
