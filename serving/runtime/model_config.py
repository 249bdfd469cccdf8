"""Which models are served, and which of their versions: TensorFlow Serving's model config."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Collection, Mapping

from google.protobuf import text_format
from tensorflow_serving.config import model_server_config_pb2

from serving.version.names import check_name

PLATFORM = "tensorflow"
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class VersionPolicy:
    """Which versions on disk are to be served; without arguments the newest one.

    Attributes:
      latest: the N newest; 0 for every version.
      specific: exactly these, where any are named; a rollback names the older one.
    """

    latest: int = 1
    specific: tuple[int, ...] = ()

    def choose(self, numbers: Collection[int], usable: Callable[[int], bool]) -> list[int]:
        """Those of `numbers` that are to be served, newest first.

        Args:
          numbers: the versions on disk.
          usable: asked from the newest on, until there are enough; a broken version thus gives
            way to the one before it.
        """
        newest_first = sorted(numbers, reverse=True)
        if self.specific:
            return [number for number in newest_first if number in self.specific and usable(number)]
        return list(itertools.islice(filter(usable, newest_first), self.latest or None))


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One model to serve.

    Attributes:
      name: what clients call it.
      base_path: directory of its versions; "" for the directory `name` among the models.
      policy: which versions of it.
      labels: names of versions that clients may ask for, such as "stable" and "canary".
    """

    name: str
    base_path: str = ""
    policy: VersionPolicy = VersionPolicy()
    labels: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name(self.name)


def read_config(content: bytes, path: str) -> list[ModelConfig]:
    """Reads a `model_config_list` in TensorFlow Serving's text format, the content of a file.

    Raises:
      ValueError: it cannot be read, or names what this service does not have.
    """
    try:
        text = content.decode()
        proto = text_format.Parse(text, model_server_config_pb2.ModelServerConfig())
    except (UnicodeDecodeError, text_format.ParseError) as error:
        raise ValueError(f"config_file {path} cannot be read: {error}.") from error
    return from_proto(proto)


def from_proto(proto: model_server_config_pb2.ModelServerConfig) -> list[ModelConfig]:
    """The models of a `ModelServerConfig`, from a file or a reload request.

    Raises:
      ValueError: it has no `model_config_list`, or a model in it is not valid.
    """
    if proto.WhichOneof("config") != "model_config_list":
        raise ValueError("a model server config must have a model_config_list, got none.")
    models = [_from_proto(model) for model in proto.model_config_list.config]
    names = [model.name for model in models]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"a model_config_list must name a model once, got {name!r} twice.")
    return models


def _from_proto(proto: model_server_config_pb2.ModelConfig) -> ModelConfig:
    if proto.model_platform not in ("", PLATFORM):
        raise ValueError(
            f"model_platform of {proto.name!r} must be {PLATFORM!r}, got {proto.model_platform!r}."
        )
    if "://" in proto.base_path:
        raise ValueError(
            f"base_path of {proto.name!r} must be a directory of this machine, got "
            f"{proto.base_path!r}: mount or copy what lies elsewhere."
        )
    if proto.HasField("logging_config"):
        _log.warning("logging_config of %r is ignored: see --log_requests.", proto.name)
    choice = proto.model_version_policy.WhichOneof("policy_choice")
    policy = VersionPolicy()
    if choice == "latest":
        policy = VersionPolicy(latest=proto.model_version_policy.latest.num_versions or 1)
    elif choice == "all":
        policy = VersionPolicy(latest=0)
    elif choice == "specific":
        policy = VersionPolicy(specific=tuple(proto.model_version_policy.specific.versions))
        if not policy.specific:
            raise ValueError(f"the specific versions of {proto.name!r} must be named, got none.")
    return ModelConfig(proto.name, proto.base_path, policy, dict(proto.version_labels))
