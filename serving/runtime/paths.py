"""Where the versions of a model lie, and which configurations a client may ask for."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from serving.errors import InvalidRequest, NotFound
from serving.runtime.model_config import ModelConfig
from serving.version.names import is_name
from serving.version.versions import numbered_directories


class ModelHomes:
    """The directory of all models, and what the operator's configuration placed elsewhere.

    A client that reloads the configuration moves no model: it may name directories below that of
    the models, and those that the operator has named.
    """

    def __init__(self, models: str | Path, configs: Iterable[ModelConfig] = ()) -> None:
        """Takes the configurations of the operator, whose paths are trusted.

        Raises:
          ValueError: there is no directory of models.
        """
        self.root = Path(os.path.abspath(models))
        if not self.root.is_dir():
            raise ValueError(f"models must be a directory, {models} is none.")
        self._placed: dict[str, Path] = {}
        self.place(configs)

    def place(self, configs: Iterable[ModelConfig]) -> None:
        """Takes the configurations of the operator anew."""
        self._placed = {config.name: self.path(config) for config in configs}

    def path(self, config: ModelConfig) -> Path:
        """The directory of the versions of a model."""
        if config.base_path:
            return Path(os.path.abspath(self.root / config.base_path))
        return self._placed.get(config.name, self.root / config.name)

    def find(self) -> Iterator[tuple[str, Path]]:
        """The models that have a version on disk, finished or not."""
        for path in sorted(self.root.iterdir()):
            if is_name(path.name) and numbered_directories(path):
                yield path.name, path

    def check(self, config: ModelConfig) -> None:
        """Says whether a client may ask for this, and whether it is on disk.

        Raises:
          InvalidRequest: the path is neither below the models nor the operator's.
          NotFound: the model, or a version that is named, is not on disk.
        """
        path, name = self.path(config), config.name
        if self.root not in path.parents and path != self._placed.get(name):
            raise InvalidRequest(f"base_path of model {name!r} must lie below the models.")
        on_disk = numbered_directories(path)
        if not on_disk:
            raise NotFound(f"Model {name!r} has no version on disk.")
        for number in (*config.policy.specific, *config.labels.values()):
            if number not in on_disk:
                there = ", ".join(map(str, sorted(on_disk)))
                raise NotFound(f"Model {name!r} has no version {number}; there are: {there}.")
