"""The page `quality.html`: the quality of prepared data for people, as one file without others.

The same numbers give the same bytes: no time, no machine and no name of a source is in it.
"""

from __future__ import annotations

import html
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.contract import schema
from pipeline.contract.files import write_atomically
from pipeline.quality.plots import plot_concentration, plot_days, plot_degrees
from pipeline.quality.report import DROPS, span

_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Data quality</title>
<style>
body { margin: 0 auto; max-width: 68rem; padding: 1rem; font: 1rem/1.45 system-ui, sans-serif;
  color: #222; background: #fff; }
h1 { font-size: 1.5rem; margin: .3rem 0 .6rem; }
h2 { font-size: 1.1rem; margin: 1.6rem 0 .4rem; border-bottom: 1px solid #ccc; }
.columns { display: grid; gap: 0 2.5rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
table { border-collapse: collapse; width: 100%; max-width: 32rem; }
th, td { padding: .15rem .3rem; text-align: right; font-variant-numeric: tabular-nums;
  border-bottom: 1px solid #eee; vertical-align: top; }
th { font-weight: 600; }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; }
figure { margin: .6rem 0; max-width: 34rem; }
figcaption { font-weight: 600; }
svg { display: block; width: 100%; height: auto; }
</style>
</head>
<body>
"""


def write_page(path: Path, found: dict[str, Any]) -> None:
    """Writes the page, in one step.

    Args:
      path: the file to make.
      found: from `quality`.
    """
    write_atomically(path, page(found))


def page(found: dict[str, Any]) -> str:
    """The page as HTML; `found` is what `quality` gives."""
    parts = [
        "<h1>Data quality</h1>",
        f"<p>{_summary(found)}</p>",
        '<div class="columns">',
        _section("Rows", _rows(found)),
        _section("Bad rows", _bad(found)),
        "</div>",
        _section("Days", _days(found["days"])),
        "<h2>Users and items</h2>",
        '<div class="columns">',
        f"<div>{_ids(found)}{_cold(found)}</div>",
        plot_concentration(found),
        *(plot_degrees(found, side) for side in schema.SIDES),
        "</div>",
    ]
    return _HEAD + "\n".join(parts) + "\n</body>\n</html>\n"


def _summary(found: dict[str, Any]) -> str:
    rows, users, items = found["rows"], found["query"], found["candidate"]
    return (
        f"{rows['rows']:,} of {rows['read']:,} rows are kept, of {users['ids']:,} users and "
        f"{items['ids']:,} items: {found['density']:.3%} of all pairs."
    )


def _rows(found: dict[str, Any]) -> str:
    rows = found["rows"]
    named = {"read": "read", **DROPS, "rows": "kept"} | {
        name: f"of them {name}" for name in schema.SPLITS
    }
    return _table(
        ["step", "rows", "of read"],
        [
            (text, f"{rows[key]:,}", f"{rows[key] / rows['read']:.2%}")
            for key, text in named.items()
        ],
    )


def _bad(found: dict[str, Any]) -> str:
    if not found["bad_reasons"]:
        return "<p>No row is bad.</p>"
    reasons = [(reason, f"{number:,}") for reason, number in found["bad_reasons"].items()]
    return f"<p>{found['bad_share']:.3%} of the rows are bad.</p>" + _table(
        ["reason", "rows"], reasons
    )


def _ids(found: dict[str, Any]) -> str:
    sides = [found[side] for side in schema.SIDES]

    def row(text: str, *path: str, form: str = ",.6g") -> tuple[str, ...]:
        values = []
        for value in sides:
            for key in path:
                value = value[key]
            values.append(format(value, form))
        return (text, *values)

    names = {"0": "least", "0.5": "median", "1": "most"}
    quantiles = [
        row(f"rows each, {names.get(key, f'{float(key):.0%}')}", "quantiles", key)
        for key in sides[0]["quantiles"]
    ]
    return _table(
        ["", "users", "items"],
        [
            row("before the k-core", "ids_before_k_core", form=","),
            row("lost to the k-core", "lost_to_k_core", form=","),
            row("left", "ids", form=","),
            *quantiles,
            row("Gini coefficient of the rows", "gini", form=".3f"),
            row("share of rows of the top 1%", "head", "share_of_rows", form=".1%"),
            row("with one row", "seen_once", "ids", form=","),
            row("with one row, share of them", "seen_once", "share_of_ids", form=".1%"),
            row("rarest, sharing 20% of the rows", "tail", "share_of_ids", form=".1%"),
        ],
    )


def _cold(found: dict[str, Any]) -> str:
    cold = found["cold"]
    return (
        f"<p>{cold['candidates_without_train_rows']:,} items have no row in train; "
        f"{cold['held_out_rows']:,} rows of validation and test are of them "
        f"({cold['share_of_held_out_rows']:.2%}).</p>"
    )


def _days(days: dict[str, Any] | None) -> str:
    if days is None:
        return "<p>The rows have no time.</p>"
    text = (
        f"<p>{days['with_rows']:,} days with rows from {days['first']} to {days['last']}; "
        f"{days['without_rows']:,} days between them have none.</p>"
    )
    plot = plot_days(days["rows"]) if "rows" in days else ""
    gaps = [(span(gap), f"{gap['days']:,}") for gap in days["longest_gaps"][:10]]
    more = len(days["longest_gaps"]) - len(gaps)
    note = f"<p>and {more} shorter gaps, in the manifest.</p>" if more > 0 else ""
    table = _table(["days without rows", "days"], gaps) + note if gaps else ""
    return f'{text}<div class="columns"><div>{plot}</div><div>{table}</div></div>'


def _section(title: str, content: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>\n{content}</section>"


def _table(header: list[str], rows: Iterable[tuple[str, ...]]) -> str:
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in header)
    body = [
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
        for cells in rows
    ]
    return f"<table><tr>{head}</tr>\n" + "\n".join(body) + "</table>\n"
