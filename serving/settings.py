"""Settings of `twotower serve`."""

from __future__ import annotations

import dataclasses
import hmac
import os
from pathlib import Path

from pipeline.contract.flags import NO_FLAG
from pipeline.contract.settings import require, require_all
from serving.retrieval.settings import INDEXES, UNKNOWN_QUERIES

TOKEN_VARIABLE, ADMIN_TOKEN_VARIABLE = "TWOTOWER_TOKEN", "TWOTOWER_ADMIN_TOKEN"

_RULES = {
    "must be at least 1": "workers max_k max_batch_size max_enqueued_batches num_batch_threads "
    "deadline_ms max_body_mb",
    "must be at least 0": "batch_timeout_micros prune_versions lame_duck_seconds drain_seconds "
    "rest_port grpc_port",
    "must be above 0": "poll_seconds",
}


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """Settings of the retrieval service."""

    models: str  # directory of all models: every MODELS/NAME/INTEGER is a version
    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0 is every network of this machine
    rest_port: int = 8501  # port of the REST API; 0: the system chooses
    grpc_port: int = 8500  # port of the gRPC API; 0: the system chooses
    # processes that answer on the same ports, and share the memory of vectors; one uses two cores
    workers: int = 1
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
    # newest versions to keep on disk; 0: all, of a store copies of 2. Served ones always stay
    prune_versions: int = 0
    log_requests: bool = False  # log good requests too, not only the refused ones
    token_file: str = ""  # file with the bearer token of requests; empty: $TWOTOWER_TOKEN, if set
    admin_token_file: str = ""  # that of reloads and histories; empty: $TWOTOWER_ADMIN_TOKEN
    token: str = dataclasses.field(default="", repr=False, metadata=NO_FLAG)  # `ps` shows arguments
    admin_token: str = dataclasses.field(default="", repr=False, metadata=NO_FLAG)
    tls_certificate: str = ""  # PEM file with the server's certificates: REST and gRPC by TLS
    tls_key: str = ""  # PEM file with the private key of the certificate

    def __post_init__(self) -> None:
        require(bool(self.models), "models", "must be a directory", self.models)
        for name, choices in (("index", INDEXES), ("unknown_queries", UNKNOWN_QUERIES)):
            value = getattr(self, name)
            require(value in choices, name, f"must be one of {', '.join(choices)}", value)
        for rule, names in _RULES.items():
            require_all(self, rule, *names.split())
        for name, port in (("rest_port", self.rest_port), ("grpc_port", self.grpc_port)):
            require(port <= 65535, name, "must be at most 65535", port)
        if self.rest_port and self.rest_port == self.grpc_port:
            raise ValueError(f"rest_port and grpc_port must differ, got {self.rest_port} twice.")
        if self.workers > 1 and self.prune_versions:
            raise ValueError(
                "prune_versions must be 0 where workers are several, as one would delete what "
                f"another one still loads, got {self.prune_versions}: delete old versions yourself."
            )
        if bool(self.tls_certificate) != bool(self.tls_key):
            raise ValueError("tls_certificate and tls_key must be given together.")
        for name, variable in (("token", TOKEN_VARIABLE), ("admin_token", ADMIN_TOKEN_VARIABLE)):
            if not getattr(self, name):
                token = _read_token(f"{name}_file", getattr(self, f"{name}_file"))
                object.__setattr__(self, name, token or os.environ.get(variable, ""))

    def accepts(self, authorization: bytes, *, admin: bool) -> bool:
        """Whether a header, `Bearer TOKEN` or b"", lets a client in.

        `admin` says that it asks for what only the admin token opens, where there is one.
        """
        token = (admin and self.admin_token) or self.token
        if not token:
            return True
        scheme, _, given = authorization.partition(b" ")
        secrets = [secret.encode() for secret in (token, self.admin_token or token)]
        is_known = any([hmac.compare_digest(given, secret) for secret in secrets])
        return is_known and scheme.lower() == b"bearer"

    @property
    def max_rows(self) -> int:
        """Most rows of a request: so many may wait."""
        return self.max_batch_size * self.max_enqueued_batches


def _read_token(name: str, path: str) -> str:
    """What a file holds, without white space around it; "" without a file."""
    if not path:
        return ""
    try:
        token = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} {path} cannot be read: {error}.") from error
    require(bool(token), name, "must hold a token", f"an empty file, {path}")
    return token
