import numpy as np
import pyarrow as pa
import pytest

from pipeline.contract.attributes import LIST, NUMBER, TEXT, as_attributes


def test_columns_of_any_trainer_become_texts_lists_and_numbers():
    table = pa.table(
        {
            "brand": pa.array(["a", "", None]).dictionary_encode(),
            "in_stock": [True, False, None],
            "price": [1, None, 3],
            "weight": np.array([0.5, np.nan, np.inf]),
            "tags": [["x", "y"], None, []],
        }
    )
    attributes = as_attributes(table)
    assert attributes.schema.types == [TEXT, TEXT, NUMBER, NUMBER, LIST]
    assert attributes.to_pydict() == {
        "brand": ["a", None, None],
        "in_stock": ["true", "false", None],
        "price": [1.0, None, 3.0],
        "weight": [0.5, None, None],
        "tags": [["x", "y"], [], []],
    }
    assert as_attributes(attributes).equals(attributes)
    assert as_attributes(table.slice(1)).to_pydict()["tags"] == [[], []]


def test_columns_of_later_rows_take_the_types_of_the_first():
    like = pa.schema([("sub", TEXT), ("price", NUMBER), ("tags", LIST), ("new", TEXT)])
    table = pa.table({"sub": [110401.0, None], "tags": pa.nulls(2), "price": ["1.5", "2"]})
    assert as_attributes(table, like).to_pydict() == {
        "sub": ["110401", None],
        "price": [1.5, 2.0],
        "tags": [None, None],
        "new": [None, None],
    }
    with pytest.raises(ValueError, match="attribute 'price' must hold numbers"):
        as_attributes(pa.table({"price": ["cheap"]}), like)
    tags = pa.list_(pa.field("element", pa.string()))  # as Parquet calls it
    like = like.set(2, pa.field("tags", tags))
    with pytest.raises(ValueError, match="attribute 'tags' must hold lists of texts"):
        as_attributes(pa.table({"tags": ["cheap"]}), like)


def test_other_columns_are_refused():
    with pytest.raises(ValueError, match=r"attribute 'day' must hold texts, .* got date32"):
        as_attributes(pa.table({"day": pa.array([0], pa.date32())}))
