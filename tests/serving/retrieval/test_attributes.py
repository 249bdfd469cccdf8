import re

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.contract.attributes import as_attributes
from serving.errors import InvalidRequest
from serving.retrieval.attributes import MAX_WHERE_VALUES, Attributes, as_where

ROWS = [
    {"brand": "a", "tags": ["x", "y"], "price": 1.0, "new": True},
    {"brand": "b", "tags": [], "price": None, "new": False},
    {"brand": None, "tags": None, "price": 20.0, "new": None},
    {"brand": "a", "tags": ["y", "y"], "price": 20.5, "new": True},
]
TABLE = as_attributes(pa.Table.from_pylist(ROWS))


@pytest.fixture(scope="module")
def attributes():
    return Attributes(TABLE)


def rows(attributes, where):
    return np.flatnonzero(attributes.mask(attributes.check(where))).tolist()


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({"brand": ["a"]}, [0, 3]),
        ({"brand": "a"}, [0, 3]),
        ({"brand": ["b", "a", "nobody"]}, [0, 1, 3]),
        ({"brand": []}, []),
        ({"brand": ["nobody"]}, []),
        ({"tags": ["y"]}, [0, 3]),
        ({"tags": ["x", "z"]}, [0]),
        ({"price": {"max": 20}}, [0, 2]),
        ({"price": {"min": 20}}, [2, 3]),
        ({"price": {"min": 20, "max": 20}}, [2]),
        ({"price": {"min": 5, "max": 1}}, []),
        ({"new": True}, [0, 3]),
        ({"new": [True, False]}, [0, 1, 3]),
        ({"brand": ["a"], "tags": ["x"], "price": {"min": 0}, "new": True}, [0]),
        ({}, [0, 1, 2, 3]),
    ],
)
def test_conditions_worked_by_hand(attributes, where, expected):
    for _ in range(2):  # computed, then kept
        assert rows(attributes, where) == expected


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"brnd": ["a"]}, r"has brand \(text\), tags \(list\), price \(number\), new .*mean brand"),
        ({"brand": 3}, "brand must be a string, true or false, or a list of them.* got 3"),
        ({"brand": ["a", None]}, "brand must be a string"),
        ({"brand": {"min": 1}}, "brand must be a string"),
        ({"brand": b"a"}, "brand must be a string"),
        ({"brand": None}, "brand must be a string"),
        ({"tags": [["x"]]}, "tags must be a string"),
        ({"price": 3}, "price must be numbers as"),
        ({"price": {}}, "price must be numbers as"),
        ({"price": {"low": 3}}, "price must be numbers as"),
        ({"price": {"min": True}}, "price must be numbers as"),
        ({"price": {"min": float("nan")}}, "price must be numbers as"),
        ({"price": {"max": 10**400}}, "price must be numbers as"),
        ({"price": {"max": None}}, "price must be numbers as"),
        ({"price": ["1"]}, "price must be numbers as"),
        ({"brand": ["a"] * 10**5}, f"at most {MAX_WHERE_VALUES} values"),
        ({"brand": ["a"] * 6000, "tags": ["x"] * 6000}, "at most"),
        ({3: "x"}, "where has 3"),
    ],
)
def test_what_is_refused(attributes, where, message):
    with pytest.raises(InvalidRequest, match=message) as refused:
        attributes.check(where)
    assert len(str(refused.value)) < 400


def test_without_attributes_the_remedy_is_named():
    with pytest.raises(InvalidRequest, match="no attributes, export with filter_columns"):
        Attributes(pa.table({})).check({"brand": ["a"]})


def test_masks_are_kept_within_a_bound(attributes, monkeypatch):
    monkeypatch.setattr("serving.retrieval.attributes._MAX_CACHED_BYTES", 100)
    attributes = Attributes(TABLE)
    for number in range(50):
        attributes.mask({"price": (0.0, float(number))})
    assert attributes._mask_of.cache_info().currsize * len(TABLE) == 100
    assert attributes.mask({"price": (0.0, 49.0)}) is attributes.mask({"price": (0.0, 49.0)})
    unknown = [str(number) for number in range(1000)]
    assert attributes.mask({"brand": unknown}) is attributes.mask({"brand": unknown[:3]})


TEXTS = st.sampled_from(["a", "b", "ü\n\0", "true"])
VALUES = st.fixed_dictionaries(
    {
        "brand": st.one_of(st.none(), TEXTS),
        "tags": st.lists(TEXTS, max_size=3),
        "price": st.one_of(st.none(), st.integers(-3, 3).map(float)),
    }
)
WHERE = st.fixed_dictionaries(
    {},
    optional={
        "brand": st.lists(TEXTS, max_size=3),
        "tags": st.lists(TEXTS, max_size=3),
        "price": st.dictionaries(st.sampled_from(["min", "max"]), st.integers(-3, 3), min_size=1),
    },
)


@settings(max_examples=60, deadline=None)
@given(st.lists(VALUES, min_size=1, max_size=12), WHERE)
def test_masks_are_those_of_a_loop(values, where):
    table = pa.Table.from_pylist(values, TABLE.select(["brand", "tags", "price"]).schema)

    def fulfils(row):
        if "brand" in where and row["brand"] not in where["brand"]:
            return False
        if "tags" in where and not set(row["tags"]) & set(where["tags"]):
            return False
        if "price" not in where:
            return True
        bounds = where["price"]
        low, high = bounds.get("min", -9), bounds.get("max", 9)
        return row["price"] is not None and low <= row["price"] <= high

    expected = [number for number, row in enumerate(values) if fulfils(row)]
    assert rows(Attributes(as_attributes(table)), where) == expected


def test_what_people_type():
    kinds = {"kind": "text", "a:b": "list", "price": "number", "p:q": "number"}
    pairs = ["kind=tea,milk", "kind=rice", "a:b=x=y", "price:min=1", "price:max=2.5", "p:q:min=1"]
    wanted = {"kind": ["tea", "milk", "rice"], "a:b": ["x=y"], "price": {"min": 1, "max": 2.5}}
    wanted["p:q"] = {"min": 1}
    assert as_where(pairs, kinds) == wanted
    assert as_where(["price=3"], kinds) == {"price": {"min": 3, "max": 3}}
    assert as_where(["other=3"], kinds) == {"other": "3"}  # `check` says what there is


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("kind", "where must be NAME=VALUE, NAME:min=N or NAME:max=N, got 'kind'"),
        ("=tea", "where must be NAME=VALUE"),
        ("kind=", "where must be NAME=VALUE"),
        (":min=1", "where must be NAME=VALUE"),
        ("price=cheap", "where must give price a number, got 'cheap'"),
        ("price:max=", "where must be NAME=VALUE"),
        ("kind:max=tea", "where must have no max of kind, which holds texts"),
    ],
)
def test_what_people_type_wrongly(pair, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        as_where([pair], {"kind": "text", "price": "number"})
