"""Which configuration is in force: that of the operator's file, or of a later reload."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.contract.files import write_atomically
from serving.errors import FailedPrecondition
from serving.runtime.model_config import ModelConfig, VersionPolicy, read_config_file

KEPT = ".reloaded.json"
_log = logging.getLogger(__name__)


class ConfigSource:
    """The file, looked at again and again, and on disk the reload that was accepted last.

    The later decision wins: a reload over the file as it was then, an edit of the file over all
    reloads before it, also over a restart.

    Attributes:
      of_file: the models of the file when it was last read; None without a file.
    """

    def __init__(self, config_file: str, directory: str | Path) -> None:
        """Reads the file.

        Args:
          config_file: "" for none.
          directory: where an accepted reload is kept.

        Raises:
          ValueError: the file cannot be read.
        """
        self._file = config_file
        self._kept = Path(directory) / KEPT
        self._problem = ""
        try:
            self._digest = self._look()
        except OSError:  # the next line says it
            self._digest = ""
        self.of_file = read_config_file(config_file) if config_file else None

    def in_force(self) -> list[ModelConfig] | None:
        """What is to be served at the start; None for every model that is found.

        Raises:
          ValueError: the reload that was kept cannot be read.
        """
        if not self._kept.is_file():
            return self.of_file
        try:
            kept = json.loads(self._kept.read_text(encoding="utf-8"))
            configs = [_from_json(**fields) for fields in kept["models"]]
            is_later = kept["after"] == self._digest
        except (OSError, ValueError, TypeError, LookupError) as error:
            raise ValueError(
                f"{self._kept} must hold the last reload, but cannot be read ({error!r}): delete "
                "it to serve what the configuration says."
            ) from error
        if not is_later:
            self._forget()
            return self.of_file
        _log.warning(
            "The last reload is in force, kept in %s; an edit of the configuration file ends it.",
            self._kept,
        )
        return configs

    def edited(self) -> list[ModelConfig] | None:
        """The models of the file where it was edited since, and is valid; None otherwise."""
        if not self._file:
            return None
        try:
            digest = self._look()
            if digest == self._digest:
                return None
            configs = read_config_file(self._file)
        except (OSError, ValueError) as error:
            if str(error) != self._problem:
                _log.error("What is served stays as it is: %s", error)
            self._problem = str(error)
            return None
        self._digest, self._problem, self.of_file = digest, "", configs
        self._forget()
        return configs

    def check(self) -> None:
        """Raises FailedPrecondition where a reload could not be kept."""
        if not os.access(self._kept.parent, os.W_OK):
            raise FailedPrecondition(
                "A reload is kept for the next start, and the service cannot write there: "
                "edit its config_file, or start it with another state_dir."
            )

    def overrule(self) -> None:
        """Notes that a reload comes after what the file says now."""
        with contextlib.suppress(OSError):
            self._digest = self._look()

    def keep(self, configs: Sequence[ModelConfig]) -> None:
        """Writes a reload for the next start, all of it or nothing.

        Raises:
          OSError: it cannot be written.
        """
        models = [dataclasses.asdict(config) for config in configs]
        content = {"after": self._digest, "models": models}
        write_atomically(self._kept, json.dumps(content, indent=2) + "\n")

    def _forget(self) -> None:
        with contextlib.suppress(OSError):  # it is older than the file in any case
            self._kept.unlink()

    def _look(self) -> str:
        content = Path(self._file).read_bytes() if self._file else b""
        return hashlib.sha256(content).hexdigest()


def _from_json(policy: dict[str, Any], **fields: Any) -> ModelConfig:
    specific = tuple(policy["specific"])
    return ModelConfig(policy=VersionPolicy(policy["latest"], specific), **fields)
