"""Data quality: what became of the rows, and how they are distributed over ids and days.

Pure functions on counts and histograms. The same numbers go into the manifest, onto the page
`quality.html` and, from a dry run, to the terminal.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from pipeline.contract import schema
from pipeline.prepare.settings import PrepareConfig
from pipeline.quality.histogram import Histogram, as_text, concentration, describe, log_bins
from pipeline.quality.measures import Measures
from pipeline.read.consumed import short_names

HEAD_SHARE = 0.01  # of the ids of a side
MAX_DAYS = 3660  # of which each is listed with its rows; more are a mistake in most logs
MAX_GAPS, MAX_REASONS = 100, 20  # listed, the longest and the most frequent
DROPS = {  # count of the manifest → what it is called for people
    "bad": "bad",
    "below_threshold": "below the rating threshold",
    "duplicates": "duplicates of an earlier row",
    "k_core": "lost to the k-core",
}


def check_days(days: dict[str, int], config: PrepareConfig) -> None:
    """Raises ValueError where more days have no rows than `max_empty_days` allows."""
    if config.max_empty_days is None:
        return
    gaps = gaps_between(days)
    empty = sum(gap["days"] for gap in gaps)
    if empty > config.max_empty_days:
        shown = ", ".join(span(gap) for gap in gaps[:3]) + (", ..." if gaps[3:] else "")
        raise ValueError(
            f"{config.source} has no rows on {empty} day(s) between its first and its last "
            f"({shown}), more than --max_empty_days {config.max_empty_days}; is a part of the log "
            "missing? Raise it where that is as it should be."
        )


def gaps_between(days: dict[str, int]) -> list[dict[str, Any]]:
    """The runs of days without rows between days, YYYY-MM-DD in order, that have some.

    Of each `from` and `to`, both empty themselves, and `days`, how many they are.
    """
    known, day = np.array(list(days), "datetime64[D]"), np.timedelta64(1, "D")
    return [
        {"from": str(before + day), "to": str(after - day), "days": int((after - before) / day) - 1}
        for before, after in itertools.pairwise(known)
        if after - before > day
    ]


def span(gap: dict[str, Any]) -> str:
    """A gap as text: one day, or the first and the last."""
    return gap["from"] if gap["days"] == 1 else f"{gap['from']} to {gap['to']}"


def quality(read: dict[str, Any], counts: dict[str, int], measured: Measures) -> dict[str, Any]:
    """Everything that a preparation is judged by: `details["quality"]`; shares are in [0, 1].

    `read` is from `check_ingested`, `counts` are rows at every step, as in the manifest.
    """
    steps = ("read", *DROPS, "rows", *schema.SPLITS)
    sides = {side: _side(read["ids"][side], measured.degrees[side]) for side in schema.SIDES}
    pairs = sides["query"]["ids"] * sides["candidate"]["ids"]
    held_out = counts["validation"] + counts["test"]
    names = short_names(read["files"])
    return {
        "rows": {name: counts[name] for name in steps},
        "bad_share": counts["bad"] / counts["read"],
        "bad_reasons": dict(list(read["reasons"].items())[:MAX_REASONS]),
        "files": {names[path]: rows for path, rows in read["files"].items()},
        "days": _days(read["days"]),
        "density": counts["rows"] / pairs,
        "cold": {
            "candidates_without_train_rows": measured.candidates_without_train_rows,
            "held_out_rows": measured.cold_rows,
            "share_of_held_out_rows": measured.cold_rows / held_out if held_out else 0.0,
        },
        **sides,
    }


def _side(before: int, degrees: Histogram) -> dict[str, Any]:
    return {
        "ids_before_k_core": before,
        "lost_to_k_core": before - degrees.size,
        **describe(degrees, HEAD_SHARE),
        "bins": log_bins(degrees),
        "concentration": concentration(degrees),
    }


def _days(days: dict[str, int]) -> dict[str, Any] | None:
    """The rows of each day and the gaps between them; None where rows have no time."""
    if not days:
        return None
    gaps = gaps_between(days)
    described = {
        "first": next(iter(days)),
        "last": next(reversed(days)),
        "with_rows": len(days),
        "without_rows": sum(gap["days"] for gap in gaps),
        "longest_gaps": sorted(gaps, key=lambda gap: -gap["days"])[:MAX_GAPS],
    }
    return described | ({"rows": days} if len(days) <= MAX_DAYS else {})


def as_lines(quality: dict[str, Any]) -> list[str]:
    """What `quality` gives, as lines of text for a terminal or a log."""
    rows, lines = quality["rows"], []
    for name, text in [("read", "rows read"), *DROPS.items(), ("rows", "rows kept")]:
        lines.append(f"{text:28}{rows[name]:>14,}{rows[name] / rows['read']:>9.2%}")
    for split in schema.SPLITS:
        lines.append(f"  {split:26}{rows[split]:>14,}{rows[split] / rows['rows']:>9.2%} of kept")
    for reason, number in quality["bad_reasons"].items():
        lines.append(f"bad: {number:,} x {reason}")
    for side, noun in (("query", "users"), ("candidate", "items")):
        ids = quality[side]
        lines.append(
            f"{noun}: {ids['ids']:,} of {ids['ids_before_k_core']:,}, "
            f"{ids['lost_to_k_core']:,} lost to the k-core"
        )
        lines += as_text(ids, noun)
    cold = quality["cold"]
    lines.append(
        f"items without train rows: {cold['candidates_without_train_rows']:,}, with "
        f"{cold['held_out_rows']:,} rows of validation and test "
        f"({cold['share_of_held_out_rows']:.2%})"
    )
    lines.append(f"density: {quality['density']:.3%} of all pairs of a user and an item")
    lines += _lines_of_days(quality["days"])
    files = quality["files"]
    if len(files) > 1:
        least, most = (choose(files, key=files.__getitem__) for choose in (min, max))
        lines.append(
            f"files: {len(files):,}; rows read from {files[least]:,} ({least}) to "
            f"{files[most]:,} ({most})"
        )
    return lines


def _lines_of_days(days: dict[str, Any] | None) -> list[str]:
    if days is None:
        return ["days: rows have no time"]
    lines = [
        f"days: {days['with_rows']:,} with rows from {days['first']} to {days['last']}, "
        f"{days['without_rows']:,} without"
    ]
    if gaps := days["longest_gaps"]:
        more = f", and {len(gaps) - 5} more gaps" if len(gaps) > 5 else ""
        lines.append(f"days without rows: {', '.join(span(gap) for gap in gaps[:5])}{more}")
    return lines
