"""What feature files hold: kinds of columns, names of files, and the spec of each column.

Part of the contract between the rooms: `pipeline.contract.schema` hands all of it on. For a side
(`query` or `candidate`) with a table of attributes, prepared data hold

- `{side}_features-….parquet`: one row an id of the vocabulary, where the row number over all
  shards in order is the dense id; a shard has the rows of the vocabulary's shard of its number.
- `{side}_features_cold-….parquet`: ids of the table that the vocabulary does not hold, because
  they have no interactions or too few, with a column `raw_id` before the same columns; absent
  where there are none.
- `feature_vocabulary-{side}-{column}.parquet`: `value`, `count` of the values of a categorical or
  multi-valued column, where the code of a value is its row number + 1.
- `{side}_features_dead_letters.jsonl`: rows of the table that could not be used.

A column of a feature file has the name it has in the table. By kind it holds

- categorical: int32, 0 where the value is missing or unknown, else its code;
- multi: list<int32>, the codes of the known values, each once; empty where there are none;
- numeric: float32, (value - mean) / std, 0 where it is missing;
- text: string, empty where it is missing.

A bool column `{name}:present` follows a numeric column that has no value for some id with train
rows; it is False where there is no value.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

FEATURE_KINDS = ("categorical", "multi", "numeric", "text")
FEATURES = "features"  # key in `Manifest.details`: side → rows, files and columns
VALUE = "value"  # column of a feature vocabulary, beside `count`


@dataclasses.dataclass(frozen=True)
class FeatureSpec:
    """One column of a feature file; all that decides its values comes from ids with train rows.

    Attributes:
      name: of the column.
      kind: one of `FEATURE_KINDS`.
      vocabulary: file of the values of a categorical or multi column.
      size: values in it; codes are 1..size, and 0 for missing or unknown.
      mean: of a numeric column, in the unit of the table.
      std: of a numeric column, divided by n; 1 where all values are equal.
      max_length: of a multi column, most values of an id with train rows, rare ones too; others
        may have more.
      has_presence: of a numeric column, whether the column `presence` follows it.
      missing: ids of the vocabulary without a value.
      unknown: values of ids of the vocabulary that the vocabulary of the column does not hold.
    """

    name: str
    kind: str
    vocabulary: str = ""
    size: int = 0
    mean: float = 0.0
    std: float = 1.0
    max_length: int = 0
    has_presence: bool = False
    missing: int = 0
    unknown: int = 0

    @property
    def presence(self) -> str:
        """The name of the column that tells where there is a value."""
        return presence_name(self.name)


def presence_name(column: str) -> str:
    """The name of the bool column that tells where a column has a value."""
    return f"{column}:present"


def features_name(side: str, shard: int = 0, num_shards: int = 1) -> str:
    """Parquet with the features of the ids of a vocabulary, in dense-id order."""
    return f"{side}_features-{shard:05d}-of-{num_shards:05d}.parquet"


def cold_features_name(side: str, shard: int = 0, num_shards: int = 1) -> str:
    """Parquet with `raw_id` and features of ids without interactions."""
    return f"{side}_features_cold-{shard:05d}-of-{num_shards:05d}.parquet"


def feature_vocabulary_name(side: str, column: str) -> str:
    """Parquet with `value` and `count`, by descending count, then by value."""
    safe = re.sub(r"[^\w .-]", lambda found: f"%{ord(found[0]):02X}", column)
    return f"feature_vocabulary-{side}-{safe}.parquet"


def feature_specs(details: Mapping[str, Any], side: str) -> tuple[FeatureSpec, ...]:
    """The columns of a side's feature files, in order; none where it has no table of attributes.

    Args:
      details: those of the manifest of prepared data.
      side: query or candidate.
    """
    columns = details.get(FEATURES, {}).get(side, {}).get("columns", ())
    known = {field.name for field in dataclasses.fields(FeatureSpec)}
    return tuple(
        FeatureSpec(**{name: value for name, value in column.items() if name in known})
        for column in columns
    )
