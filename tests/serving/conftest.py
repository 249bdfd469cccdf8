"""Bundles and published versions that the tests share."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
from running_server import Running, running

from pipeline.contract import schema
from pipeline.contract.attributes import as_attributes
from pipeline.contract.files import describe_files
from serving.publish.publish import publish
from serving.retrieval import corpus


@dataclasses.dataclass(frozen=True)
class Sample:
    """What a bundle is written from; ids are deliberately not in the order of their numbers."""

    vectors: np.ndarray  # [N, D]
    queries: np.ndarray  # [Q, D]
    seen: Sequence[np.ndarray] | None = None  # rows of the vectors, one list a query

    @cached_property
    def candidate_ids(self) -> list[str]:
        return [f"cañdidate {7 * row}" for row in range(len(self.vectors))]

    @cached_property
    def query_ids(self) -> list[str]:
        return [f"query {row}" for row in range(len(self.queries))]

    @cached_property
    def attributes(self) -> list[dict[str, object]]:
        """What is known of each candidate."""
        sizes = [[], ["s"], ["m", "l"], ["s", "m"], None]
        return [
            {
                "colour": ["red", "blue", None][row % 3],
                "sizes?": sizes[row % 5],
                "weight": None if row % 7 == 0 else row % 100 / 4,
            }
            for row in range(len(self.vectors))
        ]

    def best(self, query: int, excluded: Sequence[int] = ()) -> list[int]:
        """All rows but the excluded ones, best first: a loop over nothing but NumPy float64."""
        scores = self.vectors.astype(np.float64) @ self.queries[query].astype(np.float64)
        barred = {int(row) for row in excluded}
        return [row for row in np.argsort(-scores, kind="stable") if row not in barred]

    def best_ids(self, query: int, excluded: Sequence[int] = ()) -> list[str]:
        return [self.candidate_ids[row] for row in self.best(query, excluded)]


@dataclasses.dataclass(frozen=True)
class Published:
    """A sample, its bundle, and the models directory that holds a version of it."""

    sample: Sample
    bundle: Path
    models: Path
    version: Path


class LookupQueryModel(tf.Module):
    """A stand-in for a trained query tower: a table from raw ids to rows of embeddings."""

    def __init__(self, query_ids: list[str], embeddings: np.ndarray) -> None:
        super().__init__()
        rows = tf.lookup.KeyValueTensorInitializer(query_ids, tf.range(len(query_ids)))
        self.table = tf.lookup.StaticHashTable(rows, default_value=-1)
        self.embeddings = tf.Variable(embeddings)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="query_id")])
    def __call__(self, query_id: tf.Tensor) -> dict[str, tf.Tensor]:
        row = self.table.lookup(query_id)
        embedding = tf.gather(self.embeddings, tf.maximum(row, 0))
        return {"embedding": embedding, "known": row >= 0}


class DescribedQueryModel(LookupQueryModel):
    """Embeds what a request says: sums of rows of a history, of a town, and of tags; an age."""

    TOWNS, AGE = ["Ulm", "Bern"], 0.01

    def __init__(self, sample: Sample) -> None:
        super().__init__(sample.query_ids, sample.queries)
        ids = tf.constant(sample.candidate_ids)
        rows = tf.lookup.KeyValueTensorInitializer(ids, tf.range(len(sample.vectors)))
        self.row_of_item = tf.lookup.StaticHashTable(rows, default_value=-1)
        towns = tf.lookup.KeyValueTensorInitializer(self.TOWNS, tf.range(len(self.TOWNS)))
        self.row_of_town = tf.lookup.StaticHashTable(towns, default_value=-1)
        self.items = tf.Variable(sample.vectors)

    @tf.function(
        input_signature=[
            tf.TensorSpec([None], tf.float64, name="age"),
            tf.TensorSpec([None, None], tf.string, name="history"),
            tf.TensorSpec([None], tf.string, name="query_id"),
            tf.TensorSpec([None, None], tf.string, name="tags"),
            tf.TensorSpec([None], tf.string, name="town"),
        ]
    )
    def described(self, age, history, query_id, tags, town):
        rows, chosen = self.table.lookup(query_id), self.row_of_item.lookup(history)
        town_row = self.row_of_town.lookup(town)
        there = tf.cast(chosen >= 0, tf.float32)[..., None]
        embedding = tf.reduce_sum(tf.gather(self.items, tf.maximum(chosen, 0)) * there, axis=1)
        stored = (rows >= 0) & tf.reduce_all(history == "", axis=1)
        embedding += tf.where(stored[:, None], tf.gather(self.embeddings, tf.maximum(rows, 0)), 0.0)
        of_town = tf.gather(self.items, tf.maximum(town_row, 0))
        embedding += tf.where((town_row >= 0)[:, None], of_town, 0.0)
        number = tf.where(tf.math.is_nan(age), tf.zeros_like(age), age)
        embedding += self.AGE * tf.cast(number, tf.float32)[:, None]
        embedding += tf.reduce_sum(tf.cast(tags != "", tf.float32), axis=1)[:, None]
        known = (rows >= 0) | tf.reduce_any(chosen >= 0, axis=1) | (town_row >= 0)
        skipped = tf.cast((history != "") & (chosen < 0), tf.int32)
        return {
            "embedding": embedding,
            "known": known,
            "unknown_history": tf.reduce_sum(skipped, axis=1),
        }


def write_ids(path: Path, ids: Sequence[str | None]) -> None:
    pq.write_table(pa.table({"raw_id": pa.array(ids, pa.string())}), path)


def write_bundle(
    path: Path, sample: Sample, *, query_model: bool = True, described: bool = False
) -> Path:
    path.mkdir(parents=True)
    np.save(path / schema.BUNDLE_VECTORS, sample.vectors)
    write_ids(path / schema.BUNDLE_CANDIDATE_IDS, sample.candidate_ids)
    attributes = as_attributes(pa.Table.from_pylist(sample.attributes))
    pq.write_table(attributes, path / schema.BUNDLE_ATTRIBUTES)
    if query_model:
        model = LookupQueryModel(sample.query_ids, sample.queries)
        if described:
            model = DescribedQueryModel(sample)
        signatures = {"serving_default": model.__call__}
        if described:
            signatures["request_embedding"] = model.described
        tf.saved_model.save(model, str(path / schema.BUNDLE_QUERY_MODEL), signatures=signatures)
        np.save(path / schema.BUNDLE_SAMPLE_QUERIES, sample.queries)
    if sample.seen is not None:
        write_ids(path / schema.BUNDLE_QUERY_IDS, sample.query_ids)
        offsets = np.cumsum([0, *map(len, sample.seen)], dtype=np.int64)
        np.save(path / schema.BUNDLE_SEEN_OFFSETS, offsets)
        np.save(path / schema.BUNDLE_SEEN_CANDIDATES, np.concatenate(sample.seen).astype(np.int32))
    sign_bundle(path)
    return path


def sign_bundle(path: Path) -> None:
    """Writes the manifest anew, as a trainer would that made the files as they now are."""
    (path / schema.MANIFEST).unlink(missing_ok=True)
    details = {
        "configuration": {"method": "ssl_pop", "dim": 8},
        "data": {"train_rows": 1234},
        "metrics": {"test": {"recall@20": 0.125}, "users": 20},
    }
    files = describe_files(path)
    schema.Manifest("bundle", "test log", {}, {}, files, details).write(path)


def small_sample(num_candidates: int = 300, dimensions: int = 8, seed: int = 0) -> Sample:
    """Random vectors. Query 0 has seen nothing, 1 its best 90, 2 all but three candidates."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(num_candidates, dimensions)).astype(np.float32)
    queries = rng.normal(size=(20, dimensions)).astype(np.float32)
    best = np.array(Sample(vectors, queries).best(1))
    seen = [np.empty(0, np.int64), best[:90], np.arange(3, num_candidates)]
    seen += [rng.choice(num_candidates, 5, replace=False) for _ in range(17)]
    return Sample(vectors, queries, seen)


def clustered_sample() -> Sample:
    """4,000 candidates around 60 centres: enough for a tree, and easy for one."""
    rng = np.random.default_rng(1)
    centres = rng.normal(size=(60, 16))
    around = rng.integers(0, len(centres), 4000)
    vectors = centres[around] + 0.3 * rng.normal(size=(4000, 16))
    queries = centres[rng.integers(0, len(centres), 200)] + 0.3 * rng.normal(size=(200, 16))
    return Sample(vectors.astype(np.float32), queries.astype(np.float32))


@pytest.fixture(name="write_bundle", scope="session")
def write_bundle_fixture() -> Callable[..., Path]:
    return write_bundle


@pytest.fixture(name="write_ids", scope="session")
def write_ids_fixture() -> Callable[..., None]:
    return write_ids


@pytest.fixture(name="sign_bundle", scope="session")
def sign_bundle_fixture() -> Callable[..., None]:
    return sign_bundle


@pytest.fixture(name="small_sample", scope="session")
def small_sample_fixture() -> Callable[..., Sample]:
    return small_sample


def _publish(root: Path, sample: Sample, **options: object) -> Published:
    bundle = write_bundle(root / "bundle", sample)
    version = publish(bundle, root / "models", **options)
    return Published(sample, bundle, root / "models", version)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """300 candidates, K = 40, with seen lists; ScaNN scans so few."""
    return _publish(tmp_path_factory.mktemp("small"), small_sample(), k=40)


@pytest.fixture(scope="session")
def clustered(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """4,000 candidates, K = 20; ScaNN builds a tree with quantised leaves."""
    root = tmp_path_factory.mktemp("clustered")
    return _publish(root, clustered_sample(), k=20, scann_leaves=63)


@pytest.fixture(scope="session")
def by_embedding(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """300 candidates, K = 10, of a bundle without query model, queries, or a word on its origin."""
    root, sample = tmp_path_factory.mktemp("by_embedding"), small_sample()
    sample = Sample(sample.vectors, sample.queries)
    bundle = write_bundle(root / "bundle", sample, query_model=False)
    schema.Manifest("bundle", "elsewhere", {}, {}, {}).write(bundle)
    version = publish(bundle, root / "models", k=10)
    return Published(sample, bundle, root / "models", version)


@pytest.fixture(scope="session")
def described(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """300 candidates, K = 40; queries may bring a history, a town, tags and an age."""
    root, sample = tmp_path_factory.mktemp("described"), small_sample()
    bundle = write_bundle(root / "bundle", sample, described=True)
    return Published(sample, bundle, root / "models", publish(bundle, root / "models", k=40))


@pytest.fixture(scope="session")
def without_scann(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """30 candidates, K = 5, with seen lists; exact search alone."""
    return _publish(tmp_path_factory.mktemp("exact"), small_sample(30), k=5, scann=False)


@pytest.fixture(scope="session")
def server(small: Published) -> Iterator[Running]:
    """A server over `small` that all tests share, with low limits."""
    with running(small.models, max_body_mb=1, max_k=500) as place:
        yield place


@pytest.fixture(scope="session")
def guarded(small: Published, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server over `small` that wants tokens."""
    state = str(tmp_path_factory.mktemp("state"))
    tokens = {"token": "s3cret", "admin_token": "adm1n"}
    with running(small.models, max_body_mb=1, state_dir=state, **tokens) as place:
        yield place


@pytest.fixture
def unshared() -> Callable[[], None]:
    """Call it for a version that is to share nothing with those that tests have open."""
    return corpus._bases.clear


@pytest.fixture
def bundle(without_scann: Published, tmp_path: Path) -> Path:
    """A small bundle that a test may change."""
    return shutil.copytree(without_scann.bundle, tmp_path / "bundle")
