"""The published tables: which methods, with which settings, and what the papers report.

Settings follow the authors' code where it departs from the paper, as named options: the positive
counted twice, the cache of XIR redrawn from this step's draws, sums in place of means.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from towers.presets import FLAGS

Metrics = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Row:
    """A method of a table.

    Attributes:
      settings: what differs from those of the table; fields of `TrainConfig`.
      options: of the method.
      paper: metric → the published value.
      method: its name in `samplers.METHODS`, where the row has another name.
    """

    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    paper: Metrics = dataclasses.field(default_factory=dict)
    method: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """A published table on one data set.

    Attributes:
      title: for the page.
      paper: where it comes from.
      settings: of all rows; fields of `TrainConfig`.
      metrics: the columns.
      rows: name → row.
      runs: another table of the data set whose runs are these too; none: it has its own.
      published: methods that are not built here, and what the paper has for them.
      epochs: of the paper, or what is enough here.
      seconds: row → CPU seconds of an epoch, where `epoch_seconds` does not know them.
    """

    title: str
    paper: str
    settings: Mapping[str, Any]
    metrics: tuple[str, ...]
    rows: Mapping[str, Row]
    runs: str = ""
    published: Mapping[str, Metrics] = dataclasses.field(default_factory=dict)
    epochs: int = 100
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)


_MEAN = {
    "dim": 32,
    "batch_size": 2048,
    "learning_rate": 0.01,
    "learning_rate_decay": 0.95,
    "decay_epochs": 5,
    "l2": 1e-5,
    "init_stddev": 1.0,
    "reduction": "mean",
}
# AdaSIR's paper says a learning rate of .001 for 200 epochs; the published script, .01. Its
# negatives are drawn from all items, also where the paper leaves out what the user chose.
_SUM = _MEAN | {
    "batch_size": 4096,
    "init_stddev": 0.1,
    "reduction": "sum",
    "exclude_seen_negatives": False,
}
_TWICE = {"positive_twice": True}
_SFX = _TWICE | {"published_start": True, "published_buckets": True}
_DRAWN = {"redraw": "drawn"}
_PUBLISHED_W = {"add_log_weights": True, "count_below": True}
LIGHT_FM = {"num_negatives": 10, "margin": 1.0}  # whose WARP is that of the AdaSIR paper
_NO_MARGIN = {"num_negatives": 100, "margin": 0.0}


def _bmns(r10: float, r20: float, r50: float, n10: float, n50: float | None) -> Metrics:
    found = {"recall@10": r10, "recall@20": r20, "recall@50": r50, "ndcg_xir@10": n10}
    return found if n50 is None else found | {"ndcg_xir@50": n50}


def _xir(n10: float, r10: float) -> Metrics:
    return {"recall@10": r10, "ndcg_xir@10": n10}


def _hard(r50: float, n50: float) -> Metrics:
    return {"recall@50": r50, "ndcg@50": n50}


def _xir_rows(values: Mapping[str, tuple[float, float]]) -> Mapping[str, Row]:
    """The rows of a table of the XIR paper, from (NDCG as it defines it, recall) at 10."""
    options: dict[str, Mapping[str, Any]] = {
        "ssl": _TWICE,
        "ssl_pop": _TWICE,
        "correct_sfx": _SFX,
        "mns": _TWICE,
        "bir": {},
        "xir": _DRAWN,
    }
    rows = {name: Row({}, options[name], _xir(*pair)) for name, pair in values.items()}
    kinds = ("equal", "importance")
    return rows | {f"bir, {kind} weights": Row({}, {"weights": kind}, {}, "bir") for kind in kinds}


def _sdns_rows(
    bpr: tuple[float, float],
    dns: tuple[float, float],
    soft: tuple[float, float],
    learning_rate: float,
) -> Mapping[str, Row]:
    """The rows of a table of the Soft BPR paper, from (Recall, NDCG) at 50 on LightGCN.

    On NGCF, of which no values are published, they have the same settings.
    """
    drawn = {"num_negatives": 16}
    rows = {
        "bpr": Row({"batch_l2": 1e-3}, {}, _hard(*bpr)),
        "dns": Row({"batch_l2": 1e-2}, drawn, _hard(*dns)),
        "soft_bpr": Row(
            {"learning_rate": learning_rate, "batch_l2": 1e-3},
            {**drawn, "soft_factor": 0.1},
            _hard(*soft),
        ),
    }
    return rows | {
        f"{method}, ngcf": Row({**row.settings, "tower": "ngcf"}, row.options, {}, method)
        for method, row in rows.items()
    }


# Section 4.5 of the XIR paper: the item tower has layers of 32 and 16 units with ReLU over
# categorical columns. Ta-Feng has one, subclass; queries are ids.
_ITEM_FEATURES = {
    "tower": "features",
    "query_inputs": ("id",),
    "candidate_inputs": ("id", "features"),
    "hidden": (32, 16),
    "id_dropout": 0.0,
}

# Chosen on a tenth of the train rows that was held out; what lost is told in docs/paper_tables.md.
_COSINE = {"normalize": True, "temperature": 0.1, "l2": 0.0, "decay_epochs": 1, "batch_size": 1024}
_FISM = _COSINE | {
    "tower": "fism",
    "optimizer": "adagrad",
    "learning_rate": 2.5,
    "learning_rate_decay": 0.8,
    "init_stddev": 0.03,
}
_TEACHER = "fism by popularity, d = 256"
_DISTILLED = _COSINE | {
    "teacher": _TEACHER,  # a row of the table; that of one seed for all seeds. init_from: one too
    "popularity_power": 0.06,
    "learning_rate": 0.01,
    "learning_rate_decay": 0.7,
    "init_stddev": 0.1,
}
_APART = "method", "options", "epochs"  # of presets: what a row has beside its settings
_BEST = {
    32: {"recall@10": 0.1344, "recall@50": 0.3022, "ndcg@50": 0.1837},
    64: {"recall@20": 0.2121, "ndcg@20": 0.1709},
}

TABLES: Mapping[tuple[str, str], Table] = {
    ("bmns", "gowalla"): Table(
        "Batch-Mix Negative Sampling, Gowalla",
        "CIKM 2023, Table 2 and the table of its code; `xir`: NeurIPS 2022",
        _MEAN,
        ("recall@10", "recall@20", "recall@50", "ndcg_xir@10", "ndcg_xir@50", "ndcg@50"),
        {
            "ssl": Row(
                {"learning_rate": 0.005}, _TWICE, _bmns(0.1154, 0.1678, 0.2653, 0.1440, 0.2942)
            ),
            "ssl_pop": Row({}, _TWICE, _bmns(0.1201, 0.1709, 0.2640, 0.1597, 0.3027)),
            "correct_sfx": Row({}, _SFX, _bmns(0.1223, 0.1765, 0.2767, 0.1560, 0.3100)),
            "mns": Row({}, _TWICE, _bmns(0.1207, 0.1718, 0.2651, 0.1602, 0.3038)),
            "bir": Row({}, {}, _bmns(0.1207, 0.1715, 0.2650, 0.1607, None)),
            "xir": Row({}, _DRAWN, _xir(0.1543, 0.1169)),
            "bmns": Row(
                {"l2": 1e-6},
                _TWICE | {"num_mixed": 128},
                _bmns(0.1344, 0.1935, 0.3022, 0.1720, 0.3392),
            ),
            "bmns, K = B": Row(
                {"l2": 1e-6},
                _TWICE | {"num_mixed": 2048},
                _bmns(0.1344, 0.1935, 0.3022, 0.1720, 0.3392),
                method="bmns",
            ),
            "bmns, K = B, weights not corrected": Row(
                {"l2": 1e-6},
                _TWICE | {"num_mixed": 2048, "correct_weights": False},
                {"ndcg_xir@10": 0.1722, "ndcg_xir@50": 0.3391, "recall@50": 0.3021},
                method="bmns",
            ),
            "positive_mixing": Row({"l2": 1e-6}, _TWICE | {"num_mixed": 2048}),
        },
        seconds={
            "bmns, K = B": 29.0,
            "bmns, K = B, weights not corrected": 29.0,
            "positive_mixing": 29.0,
        },
    ),
    ("bmns", "tafeng"): Table(
        "Batch-Mix Negative Sampling, Ta-Feng",
        "nothing, the paper has other data sets; K = 128",
        _MEAN,
        ("recall@10", "recall@20", "recall@50", "ndcg_xir@10", "ndcg_xir@50", "ndcg@50"),
        {
            "ssl_pop": Row({}, _TWICE),
            "bmns": Row({}, _TWICE | {"num_mixed": 128}),
            "bmns, l2 1e-6": Row({"l2": 1e-6}, _TWICE | {"num_mixed": 128}, method="bmns"),
            "bmns, weights not corrected": Row(
                {}, _TWICE | {"num_mixed": 128, "correct_weights": False}, method="bmns"
            ),
            "positive_mixing": Row({}, _TWICE | {"num_mixed": 128}),
        },
        runs="xir",
        epochs=30,
    ),
    ("xir", "gowalla"): Table(
        "Cache-Augmented Inbatch Importance Resampling, Gowalla",
        "NeurIPS 2022",
        _MEAN,
        ("recall@10", "ndcg_xir@10", "recall@50", "ndcg@50"),
        _xir_rows(
            {
                "ssl": (0.1381, 0.1105),
                "ssl_pop": (0.1479, 0.1124),
                "correct_sfx": (0.1500, 0.1176),
                "mns": (0.1486, 0.1130),
                "bir": (0.1523, 0.1157),
                "xir": (0.1543, 0.1169),
            }
        ),
        runs="bmns",
    ),
    ("xir", "tafeng"): Table(
        "Cache-Augmented Inbatch Importance Resampling, Ta-Feng",
        "NeurIPS 2022",
        _MEAN,
        ("recall@10", "ndcg_xir@10", "recall@50", "ndcg@50"),
        _xir_rows(
            {
                "ssl": (0.0437, 0.0375),
                "ssl_pop": (0.0625, 0.0506),
                "mns": (0.0634, 0.0514),
                "correct_sfx": (0.0496, 0.0415),
                "bir": (0.0675, 0.0549),
                "xir": (0.0730, 0.0589),
            }
        )
        | {
            f"{name}, item features": Row(_ITEM_FEATURES, options, {}, name)
            for name, options in (("ssl_pop", _TWICE), ("bir", {}), ("xir", _DRAWN))
        },
        seconds={
            f"{name}, item features": seconds
            for name, seconds in (("ssl_pop", 6.2), ("bir", 13.0), ("xir", 29.0))
        },
    ),
    ("adasir", "gowalla"): Table(
        "Importance Resampling for Implicit Feedback, Gowalla",
        "WWW 2022; where it differs from the second run in WWW 2023, the lower value",
        _SUM | {"l2": 0.01, "learning_rate": 0.001},
        ("recall@50", "ndcg@50"),
        {
            "bpr": Row({}, {"num_negatives": 5}, _hard(0.1985, 0.1214)),
            "aobpr": Row({}, {}, _hard(0.2369, 0.1385)),
            "warp": Row({}, _NO_MARGIN, _hard(0.2240, 0.1248)),
            "warp, 10 draws, margin 1": Row({}, LIGHT_FM, _hard(0.2240, 0.1248), "warp"),
            "dns": Row({}, {}, _hard(0.1839, 0.1412)),
            "pris_u": Row({}, {}, _hard(0.2217, 0.1334)),
            "pris_p": Row({}, {}, _hard(0.2282, 0.1385)),
            "kernel": Row({}, {}, _hard(0.2264, 0.1399)),
            "adasir_u": Row({}, {}, _hard(0.2500, 0.1489)),
            "adasir_p": Row({}, {}, _hard(0.2516, 0.1519)),
            "adasir_w": Row({}, {}, _hard(0.2543, 0.1503)),
            "adasir_u, published code": Row(
                {}, {"add_log_weights": True}, _hard(0.2500, 0.1489), "adasir_u"
            ),
            "adasir_p, published code": Row(
                {}, {"add_log_weights": True}, _hard(0.2516, 0.1519), "adasir_p"
            ),
            "adasir_w, published code": Row(
                {},
                _PUBLISHED_W,
                _hard(0.2543, 0.1503),
                "adasir_w",
            ),
        }
        | {
            f"adasir_w, {name}": Row(settings, options, _hard(0.2543, 0.1503), "adasir_w")
            for name, settings, options in (
                ("published code, l2 .1", {"l2": 0.1}, _PUBLISHED_W),
                ("l2 .03", {"l2": 0.03}, {}),
                ("l2 .06", {"l2": 0.06}, {}),
                ("what users chose left out of the pools", {"exclude_seen_negatives": True}, {}),
                ("pools of 1,000", {}, {"pool_size": 1000}),
            )
        }
        | {
            "adasir_u, published code, l2 .001": Row(
                {"l2": 0.001}, {"add_log_weights": True}, _hard(0.2500, 0.1489), "adasir_u"
            )
        }
        | {
            f"{method}, gmf": Row({"tower": "gmf"}, {}, {}, method)
            for method in ("pris_u", "adasir_u", "adasir_p", "adasir_w")
        },
        published={"IRGAN": _hard(0.2242, 0.1443), "SRNS": _hard(0.2152, 0.1317)},
        epochs=200,
    ),
    ("dns_softmax", "gowalla"): Table(
        "On the Theories behind Hard Negative Sampling, Gowalla",
        "WWW 2023",
        _SUM | {"l2": 0.01},
        ("recall@50", "ndcg@50"),
        {
            "dns_mn": Row({}, {"sum_over_kept": True}, _hard(0.2989, 0.1811)),
            "softmax_v": Row({}, {}, _hard(0.2993, 0.1837)),
        },
        epochs=200,
    ),
    ("draws", "gowalla"): Table(
        "Draws of BIR rounded or expected, Gowalla",
        "nothing, it draws independently; 20 epochs compare the draws",
        _MEAN,
        ("recall@10", "recall@20", "recall@50", "ndcg@20"),
        {
            f"bir, {draws} draws": Row({}, {"draws": draws}, {}, "bir")
            for draws in ("rounded", "expected")
        },
        epochs=20,
    ),
    ("groups", "gowalla"): Table(
        "Draws of each row alone, or shared by G rows, Gowalla",
        "nothing, it draws for each row; 10 epochs compare the two",
        _SUM | {"l2": 0.01},
        ("recall@10", "recall@20", "recall@50", "ndcg@20"),
        {
            f"{name}, G = {size}": Row({}, {"group_size": size}, {}, name)
            for name in ("dns", "dns_mn", "softmax_v")
            for size in (1, 8)
        },
        epochs=10,
    ),
    ("beyond", "gowalla"): Table(
        "Beyond the papers, Gowalla",
        "the best of the five papers with d = 32; SL@K, KDD 2025, whose split differs, with d = 64",
        {},
        ("recall@10", "recall@20", "recall@50", "ndcg@20", "ndcg@50"),
        {
            f"fism{name}, d = {dim}": Row(_FISM | {"dim": dim} | extra, {}, best, "ssl_pop")
            for dim, best in _BEST.items()
            for name, extra in (("", {}), (" by popularity", {"popularity_power": 0.04}))
        }
        | {
            _TEACHER: Row(
                _FISM | {"dim": 256, "popularity_power": 0.04, "learning_rate_decay": 0.7},
                method="ssl_pop",
            )
        }
        | {
            f"distilled, d = {dim}": Row(
                _DISTILLED | {"dim": dim, "init_from": f"fism by popularity, d = {dim}"},
                {},
                best,
                "full_softmax",
            )
            for dim, best in _BEST.items()
        }
        | {
            f"preset {name}": Row(
                {k: v for k, v in FLAGS[name].items() if k not in _APART} | extra,
                FLAGS[name].get("options", {}),
                _BEST[64],
                FLAGS[name]["method"],
            )
            for name, extra in (
                ("best", {}),
                ("student", {"teacher": "preset best", "init_from": "preset best"}),
            )
        },
    ),
    **{
        ("sdns", name): Table(
            f"Soft BPR on LightGCN, {name.capitalize()}",
            "Soft BPR, Table 2",
            _MEAN
            | {"tower": "light_gcn", "num_layers": 3, "dim": 64, "init_stddev": 0.1}
            | {"learning_rate": 0.005, "l2": 0.0, "exclude_seen_negatives": True},
            ("recall@50", "ndcg@50"),
            _sdns_rows(uniform, dns, soft, learning_rate=0.01 if name == "tmall" else 0.005),
            published={
                name: _hard(*values)
                for name, values in zip(("IRGAN", "AdvIR", "MixGCF"), others, strict=True)
            },
            epochs=25,
            seconds={
                f"{method}{tower}": 16.0 * factor * (1.5 if name == "taobao" else 1.0)
                for method in ("bpr", "dns", "soft_bpr")
                for tower, factor in (("", 1.0), (", ngcf", 1.6))
            },
        )
        for name, uniform, dns, soft, others in (
            (
                "tmall",
                (0.0895, 0.0476),
                (0.0951, 0.0504),
                (0.1051, 0.0552),
                ((0.0904, 0.0480), (0.0917, 0.0487), (0.0963, 0.0508)),
            ),
            (
                "taobao",
                (0.1041, 0.0378),
                (0.1107, 0.0410),
                (0.1162, 0.0425),
                ((0.1049, 0.0380), (0.1052, 0.0382), (0.1110, 0.0403)),
            ),
        )
    },
}

# CPU seconds of an epoch of Gowalla with d = 32 on one core of an AMD EPYC with AVX-512, from the
# steps of benchmarks/results/train_step.json and two rows that were run.
_STEP_SECONDS = {
    **{"ssl": 7.9, "ssl_pop": 8.6, "correct_sfx": 9.7, "mns": 17.0, "bir": 16.0, "xir": 32.0},
    **{"bmns": 11.0, "positive_mixing": 11.0, "full_softmax": 111.0},
    **{"bpr": 3.4, "aobpr": 4.3, "warp": 8.9, "dns": 4.4, "soft_bpr": 5.0, "pris_u": 5.5},
    **{"pris_p": 7.8, "kernel": 24.0, "adasir_u": 6.4, "adasir_p": 6.4, "adasir_w": 17.0},
    **{"dns_mn": 13.4, "softmax_v": 81.0},
}
_SHARES = {"gowalla": 1.0, "tafeng": 0.6}  # of its rows in each data set


def epoch_seconds(table: Table, dataset: str, name: str) -> float:
    """Estimated CPU seconds of an epoch of a row; 0 where nothing is known."""
    seconds = _STEP_SECONDS.get(table.rows[name].method or name, 0.0)
    return table.seconds.get(name, seconds * _SHARES.get(dataset, 0.0))


_SHORT = _MEAN | {"normalize": True, "temperature": 0.1, "l2": 0.0, "init_stddev": 0.1}


_L2_OF_PAIRS = 0.01  # of losses whose gradient is that of one pair


def _loss_scale(method: str, options: Mapping[str, Any]) -> float:
    """How large a gradient is beside that of the tables: coupled L2 is to weigh as much there.

    Soft BPR has a factor of 1 - α. DNS(M, N) is a mean here, and in its table a sum of two.
    """
    if method == "soft_bpr":
        return options.get("soft_factor", 0.1)  # the default of the method
    return 0.5 if method == "dns_mn" else 1.0


def _sweep(title: str, method: str, option: str, values: tuple[float, ...]) -> Table:
    """One option of a method, or the batch size, over some values; they name the rows."""
    pairs = method in ("adasir_u", "dns_mn", "softmax_v", "soft_bpr")
    extra = {"bmns": _TWICE, "ssl_pop": _TWICE, "xir": _DRAWN}.get(method, {})
    extra = extra | {"num_kept": 5} if title.startswith("N of") else extra
    rows = {}
    for value in values:
        options, own = dict(extra), {}
        (own if option == "batch_size" else options)[option] = value
        if pairs:
            own["l2"] = _L2_OF_PAIRS * _loss_scale(method, options)
        rows[f"{method} {option}={value}"] = Row(own, options, {}, method)
    settings = _SUM if pairs else _SHORT
    cuts = (5, 10, 20, 50) if method in ("dns_mn", "softmax_v") else (10, 20, 50)
    metrics = tuple(f"recall@{k}" for k in cuts)
    return Table(title, "", settings, metrics, rows, runs="figures", epochs=8 if pairs else 5)


def _by_epoch(dataset: str, title: str, method: str, options: Mapping[str, Any]) -> Table:
    """A row of Soft BPR's table with other options, followed epoch by epoch on validation."""
    table = TABLES["sdns", dataset]
    row = table.rows[method]
    rows = {
        f"{method} {name}": Row(row.settings, {**row.options, **extra}, {}, method)
        for name, extra in options.items()
    }
    seconds = dict.fromkeys(rows, table.seconds[method])
    metrics = ("recall@50",)
    return Table(title, "", table.settings, metrics, rows, "figures", epochs=40, seconds=seconds)


_HARDNESS = {f"H={size}": {"num_negatives": size} for size in (8, 16, 32, 64)}
_MIXING = {
    f"{mix}, alpha={1 - factor:g}": {"soft_factor": factor, "mix": mix}
    for mix, factors in (("fixed", (1, 0.5, 0.3, 0.1)), ("uniform", (0.5, 0.1)))
    for factor in factors
}

# What the papers show as curves, on one data set: option → its values. Softmax with cosines, which
# is near its best after few epochs; pairs as in the tables. And quality by time or by epoch, of
# runs with --patience, since without a validation part there is nothing to follow.
FIGURES: Mapping[tuple[str, str], Table] = {
    ("time", "tafeng"): Table(
        "Recall by training time",
        "",
        _MEAN,
        ("recall@50",),
        {
            "ssl": Row({}, _TWICE),
            "ssl_pop": Row({}, _TWICE),
            "mns": Row({}, _TWICE),
            "bir": Row(),
            "xir": Row({}, _DRAWN),
            "bmns": Row({}, _TWICE | {"num_mixed": 128}),
        },
        runs="figures",
    ),
    **{
        (name, dataset): _by_epoch(dataset, title, method, options)
        for dataset in ("tmall", "taobao")
        for name, title, method, options in (
            ("hardness", "H of DNS", "dns", _HARDNESS),
            ("mixing", "α of positive mixing", "soft_bpr", _MIXING),
        )
    },
} | {
    (name, "gowalla"): _sweep(title, method, option, values)
    for name, title, method, option, values in (
        ("gamma", "γ of BMNS", "bmns", "gamma", (0, 0.2, 0.5, 1)),
        ("mixed", "K of BMNS", "bmns", "num_mixed", (8, 128, 512)),
        ("resampled", "|R_u| of BIR", "bir", "num_resampled", (32, 256, 2048)),
        ("cache_weight", "λ of XIR", "xir", "cache_weight", (0, 0.2, 0.8)),
        ("cache_size", "cache of XIR", "xir", "cache_size", (1024, 2048, 4096, 8192)),
        ("pool", "pool of AdaSIR", "adasir_u", "pool_size", (10, 50, 100, 200, 400, 1000, 2000)),
        ("kept", "M of DNS(M, N), N = 200", "dns_mn", "num_kept", (1, 2, 5, 20)),
        ("of", "N of DNS(M, N), M = 5", "dns_mn", "num_negatives", (20, 50, 200, 500)),
        ("dro", "β of the DRO loss, N = 200", "dns_mn", "dro", (0.01, 0.0125, 0.025)),
        ("rho", "ρ of Softmax-v, N = 200", "softmax_v", "rho", (0.1, 1, 3)),
        ("soft", "1 − α of soft BPR", "soft_bpr", "soft_factor", (0.05, 0.2, 0.7)),
        ("drawn", "H of soft BPR", "soft_bpr", "num_negatives", (4, 16, 64)),
        ("batch_pop", "B of SSL-Pop", "ssl_pop", "batch_size", (512, 2048, 8192)),
        ("batch_bmns", "B of BMNS", "bmns", "batch_size", (512, 2048, 8192)),
        ("batch_bir", "B of BIR", "bir", "batch_size", (512, 2048, 8192)),
    )
}
