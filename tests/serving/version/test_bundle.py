import shutil

import numpy as np
import pytest

from pipeline.contract import schema
from pipeline.contract.bundle import read_bundle
from serving.publish.publish import publish


def change_array(name, change):
    def spoil(bundle, write_ids):
        np.save(bundle / name, change(np.load(bundle / name)))

    return spoil


def change_ids(name, change):
    def spoil(bundle, write_ids):
        ids = [f"candidate {row}" for row in range(30)]
        write_ids(bundle / name, change(ids))

    return spoil


def put_nan(array):
    array[5, 1] = np.nan
    return array


def put_zeros(array):
    array[4:6] = 0
    return array


def write_counts(counts):
    return lambda bundle, write_ids: np.save(bundle / schema.BUNDLE_CANDIDATE_COUNTS, counts)


def remove(name):
    return lambda bundle, write_ids: (bundle / name).unlink()


VECTORS, IDS = schema.BUNDLE_VECTORS, schema.BUNDLE_CANDIDATE_IDS
OFFSETS, SEEN = schema.BUNDLE_SEEN_OFFSETS, schema.BUNDLE_SEEN_CANDIDATES
FAULTS = {
    "float64": (change_array(VECTORS, np.float64), r"must be float32 \[N, D\].* got float64"),
    "flat": (change_array(VECTORS, np.ravel), r"must be float32 \[N, D\].* got float32 \[240\]"),
    "empty": (change_array(VECTORS, lambda a: a[:0]), r"got float32 \[0, 8\]"),
    "nan": (change_array(VECTORS, put_nan), "must hold finite numbers, .* in row 5"),
    "zeros": (
        change_array(VECTORS, put_zeros),
        "can find, got only zeros in row 4, candidate 'cañdidate 28': train it, or leave it out",
    ),
    "float counts": (write_counts(np.ones(30)), r"must be int64 \[30\] .* got float64 \[30\]"),
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
def test_a_faulty_bundle_is_refused_and_leaves_nothing(
    fault, bundle, tmp_path, write_ids, sign_bundle
):
    spoil, message = FAULTS[fault]
    spoil(bundle, write_ids)
    sign_bundle(bundle)
    with pytest.raises(ValueError, match=message) as error:
        publish(bundle, tmp_path / "models", scann=False)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "models").exists()


def test_a_bundle_without_manifest_is_unfinished(bundle):
    (bundle / schema.MANIFEST).unlink()
    with pytest.raises(ValueError, match="holds no finished bundle data"):
        read_bundle(bundle)


def test_a_bundle_that_was_changed_after_its_manifest_is_refused(bundle):
    path = bundle / schema.BUNDLE_VECTORS
    np.save(path, np.load(path) + 1)
    with pytest.raises(ValueError, match="was changed after its manifest was written"):
        read_bundle(bundle)


def test_a_corpus_of_one_is_fine(bundle, write_ids, sign_bundle):
    for name in (schema.BUNDLE_QUERY_IDS, OFFSETS, SEEN):
        (bundle / name).unlink()
    np.save(bundle / VECTORS, np.full((1, 8), 1e-30, np.float32))
    write_ids(bundle / IDS, ["only"])
    sign_bundle(bundle)
    content = read_bundle(bundle)
    assert content.candidate_ids == ["only"]
    assert content.num_queries is None
    assert content.query_ids(3) == []


def test_a_query_model_of_another_size_is_refused(bundle, tmp_path, sign_bundle):
    np.save(bundle / VECTORS, np.load(bundle / VECTORS)[:, :4].copy())
    (bundle / schema.BUNDLE_SAMPLE_QUERIES).unlink()
    sign_bundle(bundle)
    with pytest.raises(ValueError, match=r"must give embeddings float32 \[B, 4\]"):
        publish(bundle, tmp_path / "models", scann=False)
    assert not list((tmp_path / "models" / "twotower").glob("[!.]*"))
    assert not list((tmp_path / "models" / "twotower").glob(".partial*"))


def test_a_query_model_that_is_none_is_refused(bundle, tmp_path, sign_bundle):
    shutil.rmtree(bundle / schema.BUNDLE_QUERY_MODEL)
    (bundle / schema.BUNDLE_QUERY_MODEL).mkdir()
    sign_bundle(bundle)
    with pytest.raises(ValueError, match="must be a SavedModel"):
        publish(bundle, tmp_path / "models", scann=False)
