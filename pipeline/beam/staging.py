"""Where a running preparation keeps what it has so far, and how that becomes the output.

The job is a few Beam pipelines in a row, because a k-core repeats until nothing changes and Beam
has no loops. Blocks pass from one to the next through files in `<output>.partial`, which every
worker must see; for an output in a store, it lies in the cache of this machine. The directory is
renamed into place, or uploaded, when it is complete.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from apache_beam.options.pipeline_options import PipelineOptions

from pipeline.beam.accounting import AccountingError
from pipeline.contract import stores
from pipeline.contract.files import held, write_atomically, written_aside

_PARSING = threading.Lock()


class Staging:
    """A context: `<output>.partial` while it is open; nothing of it when it ends early.

    It refuses to begin where another preparation of the output runs, and where the output is a
    directory of something else. It removes what a killed preparation left, even where it finds the
    output finished. `options` are those of Beam, for the pipelines that run meanwhile.
    """

    def __init__(
        self, output: str, overwrite: bool, options: PipelineOptions | None = None
    ) -> None:
        self.options = options
        self.output = output
        self.destination = stores.local_place(output)
        self.root = self.destination.with_name(self.destination.name + ".partial")
        self.out = self.root / "out"  # becomes the output
        self._overwrite = overwrite
        self._held = contextlib.ExitStack()

    def __enter__(self) -> Staging:
        refused = not self._overwrite and stores.exists(self.output)
        lock = self.root.with_name(self.root.name + ".lock")
        with contextlib.ExitStack() as stack:
            if not refused or lock.exists():  # what a killed one left goes in any case
                message = f"another preparation of {self.output} is running; wait for it, "
                message += "or choose another --output."
                stack.enter_context(held(lock, message))
                shutil.rmtree(self.root, ignore_errors=True)
            if refused:
                raise ValueError(
                    f"{self.output} already exists; choose another --output, or --overwrite it."
                )
            if self.destination.exists() and not _is_replaceable(self.destination):
                raise ValueError(
                    f"{self.output} holds something else than an output, which --overwrite would "
                    "remove; choose another --output."
                )
            self.out.mkdir(parents=True)
            stack.callback(shutil.rmtree, self.root, ignore_errors=True)
            self._held = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()

    def stage(self, name: str) -> Path:
        """The directory of one step's files, made when it is asked for first."""
        path = self.root / name
        path.mkdir(exist_ok=True)
        return path

    def sweep(self) -> None:
        """Removes what workers that were killed have half written."""
        for path in self.out.glob(".*"):
            path.unlink()

    def commit(self) -> None:
        """Puts the finished output in its place; `sweep` comes before its files are described."""
        stores.put_in_place(self.out, self.output)


def _is_replaceable(path: Path) -> bool:
    """Whether a directory is empty or has a manifest, which a directory of logs does not have."""
    names = {file.name for file in path.iterdir()} if path.is_dir() else {path.name}
    return not names or not names.isdisjoint(stores.MANIFESTS)


def write_block(directory: Path, name: str, block: np.ndarray) -> str:
    """Writes an array as `name`.npy in one step, so that a worker may try again; its path."""
    path = directory / f"{name}.npy"
    with written_aside(path) as aside, open(aside, "wb") as file:
        np.save(file, block, allow_pickle=False)
    return str(path)


def load_array(path: str | Path, mmap_mode: Any = None) -> np.ndarray:
    """As `np.load`, by one thread at a time.

    NumPy parses the header of a file by `ast`, whose parser in CPython 3.11 counts its depth for
    all threads together, and fails with a SystemError where two of them meet.
    """
    with _PARSING:
        return np.load(path, mmap_mode, allow_pickle=False)


def load_block(path: str) -> tuple[int, np.ndarray]:
    """A staged block with the key range that is its name."""
    return int(Path(path).stem), load_array(path)


def write_json(directory: Path, name: str, value: Any) -> None:
    """Writes a small result of a step."""
    write_atomically(directory / f"{name}.json", json.dumps(value))


def read_json(directory: Path, name: str) -> Any:
    """Reads a small result of a step.

    Raises:
      AccountingError: the step did not write it.
    """
    path = directory / f"{name}.json"
    if not path.exists():
        raise AccountingError(f"{directory.name}: the result {name} of a step is missing")
    return json.loads(path.read_text())


def read_all(directory: Path, pattern: str = "*") -> dict[str, Any]:
    """The small results of a step by name, in order."""
    names = sorted(path.stem for path in directory.glob(f"{pattern}.json"))
    return {name: read_json(directory, name) for name in names}


def add_up(directory: Path, pattern: str = "*") -> dict[str, int]:
    """The sums of small results of a step that are name → number, by name."""
    sums: Counter[str] = Counter()
    for numbers in read_all(directory, pattern).values():
        sums.update(numbers)
    return dict(sums)
