"""The contract between the rooms: names of artifacts, their columns, the manifest.

Everything that one room writes and another reads is named here and nowhere else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import keyword
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.contract.files import check_local, did_you_mean_directory, write_atomically

FORMAT_VERSION = "1.0"  # major.minor; a reader refuses a newer major version

MANIFEST = "manifest.json"  # written last: no manifest, no data set
# Kinds of directories that are one table: `pd.read_parquet(DIR)` skips what begins with _.
TABLES = ("frequencies", "recommendations")
QUALITY_PAGE = "quality.html"  # details["quality"] of the manifest, for people
DATASET = "interactions"  # shards are {DATASET}-{split}.tfrecord-0000i-of-0000N
SPLITS = ("train", "validation", "test")
SIDES = ("query", "candidate")

# Columns of an example (dense ids) and of a vocabulary table (row number = dense id).
QUERY_ID, CANDIDATE_ID, TIMESTAMP, WEIGHT = "query_id", "candidate_id", "timestamp", "weight"
RAW_ID, FINGERPRINT, COUNT = "raw_id", "fingerprint", "count"

# A job of its own counts items: files of raw_id, fingerprint, count (float64) and log_q (float64),
# by ascending fingerprint over all shards.
FREQUENCIES = "candidate_frequencies"
LOG_Q = "log_q"

# A snapshot of streaming frequencies lies in a directory of snapshots, named by its number.
STREAMING_LAST_STEP = "last_step.npy"  # int64 [A, H], of each bucket of each hash array
STREAMING_INTERVAL = "interval.npy"  # float64 [A, H], mean steps between two occurrences
STREAMING_WEIGHT = "weight.npy"  # float64 [A, H], 1 - (1 - α)^n after n occurrences
STREAMING_PENDING = "pending.npy"  # int64 [P, 3], fingerprint, period of time, rows

# A bundle is what a trainer hands to `serving`: vectors, ids and, where there is one, a query
# SavedModel with query_id string [B] -> embedding float32 [B, D], known bool [B].
BUNDLE_QUERY_MODEL = "query_model"
BUNDLE_CANDIDATE_MODEL = "candidate_model"  # embeds candidates that come later; optional
BUNDLE_VECTORS = "candidate_vectors.npy"  # float32 [N, D]; score = embedding · vector
BUNDLE_CANDIDATE_IDS = "candidate_ids.parquet"  # column raw_id, row = row of the vectors
BUNDLE_QUERY_IDS = "query_ids.parquet"  # column raw_id, row = row of the seen lists
BUNDLE_SEEN_OFFSETS = "seen_offsets.npy"  # int64 [Q + 1]
BUNDLE_SEEN_CANDIDATES = "seen_candidates.npy"  # int32, rows of the vectors
BUNDLE_SAMPLE_QUERIES = "sample_queries.npy"  # float32 [S, D], to measure an index with
BUNDLE_CANDIDATE_COUNTS = "candidate_counts.npy"  # int64 [N], training rows; optional
BUNDLE_ATTRIBUTES = "candidate_attributes.parquet"  # N rows, see `contract.attributes`; optional

# Prepared data hold for a side with a table of attributes: feature files, those of ids without
# rows, the values of categorical and multi columns, `{side}_features_dead_letters.jsonl`.
FEATURE_KINDS = ("categorical", "multi", "numeric", "text")
FEATURES = "features"  # key in `Manifest.details`: side → rows, files and columns
VALUE = "value"  # column of a feature vocabulary, beside `count`


def shard_name(split: str, shard: int, num_shards: int) -> str:
    """The file name of one shard, as `tfds.builder_from_directory` expects it."""
    return f"{DATASET}-{split}.tfrecord-{shard:05d}-of-{num_shards:05d}"


def vocabulary_name(side: str, shard: int = 0, num_shards: int = 1) -> str:
    """Parquet with `raw_id`, `fingerprint` and `count` (over all splits) in dense-id order."""
    return f"{side}_vocabulary-{shard:05d}-of-{num_shards:05d}.parquet"


def train_counts_name(shard: int = 0, num_shards: int = 1) -> str:
    """Parquet with one column `count`: train rows of each candidate in dense-id order."""
    return f"candidate_train_counts-{shard:05d}-of-{num_shards:05d}.parquet"


def frequencies_name(shard: int = 0, num_shards: int = 1) -> str:
    """Parquet with `raw_id`, `fingerprint`, `count` and `log_q` by ascending fingerprint."""
    return f"{FREQUENCIES}-{shard:05d}-of-{num_shards:05d}.parquet"


def features_name(side: str, shard: int = 0, num_shards: int = 1) -> str:
    """Parquet with the features of the ids of the vocabulary's shard of that number, in order."""
    return f"{side}_features-{shard:05d}-of-{num_shards:05d}.parquet"


def cold_features_name(side: str, shard: int = 0, num_shards: int = 1) -> str:
    """Parquet with `raw_id` and features of ids outside the vocabulary: too few rows, or none."""
    return f"{side}_features_cold-{shard:05d}-of-{num_shards:05d}.parquet"


def feature_vocabulary_name(side: str, column: str) -> str:
    """Parquet with `value` and `count`, by descending count, then by value; code = row + 1."""
    safe = re.sub(r"[^\w .-]", lambda found: f"%{ord(found[0]):02X}", column)
    return f"feature_vocabulary-{side}-{safe}.parquet"


def input_name(column: str) -> str:
    """The name of a column as an input of a graph: what that does not take is an underscore."""
    name = re.sub(r"\W|^(?=\d)", "_", column, flags=re.ASCII)
    return f"{name}_" if keyword.iskeyword(name) else name


def presence_name(column: str) -> str:
    """The name of the bool column that tells where a column has a value."""
    return f"{column}:present"


@dataclasses.dataclass(frozen=True)
class FeatureSpec:
    """One column of a feature file; all that decides its values comes from ids with train rows.

    The column has the name it has in the table. By kind it holds

    - categorical: int32, 0 where the value is missing or unknown, else its code;
    - multi: list<int32>, the codes of the known values, each once; empty if no value is known;
    - numeric: float32, (value - mean) / std; missing is 0 if `presence` follows, else null;
    - text: string, empty where it is missing.
    """

    name: str
    kind: str  # one of FEATURE_KINDS
    vocabulary: str = ""  # file of the values of a categorical or multi column
    size: int = 0  # values in it; codes are 1..size, and 0 for missing or unknown
    mean: float = 0.0  # of a numeric column, in the unit of the table
    std: float = 1.0  # of a numeric column, divided by n; 1 where all values are equal
    max_length: int = 0  # of a multi column, most values of an id with train rows, rare ones too
    has_presence: bool = False  # whether `presence` follows: a train id has no value of a number
    missing: int = 0  # ids of the vocabulary without a value
    unknown: int = 0  # values of ids of the vocabulary that the column's vocabulary does not hold

    @property
    def presence(self) -> str:
        """The name of the column that tells where there is a value."""
        return presence_name(self.name)


def feature_specs(details: Mapping[str, Any], side: str) -> tuple[FeatureSpec, ...]:
    """The columns of a side's feature files, in order; () where it has no table of attributes."""
    columns = details.get(FEATURES, {}).get(side, {}).get("columns", ())
    return tuple(FeatureSpec(**_known_fields(FeatureSpec, column)) for column in columns)


def _known_fields(kind: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that a dataclass has fields for; newer programs write more."""
    known = {field.name for field in dataclasses.fields(kind)}
    return {name: value for name, value in values.items() if name in known}


@functools.cache
def program_version() -> str:
    """The version of this program, such as `0.1.0+06feb11`; of a checkout with its commit.

    `.changed` stands behind it where files of the checkout differ from the commit.
    """
    try:
        version = importlib.metadata.version("twotower")
    except importlib.metadata.PackageNotFoundError:
        version = "0"
    root = Path(__file__).parents[2]
    if (root / ".git").exists():
        describe = ["git", "describe", "--always", "--exclude=*", "--dirty=.changed"]
        with contextlib.suppress(OSError):  # no git here
            found = subprocess.run(describe, cwd=root, capture_output=True, text=True, check=False)
            version += f"+{found.stdout.strip()}" if found.returncode == 0 else ""
    return version


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a directory holds and how it was made; its presence is what makes it complete.

    `kind` is `prepared`, `frequencies`, `streaming_frequency`, `model`, `bundle` or `version`.
    `counts` holds numbers of rows and ids, `files` maps a path relative to the directory to its
    size in bytes and its checksum; `code_version` is "" where an older program wrote it. Nothing in
    it depends on the time, the machine or the number of workers.
    """

    kind: str
    source: str
    configuration: dict[str, Any]
    counts: dict[str, Any]
    files: dict[str, dict[str, Any]]
    details: dict[str, Any] = dataclasses.field(default_factory=dict)
    format_version: str = FORMAT_VERSION
    code_version: str = dataclasses.field(default_factory=program_version)

    @property
    def fingerprint(self) -> str:
        """One checksum for the content of the whole directory: 16 hexadecimal digits."""
        text = json.dumps([self.configuration, self.files], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def files_of(self, prefix: str) -> list[str]:
        """The names of the files that start with `prefix`, in order."""
        return sorted(name for name in self.files if name.startswith(prefix))

    def write(self, directory: str | os.PathLike[str]) -> None:
        """Writes the manifest, atomically; call it when all else is in place."""
        path = Path(directory) / manifest_name(self.kind)
        text = json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True, ensure_ascii=False)
        write_atomically(path, text + "\n")


def manifest_name(kind: str) -> str:
    """The name of the manifest in a directory of a kind."""
    return f"_{MANIFEST}" if kind in TABLES else MANIFEST


def read_manifest(directory: str | os.PathLike[str], kind: str) -> Manifest:
    """Reads the manifest of a kind of directory; ValueError: missing, of another kind, or newer."""
    check_local(directory)
    path = Path(directory) / manifest_name(kind)
    if not path.is_file():  # of another kind, or of an older program
        path = Path(directory) / MANIFEST
    makers = {"prepared": "prepare", "bundle": "export", "version": "export"}
    makers |= {"frequencies": "frequencies", "streaming_frequency": "frequencies --streaming"}
    maker = f"twotower {makers[kind]}" if kind in makers else f"{kind}.save"
    if not path.is_file():
        raise ValueError(
            f"{directory} holds no finished {kind} data: there is no {MANIFEST} in it. "
            f"Make it with `{maker}`."
            + did_you_mean_directory(directory, MANIFEST, f'"kind": "{kind}"')
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        version = str(fields["format_version"])
        major = int(version.split(".")[0])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a manifest ({error!r}); make it again.") from error
    if major > int(FORMAT_VERSION.split(".")[0]):
        raise ValueError(
            f"{path} has format version {version}, this program reads up to {FORMAT_VERSION}: "
            "update twotower."
        )
    if fields.get("kind") != kind:
        raise ValueError(
            f"{path} describes a {fields.get('kind')!r} directory, not {kind!r}: "
            "check the path that was given."
        )
    return Manifest(**_known_fields(Manifest, {"code_version": ""} | fields))


def snapshot_directories(path: str | os.PathLike[str]) -> list[Path]:
    """The snapshots in a directory of them, oldest first; of a snapshot, itself alone."""
    if (Path(path) / MANIFEST).is_file():
        return [Path(path)]
    return sorted(one for one in Path(path).glob("[0-9]" * 8) if (one / MANIFEST).is_file())


def read_snapshot(directory: str | os.PathLike[str]) -> Manifest:
    """Reads the manifest of a snapshot; ValueError: it is missing, or its intervals are biased."""
    manifest = read_manifest(directory, "streaming_frequency")
    if STREAMING_WEIGHT not in manifest.files:
        raise ValueError(
            f"{directory} has no {STREAMING_WEIGHT}: an older twotower made it, whose estimates of "
            "rare candidates are too large; make it again from its log."
        )
    return manifest
