"""Models and versions to serve, by TensorFlow Serving's model config in a file or a reload."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from google.protobuf import text_format
from tensorflow_serving.config import model_server_config_pb2

from pipeline.contract import stores
from pipeline.contract.files import is_remote, write_atomically
from serving.errors import FailedPrecondition, InvalidRequest, NotFound
from serving.version.names import check_name, is_name
from serving.version.versions import check_models_directory, numbered_directories

KEPT = ".reloaded.json"
PLATFORM = "tensorflow"
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One model to serve, and which of its versions on disk; the newest one without arguments."""

    name: str  # what clients call it
    base_path: str = ""  # directory of its versions; "" for `name` among the models
    latest: int = 1  # serve the N newest; 0 for every version
    specific: tuple[int, ...] = ()  # exactly these, where any are named; a rollback names the older
    # names of versions that clients may ask for, such as "stable" and "canary"
    labels: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name(self.name)
        object.__setattr__(self, "specific", tuple(self.specific))

    @property
    def named(self) -> set[int]:
        """The versions that it names, by number or with a label."""
        return {*self.specific, *self.labels.values()}

    def choose(self, numbers: Collection[int], usable: Callable[[int], bool]) -> list[int]:
        """Those of the versions on disk that are to be served, newest first.

        `usable` is asked from the newest on, until there are enough; a broken version thus gives
        way to the one before it.
        """
        newest_first = sorted(numbers, reverse=True)
        if self.specific:
            return [number for number in newest_first if number in self.specific and usable(number)]
        return list(itertools.islice(filter(usable, newest_first), self.latest or None))


class Configuration:
    """The file, and the reload that was accepted last; both are looked at again and again.

    The later decision wins: a reload over the file as it was then, an edit of the file over all
    reloads before it, also over a restart. A client that reloads moves no model: it may name
    directories below that of the models, and those that the operator has named.

    Attributes:
      root: the directory of all models, on this machine.
      store: their place in a store, or "".
    """

    def __init__(self, models: str | Path, config_file: str = "", state_dir: str = "") -> None:
        """Reads the file, where there is one; a reload is kept in `state_dir`, or in `root`.

        Raises:
          ValueError: there is no directory of models, or the file or the store cannot be read.
        """
        self.store = str(models) if is_remote(models) else ""
        models = stores.follow_versions(self.store, 0) if self.store else models
        self.root = Path(os.path.abspath(models))
        if not self.root.is_dir():
            raise ValueError(
                f"models must be a directory, got {str(models)!r}; make one with `twotower export`."
            )
        check_models_directory(models)
        self._file = config_file
        self._kept = Path(state_dir or models) / KEPT
        self._problem = ""
        try:
            self._reload, content = self._read_reload(), self._read()
        except OSError as error:
            what = f"{error.filename} cannot be read: {error.strerror}"
            raise ValueError(f"config_file or state_dir: {what}.") from error
        self._digest = _digest(content)
        self._of_file = read_config(content, config_file) if config_file else None
        self._placed: dict[str, Path] = {}
        self.place()

    def in_force(self) -> list[ModelConfig] | None:
        """What is to be served, None for all models; ValueError: the reload cannot be read."""
        if not self._reload:
            return self._of_file
        try:
            kept = json.loads(self._reload)
            models = [fields | fields.pop("policy", {}) for fields in kept["models"]]
            configs = [ModelConfig(**fields) for fields in models]
            is_later = kept["after"] == self._digest
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise ValueError(
                f"{self._kept} must hold the last reload, but cannot be read ({error!r}): delete "
                "it to serve what the configuration says."
            ) from error
        if not is_later:
            self._reload = b""
            with contextlib.suppress(OSError):  # it is older than the file in any case
                self._kept.unlink()
            return self._of_file
        _log.warning(
            "The last reload is in force, kept in %s; an edit of the configuration file ends it.",
            self._kept,
        )
        return configs

    def has_changed(self) -> bool:
        """Whether the file was edited, and is valid, or another process has kept a reload."""
        try:
            kept = self._read_reload()  # first: an edit is there before it ends a reload
            content = self._read()
            if _digest(content) == self._digest and kept == self._reload:
                self._problem = ""
                return False
            self._of_file = read_config(content, self._file) if self._file else None
        except (OSError, ValueError) as error:
            if str(error) != self._problem:
                _log.error("What is served stays as it is: %s", error)
            self._problem = str(error)
            return False
        self._digest, self._reload, self._problem = _digest(content), kept, ""
        return True

    def place(self) -> None:
        """Takes the paths that the operator has chosen in the file, which are trusted."""
        self._placed = {config.name: self.path(config) for config in self._of_file or ()}

    def path(self, config: ModelConfig) -> Path:
        if config.base_path:
            return Path(os.path.abspath(self.root / config.base_path))
        return self._placed.get(config.name, self.root / config.name)

    def named(self, configs: Sequence[ModelConfig]) -> set[str]:
        """The versions that these name, such as "twotower/3", where `root` has them or may."""
        return {
            os.path.relpath(self.path(config) / str(number), self.root)
            for config in configs
            for number in config.named
        }

    def discover(self) -> Iterator[tuple[str, Path]]:
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
        if missing := config.named - on_disk.keys():
            there = ", ".join(map(str, sorted(on_disk)))
            raise NotFound(f"Model {name!r} has no version {min(missing)}; there are: {there}.")

    def check_writable(self) -> None:
        """Raises FailedPrecondition where a reload could not be kept."""
        if not os.access(self._kept.parent, os.W_OK):
            raise FailedPrecondition(
                "A reload is kept for the next start, and the service cannot write there: "
                "edit its config_file, or start it with another state_dir."
            )

    def note_earlier(self) -> None:
        """Notes what file and kept reload say now: a reload that comes after is the later one."""
        with contextlib.suppress(OSError):
            self._reload = self._read_reload()
            self._digest = _digest(self._read())

    def keep(self, configs: Sequence[ModelConfig]) -> bool:
        """Writes a reload for the next start, all of it or nothing, or raises OSError.

        False, and nothing is written, where another process has kept one since `note_earlier`.
        """
        if self._read_reload() != self._reload:
            return False
        models = [dataclasses.asdict(config) for config in configs]
        text = json.dumps({"after": self._digest, "models": models}, indent=2) + "\n"
        write_atomically(self._kept, text)
        self._reload = text.encode()
        return True

    def _read_reload(self) -> bytes:
        with contextlib.suppress(FileNotFoundError):
            return self._kept.read_bytes()
        return b""

    def _read(self) -> bytes:
        return Path(self._file).read_bytes() if self._file else b""


def read_config(content: bytes, path: str) -> list[ModelConfig]:
    """Reads a `model_config_list` in TensorFlow Serving's text format, or raises ValueError."""
    try:
        proto = text_format.Parse(content.decode(), model_server_config_pb2.ModelServerConfig())
    except (UnicodeDecodeError, text_format.ParseError) as error:
        raise ValueError(f"config_file {path} cannot be read: {error}.") from error
    return from_proto(proto)


def from_proto(proto: model_server_config_pb2.ModelServerConfig) -> list[ModelConfig]:
    """The models of a `ModelServerConfig`, of a file or reload; InvalidRequest: it is not valid."""
    if proto.WhichOneof("config") != "model_config_list":
        raise InvalidRequest("a model server config must have a model_config_list, got none.")
    models = [_from_proto(model) for model in proto.model_config_list.config]
    names = [model.name for model in models]
    for name in names:
        if names.count(name) > 1:
            raise InvalidRequest(f"a model_config_list must name a model once, got {name!r} twice.")
    return models


def _from_proto(proto: model_server_config_pb2.ModelConfig) -> ModelConfig:
    if proto.model_platform not in ("", PLATFORM):
        raise InvalidRequest(
            f"model_platform of {proto.name!r} must be {PLATFORM!r}, got {proto.model_platform!r}."
        )
    if "://" in proto.base_path:
        raise InvalidRequest(
            f"base_path of {proto.name!r} must be a directory of this machine, got "
            f"{proto.base_path!r}: mount or copy what lies elsewhere."
        )
    if proto.HasField("logging_config"):
        _log.warning("logging_config of %r is ignored: see --log_requests.", proto.name)
    asked = proto.model_version_policy
    latest = 0 if asked.HasField("all") else asked.latest.num_versions or 1
    specific = tuple(asked.specific.versions)
    if asked.HasField("specific") and not specific:
        raise InvalidRequest(f"the specific versions of {proto.name!r} must be named, got none.")
    return ModelConfig(proto.name, proto.base_path, latest, specific, dict(proto.version_labels))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
