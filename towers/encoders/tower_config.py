"""Settings of the towers; field names are flags and options of `TwoTower`, comments their help."""

from __future__ import annotations

import dataclasses
from numbers import Integral
from typing import Any

from pipeline.contract.settings import require, require_all

TOWERS = ("id", "gmf", "features", "fism", "svdpp", "light_gcn", "ngcf")
POOLINGS = ("mean", "attention")
INPUTS = ("id", "history", "features")  # what is no name of a column
_GRAPHS = ("light_gcn", "ngcf")
SUMS = ("fism", "svdpp")  # whose queries are sums of what they chose
_HISTORIES = ("features", *SUMS)
# field → towers; the other fields are for `features`
_MEANT_FOR = {
    "tower": TOWERS,
    "num_layers": _GRAPHS,
    "batch_l2": _GRAPHS,
    "popularity_power": tuple(name for name in TOWERS if name != "features"),
    "history": _HISTORIES,
    "share_items": _HISTORIES,
}


def reads(tower: str, field: str) -> bool:
    """Whether a tower reads a field of `TowerConfig`."""
    return tower in _MEANT_FOR.get(field, ("features",))


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """Which towers, and what they are made of."""

    tower: str = "id"  # id, gmf, features, fism, svdpp, light_gcn or ngcf; see `twotower towers`
    num_layers: int = 3  # light_gcn, ngcf: L, steps along the edges of the graph
    # light_gcn, ngcf: λ; the loss of a row gets λ/2 |θ|² of its query, its positive and its own
    # negatives, θ their rows of the tables, as in the published code; mostly with --l2 0
    batch_l2: float = 0.0
    # all but features, with normalize: embeddings of candidates have the length (count / mean
    # count)^popularity_power; count: train rows, or what --frequency names
    popularity_power: float = 0.0
    # features: of id, history, features (all columns of the attributes of users), or names of
    # columns
    query_inputs: tuple[str, ...] = ("history", "features")
    # features: of id, features (all columns of the attributes of items), or names of columns;
    # without id items differ by columns only
    candidate_inputs: tuple[str, ...] = ("id", "features")
    hidden: tuple[int, ...] = (64,)  # features: units of each hidden layer of the network
    feature_dim: int = 16  # features: numbers of a row for a value of a column
    # features: H, the last candidates of a query that it is known by; fism, svdpp: how many of all
    # of them a step of training reads
    history: int = 20
    history_pooling: str = "mean"  # features: how they become one vector: mean or attention
    # features, fism, svdpp: the history reads the table of the ids of candidates
    share_items: bool = True
    # features: share of ids whose row a step drops, so that ids without rows can be served
    id_dropout: float = 0.1
    text_buckets: int = 16_384  # features: codes that the n-grams of texts are hashed to

    def __post_init__(self) -> None:
        for name in ("query_inputs", "candidate_inputs", "hidden"):
            value = getattr(self, name)
            values = (value,) if isinstance(value, (str, int)) else tuple(value)
            object.__setattr__(self, name, values)
        require(self.tower in TOWERS, "tower", f"must be one of {TOWERS}", self.tower)
        for field in dataclasses.fields(TowerConfig):
            value = getattr(self, field.name)
            if value != field.default and not reads(self.tower, field.name):
                towers = [tower for tower in TOWERS if reads(tower, field.name)]
                raise ValueError(
                    f"{field.name} is for tower {' or '.join(towers)}, got {value!r} with "
                    f"{self.tower}; leave out {field.name}."
                )
        sizes = ("num_layers", "feature_dim", "history", "text_buckets")
        require_all(self, "must be at least 1", *sizes)
        require_all(self, "must be at least 0", "batch_l2")
        require_all(self, "must be finite", "popularity_power")
        require_all(self, "must be in [0, 1)", "id_dropout")
        units, pooling = self.hidden, self.history_pooling
        whole = all(isinstance(n, Integral) and n >= 1 for n in units)
        require(whole, "hidden", "must be whole numbers of at least 1", units)
        require(pooling in POOLINGS, "history_pooling", f"must be one of {POOLINGS}", pooling)
        for name in ("query_inputs", "candidate_inputs"):
            require(bool(getattr(self, name)), name, "must name an input", getattr(self, name))
        rule = "must be without history, which only queries have"
        given = self.candidate_inputs
        require("history" not in given, "candidate_inputs", rule, given)

    def inputs(self, side: str) -> tuple[str, ...]:
        """The inputs of a side, query or candidate."""
        return self.query_inputs if side == "query" else self.candidate_inputs

    @property
    def tower_settings(self) -> dict[str, Any]:
        """The fields of this class by name, without those of a class that extends it."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(TowerConfig)}


def split_options(options: dict[str, Any]) -> tuple[TowerConfig, dict[str, Any]]:
    """What of some options is for the towers, checked, and the rest, which is for the method."""
    names = {field.name for field in dataclasses.fields(TowerConfig)}
    config = TowerConfig(**{name: value for name, value in options.items() if name in names})
    return config, {name: value for name, value in options.items() if name not in names}
