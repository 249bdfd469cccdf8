"""Finds model versions, checks that they are whole, and loads their SavedModels."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import tensorflow as tf

from pipeline.contract import schema
from pipeline.contract.files import check_files
from serving.version.index import import_scann
from serving.version.names import MAX_VERSION

EXTRAS = Path("assets.extra")  # what TensorFlow Serving carries along but does not load
SCANN_MODEL = EXTRAS / "scann"
RETRIEVAL = EXTRAS / "retrieval"
ANN_REPORT = "ann_report.json"
ANN_PLOT = "ann_report.png"
MODEL_CARD = "model_card.md"


@dataclasses.dataclass(frozen=True)
class Version:
    """One finished model version on disk."""

    number: int
    path: Path
    manifest: schema.Manifest

    @property
    def has_scann(self) -> bool:
        """Whether it was published with a ScaNN index."""
        return (self.path / SCANN_MODEL).is_dir()

    def load(self, index: str) -> Any:
        """Loads the SavedModel of an index, "exact" or "scann".

        Raises:
          ValueError: the version has no ScaNN index, or scann cannot be imported.
        """
        if index == "exact":
            return tf.saved_model.load(str(self.path))
        if not self.has_scann:
            raise ValueError(
                f"index 'scann' was asked of version {self.number}, which was published without "
                "one: use index 'exact' or export again with scann installed."
            )
        if import_scann() is None:  # its operations must be known before the graph is read
            raise ValueError(
                "index 'scann' needs the package scann, which cannot be imported here: "
                "install twotower[serve] or use index 'exact'."
            )
        return tf.saved_model.load(str(self.path / SCANN_MODEL))


def find_version(models: str | Path, name: str, version: int = 0) -> Version:
    """The newest version of a model, or the one that is asked for.

    Args:
      models: the directory of all models.
      name: the model, a directory in it.
      version: its number; 0 for the newest that is finished.

    Raises:
      ValueError: there is none, its format is newer than this program, or files are damaged.
    """
    home = Path(models) / name
    numbered = numbered_directories(home)
    finished = {n: path for n, path in numbered.items() if (path / schema.MANIFEST).is_file()}
    if not finished:
        raise ValueError(
            f"{home} holds no model version: make one with `twotower export --models {models}`."
        )
    number = version or max(finished)
    if number not in finished:
        there = ", ".join(str(n) for n in sorted(finished))
        raise ValueError(f"version {number} of {home} does not exist; there are: {there}.")
    manifest = schema.read_manifest(finished[number], "version")
    check_files(finished[number], manifest.files)
    return Version(number, finished[number], manifest)


def numbered_directories(home: Path) -> dict[int, Path]:
    """Directories whose name is an int64, finished or not; {} where `home` is missing.

    Of "7" and "007" the first is meant.
    """
    if not home.is_dir():
        return {}
    return {
        int(path.name): path
        for path in sorted(home.iterdir())
        if path.name.isascii() and path.name.isdecimal() and path.is_dir()
        if int(path.name) <= MAX_VERSION
    }
