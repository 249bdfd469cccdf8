"""Bundles that are written from arrays, then damaged; nothing here needs TensorFlow."""

import signal
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.contract import schema
from pipeline.contract.bundle import SeenLists, read_bundle, write_bundle
from pipeline.contract.files import describe_files

RNG = np.random.default_rng(0)
VALUES = RNG.normal(size=(30, 8))
NAMES = [f"id {row}" for row in range(30)]
QUERIES = RNG.normal(size=(20, 8))
SEEN_LISTS = [[], [3, 29, 0], *[[7]] * 18]


def test_attributes_are_written_in_the_types_of_the_contract(tmp_path):
    attributes = pa.table({"price": range(30), "new": [True] * 30})
    bundle = read_bundle(write_bundle(tmp_path / "bundle", VALUES, NAMES, attributes=attributes))
    assert schema.BUNDLE_ATTRIBUTES in bundle.retrieval_files
    table = pq.read_table(bundle.path / schema.BUNDLE_ATTRIBUTES)
    assert table.to_pylist()[29] == {"price": 29.0, "new": "true"}


@pytest.fixture
def bundle(tmp_path):
    return write_bundle(
        tmp_path / "bundle",
        VALUES,
        NAMES,
        sample_queries=QUERIES,
        query_ids=[f"query {row}" for row in range(20)],
        seen=SEEN_LISTS,
        source="before",
    )


def sign(bundle):
    """Writes the manifest anew, as a trainer would that made the files as they now are."""
    (bundle / schema.MANIFEST).unlink()
    schema.Manifest("bundle", "", {}, {}, describe_files(bundle)).write(bundle)


def change_array(name, change):
    return lambda bundle: np.save(bundle / name, change(np.load(bundle / name)))


def change_ids(name, change):
    def spoil(bundle):
        ids = pa.array(change([f"candidate {row}" for row in range(30)]), pa.string())
        pq.write_table(pa.table({"raw_id": ids}), bundle / name)

    return spoil


def put_nan(array):
    array[5, 1] = np.nan
    return array


def put_zeros(array):
    array[4:6] = 0
    return array


def write_counts(counts):
    return lambda bundle: np.save(bundle / schema.BUNDLE_CANDIDATE_COUNTS, counts)


def write_attributes(bundle, columns):
    pq.write_table(pa.table(columns), bundle / schema.BUNDLE_ATTRIBUTES)


def remove(name):
    return lambda bundle: (bundle / name).unlink()


VECTORS, IDS = schema.BUNDLE_VECTORS, schema.BUNDLE_CANDIDATE_IDS
OFFSETS, SEEN = schema.BUNDLE_SEEN_OFFSETS, schema.BUNDLE_SEEN_CANDIDATES
FAULTS = {
    "float64": (change_array(VECTORS, np.float64), r"must be float32 \[N, D\].* got float64"),
    "flat": (change_array(VECTORS, np.ravel), r"must be float32 \[N, D\].* got float32 \[240\]"),
    "empty": (change_array(VECTORS, lambda a: a[:0]), r"got float32 \[0, 8\]"),
    "nan": (change_array(VECTORS, put_nan), "must hold finite numbers, .* in row 5"),
    "zeros": (
        change_array(VECTORS, put_zeros),
        "can find, got only zeros in row 4, candidate 'id 4': train it, or leave it out",
    ),
    "float counts": (write_counts(np.ones(30)), r"must be int64 \[30\] .* got float64 \[30\]"),
    "few attributes": (
        lambda bundle: write_attributes(bundle, {"a": ["x"]}),
        "one row for each of the 30 candidate vectors, got 1",
    ),
    "other attributes": (
        lambda bundle: write_attributes(bundle, {"a": range(30)}),
        "must hold texts, lists of texts and float64",
    ),
    "few counts": (write_counts(np.ones(3, np.int64)), r"one for each .* got int64 \[3\]"),
    "below 0": (write_counts(np.arange(30) - 1), r"of at least 0, one for each candidate"),
    "infinite": (change_array(VECTORS, lambda a: a / 0), "must hold finite numbers"),
    "short": (change_array(VECTORS, lambda a: a[:29]), "29 candidate vectors, got 30 ids"),
    "no vectors": (remove(VECTORS), f"{VECTORS} is missing"),
    "no ids": (remove(IDS), f"{IDS} is missing"),
    "twice": (change_ids(IDS, lambda i: [*i[:29], i[3]]), "got 'candidate 3' twice"),
    "null": (change_ids(IDS, lambda i: [*i[:29], None]), "got None in row 29"),
    "empty id": (change_ids(IDS, lambda i: ["", *i[1:]]), "got '' in row 0"),
    "no offsets": (remove(OFFSETS), "must have all of .* or none"),
    "offsets": (change_array(OFFSETS, lambda a: a + 1), "seen offsets out of range"),
    "falling": (change_array(OFFSETS, lambda a: a[[0, 5, 4, *range(3, 21)]]), "out of range"),
    "few offsets": (change_array(OFFSETS, lambda a: a[:-1]), r"must be int64 \[21\]"),
    "seen": (change_array(SEEN, lambda a: a + 1), "must hold rows of the 30 .* got 1 to 30"),
    "samples": (
        change_array(schema.BUNDLE_SAMPLE_QUERIES, lambda a: a[:, :4]),
        r"must be float32 \[S, 8\] like the candidate vectors, got float32 \[20, 4\]",
    ),
}


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_bundle_is_refused(fault, bundle):
    spoil, message = FAULTS[fault]
    spoil(bundle)
    sign(bundle)
    with pytest.raises(ValueError, match=message) as error:
        read_bundle(bundle)
    assert "\n" not in str(error.value)


def test_what_was_written_is_read(bundle, tmp_path):
    content = read_bundle(bundle)
    np.testing.assert_array_equal(content.vectors, VALUES.astype(np.float32))
    np.testing.assert_array_equal(content.sample_queries, QUERIES.astype(np.float32))
    assert content.candidate_ids == NAMES
    assert (content.num_queries, content.query_ids(2)) == (20, ["query 0", "query 1"])
    offsets, candidates = (np.load(bundle / name) for name in (OFFSETS, SEEN))
    assert offsets[:4].tolist() == [0, 0, 3, 4]
    assert candidates[:4].tolist() == [3, 29, 0, 7]
    again = write_bundle(
        tmp_path / "again",
        VALUES,
        pa.array(NAMES),
        query_ids=pa.array(content.query_ids(20)),
        seen=SeenLists(offsets, candidates),
        sample_queries=QUERIES,
        query_model=lambda path: path.mkdir(),
        manifest=schema.Manifest("bundle", "there", {"dim": 8}, {"queries": 20}, {}),
    )
    assert read_bundle(again).query_model == again / schema.BUNDLE_QUERY_MODEL
    manifest = schema.read_manifest(again, "bundle")
    assert (manifest.source, manifest.counts) == ("there", {"queries": 20})
    assert manifest.files == content.manifest.files


def test_vectors_and_ids_are_enough(tmp_path):
    bundle = write_bundle(tmp_path / "bundle", np.full((1, 8), 1e-30), ["only"])
    content = read_bundle(bundle)
    assert content.candidate_ids == ["only"]
    assert (content.query_model, content.num_queries, content.query_ids(3)) == (None, None, [])
    assert sorted(path.name for path in bundle.iterdir()) == [
        "candidate_ids.parquet",
        "candidate_vectors.npy",
        "manifest.json",
    ]


def test_a_bundle_that_is_unfinished_or_changed_is_refused(bundle):
    np.save(bundle / VECTORS, np.load(bundle / VECTORS) + 1)
    with pytest.raises(ValueError, match="was changed after its manifest was written"):
        read_bundle(bundle)
    (bundle / schema.MANIFEST).unlink()
    with pytest.raises(ValueError, match="holds no finished bundle data"):
        read_bundle(bundle)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidate_ids": ["a", "b"]}, "got 2 ids: write both in the same order"),
        ({"query_ids": ["a"]}, "query_ids and seen must be given together"),
        ({"counts": np.zeros(3)}, r"must be int64 \[30\]"),
        ({"vectors": np.zeros((30, 2))}, "got only zeros in row 0, candidate 'id 0'"),
    ],
)
def test_a_refused_bundle_leaves_what_stood_there(bundle, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        write_bundle(bundle, **{"vectors": VALUES, "candidate_ids": NAMES, **change})
    assert schema.read_manifest(bundle, "bundle").source == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


KILLED = """
import os, signal, sys
import numpy as np
from pipeline.contract import bundle
from pipeline.contract.bundle import write_bundle

room, name = {"files": (bundle, "describe_files"), "renames": (os, "rename")}[sys.argv[2]]
call = getattr(room, name)
def killed(*arguments):
    if name == "rename":
        call(*arguments)  # the bundle that stood there
    os.kill(os.getpid(), signal.SIGKILL)
setattr(room, name, killed)
write_bundle(sys.argv[1], np.full([2, 2], 3), ["a", "b"])
"""


@pytest.mark.parametrize("moment", ["files", "renames"])
def test_what_a_killed_writer_left_is_gone_after_the_next(tmp_path, moment):
    bundle, new = tmp_path / "bundle", np.ones([2, 2])
    write_bundle(bundle, -new, ["a", "b"])
    before = {path.name for path in tmp_path.iterdir()}
    killed = subprocess.run([sys.executable, "-c", KILLED, str(bundle), moment])
    assert killed.returncode == -signal.SIGKILL
    assert bundle.exists() == (moment == "files")
    write_bundle(bundle, new, ["a", "b"])
    np.testing.assert_array_equal(read_bundle(bundle).vectors, new)
    assert {path.name for path in tmp_path.iterdir()} == before
