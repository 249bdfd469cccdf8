"""Settings of `twotower export`, `twotower query` and `twotower serve`."""

from __future__ import annotations

import dataclasses
import hmac
import os
import re

INDEXES = ("default", "exact", "scann")
UNKNOWN_QUERIES = ("popular", "empty", "error")
MOST_VERSION = 2**63 - 1  # numbers of versions are int64, here as in TensorFlow Serving
TOKEN_VARIABLE, ADMIN_TOKEN_VARIABLE = "TWOTOWER_TOKEN", "TWOTOWER_ADMIN_TOKEN"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclasses.dataclass(frozen=True)
class VersionOptions:
    """What may be chosen about a model version when it is made; see `ExportConfig`."""

    name: str = "twotower"
    k: int = 100
    version: int = 0
    target_recall: float = 0.95
    scann: bool = True
    scann_leaves: int = 0
    seed: int = 10
    at: int = 0

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}: a version answers with results.")
        if self.at > self.k:
            raise ValueError(
                f"at must be at most k, {self.k}, got {self.at}: recall is promised of results "
                "that a version gives, so raise --k."
            )
        if not 0.0 < self.target_recall <= 1.0:
            raise ValueError(
                f"target_recall must be above 0 and at most 1, got {self.target_recall}: "
                "it is a share of the exact results, such as 0.95."
            )
        for field in ("version", "scann_leaves", "seed", "at"):
            if getattr(self, field) < 0:
                raise ValueError(
                    f"{field} must be 0 or a positive integer, got {getattr(self, field)}."
                )
        if self.version > MOST_VERSION:
            raise ValueError(f"version must be at most {MOST_VERSION}, got {self.version}.")


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Settings of one export: a trained run, or any bundle, becomes a model version."""

    data: str = ""  # directory of the prepared data that the run was trained on
    run: str = ""  # run directory, written by `twotower train`
    models: str = ""  # directory of all models; the version becomes MODELS/NAME/INTEGER
    bundle: str = ""  # instead of data and run: a finished bundle, of this trainer or another
    name: str = "twotower"  # name of the model, one directory below MODELS
    k: int = 100  # K, results of a version, fixed at export
    version: int = 0  # number of the version; 0: the next free integer
    target_recall: float = 0.95  # promise: share of the exact top AT that ScaNN finds
    at: int = 0  # rank up to which the promise counts; 0: k
    scann: bool = True  # also build a ScaNN index, where the package is installed
    scann_leaves: int = 0  # leaves of the ScaNN tree; 0: chosen from the size of the corpus
    seed: int = 10  # chooses the sample of queries that the indexes are measured with

    def __post_init__(self) -> None:
        _check_paths(self, "models")
        if self.bundle and (self.data or self.run):
            raise ValueError("an export takes --bundle, or --data and --run, not both.")
        if not self.bundle:
            _check_paths(self, "data", "run")
        self.version_options()

    def version_options(self) -> VersionOptions:
        """The part of the settings that `serving.publish.publish` takes."""
        names = [field.name for field in dataclasses.fields(VersionOptions)]
        return VersionOptions(**{name: getattr(self, name) for name in names})


@dataclasses.dataclass(frozen=True)
class QueryConfig:
    """Settings of one question to a model version."""

    models: str  # directory of all models, as given to `twotower export`
    query: str  # raw id of the query, as in the interaction log
    k: int = 10  # results to show
    name: str = "twotower"  # name of the model, one directory below MODELS
    version: int = 0  # number of the version; 0: the newest
    index: str = "default"  # default (the faster one at the promised recall), exact or scann
    exclude_seen: bool = False  # leave out the candidates in the query's training history
    json: bool = False  # print JSON instead of a table

    def __post_init__(self) -> None:
        _check_paths(self, "models")
        check_name(self.name)
        check_index(self.index)
        if not self.query:
            raise ValueError("query must be the raw id of a query, got an empty one.")
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}.")
        if self.version < 0:
            raise ValueError(f"version must be 0 (the newest) or positive, got {self.version}.")


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """Settings of the retrieval service."""

    models: str  # directory of all models: every MODELS/NAME/INTEGER is a version
    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0 is every network of this machine
    rest_port: int = 8501  # port of the REST API; 0: the system chooses
    grpc_port: int = 8500  # port of the gRPC API; 0: the system chooses
    config_file: str = ""  # model_config_list of TensorFlow Serving (text proto): only its models
    state_dir: str = ""  # where an accepted reload is kept for the next start; empty: in models
    poll_seconds: float = 1.0  # time between two looks for new versions and at config_file
    # default (the faster one at the promised recall), exact or scann; exact where there is no ScaNN
    index: str = "default"
    unknown_queries: str = "popular"  # answer to an unknown query: popular, empty or error
    max_k: int = 1000  # most results that one query may ask for
    max_batch_size: int = 64  # most rows of requests that run together
    batch_timeout_micros: int = 2000  # how long a batch waits for more while another one runs
    max_enqueued_batches: int = 100  # batches' worth of rows that may wait; more are refused
    num_batch_threads: int = 2  # batches that run at the same time
    deadline_ms: int = 5000  # longest time for a request; the client's own may be shorter
    # how long SIGTERM leaves requests answered while /readyz says 503, for balancers to see it
    lame_duck_seconds: float = 5.0
    drain_seconds: float = 10.0  # how long running requests may take to end after that
    max_body_mb: int = 16  # largest body of a request
    prune_versions: int = 0  # newest versions to keep on disk; 0: all. Served ones always stay
    intra_op_threads: int = 0  # threads within an operation; 0: as many as there are cores
    inter_op_threads: int = 0  # operations side by side; 0: as many as there are cores
    log_requests: bool = False  # log good requests too, not only the refused ones
    # bearer token that requests must carry; set $TWOTOWER_TOKEN instead, `ps` shows arguments
    token: str = dataclasses.field(default="", repr=False)
    # of reloads and histories, in place of that one; set $TWOTOWER_ADMIN_TOKEN instead
    admin_token: str = dataclasses.field(default="", repr=False)
    tls_certificate: str = ""  # PEM file with the server's certificates: REST and gRPC by TLS
    tls_key: str = ""  # PEM file with the private key of the certificate

    def __post_init__(self) -> None:
        _check_paths(self, "models")
        check_index(self.index)
        _check_choice("unknown_queries", self.unknown_queries, UNKNOWN_QUERIES)
        _check_least(self, 1, "max_k", "max_batch_size", "max_enqueued_batches")
        _check_least(self, 1, "num_batch_threads", "deadline_ms", "max_body_mb")
        _check_least(self, 0, "batch_timeout_micros", "prune_versions")
        _check_least(self, 0, "lame_duck_seconds", "drain_seconds")
        _check_least(self, 0, "intra_op_threads", "inter_op_threads", "rest_port", "grpc_port")
        if not self.poll_seconds > 0.0:
            raise ValueError(f"poll_seconds must be above 0, got {self.poll_seconds}.")
        for field in ("rest_port", "grpc_port"):
            if getattr(self, field) > 65535:
                raise ValueError(f"{field} must be at most 65535, got {getattr(self, field)}.")
        if bool(self.tls_certificate) != bool(self.tls_key):
            raise ValueError("tls_certificate and tls_key must be given together.")
        for field, variable in (("token", TOKEN_VARIABLE), ("admin_token", ADMIN_TOKEN_VARIABLE)):
            if not getattr(self, field):
                object.__setattr__(self, field, os.environ.get(variable, ""))

    def accepts(self, authorization: bytes, *, admin: bool) -> bool:
        """Whether a header, `Bearer TOKEN`, lets a client in.

        Args:
          authorization: the header; b"" where there is none.
          admin: whether it asks for what only the admin token opens, where there is one.
        """
        token = (admin and self.admin_token) or self.token
        if not token:
            return True
        expected = [f"Bearer {one}".encode() for one in (token, self.admin_token or token)]
        return any([hmac.compare_digest(authorization, one) for one in expected])

    @property
    def max_rows(self) -> int:
        """Most rows of a request: so many may wait."""
        return self.max_batch_size * self.max_enqueued_batches


def check_index(index: str) -> None:
    """Raises ValueError unless `index` names one."""
    _check_choice("index", index, INDEXES)


def _check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{field} must be one of {', '.join(choices)}, got {value!r}.")


def _check_least(config: object, least: int, *fields: str) -> None:
    for field in fields:
        if getattr(config, field) < least:
            raise ValueError(f"{field} must be at least {least}, got {getattr(config, field)}.")


def is_name(name: str) -> bool:
    """Whether `name` may be a model: a directory below the models, and only that."""
    return _NAME.fullmatch(name) is not None


def check_name(name: str) -> None:
    """Raises ValueError unless `name` may be a model."""
    if not is_name(name):
        raise ValueError(
            f"name must be letters, digits, '.', '_' or '-' and start with a letter or digit, "
            f"got {name!r}: it becomes a directory."
        )


def _check_paths(config: object, *fields: str) -> None:
    for field in fields:
        if not getattr(config, field):
            raise ValueError(f"{field} must be a directory, got an empty path.")
