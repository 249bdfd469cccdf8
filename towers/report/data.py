"""The prepared data on the page of a run: rows, users and items, as their manifest tells."""

from __future__ import annotations

import os
from typing import Any

from pipeline.contract import schema
from towers.report.html import columns, paragraph, table

_DROPS = {  # counts of a preparation → what they are called for people
    "read": "read",
    "bad": "bad",
    "below_threshold": "below the rating threshold",
    "duplicates": "duplicates of an earlier row",
    "k_core": "lost to the k-core",
    "rows": "kept",
    **{split: f"of them {split}" for split in schema.SPLITS},
}


def data_html(directory: str | os.PathLike[str]) -> str:
    """What became of the rows of a prepared directory, and how they are distributed."""
    manifest = schema.read_manifest(directory, "prepared")
    quality = manifest.details.get("quality")
    head = paragraph(f"Source: {manifest.source or 'not stated'}; checksum {manifest.fingerprint}.")
    counts = manifest.counts
    rows = [(text, f"{counts[key]:,}") for key, text in _DROPS.items() if key in counts]
    steps = table(["", "rows"], rows)
    if not quality:
        return (
            head
            + columns(steps)
            + paragraph("Its preparation recorded no measures of quality.", "soft")
        )
    cold = quality["cold"]
    text = (
        f"{quality['density']:.3%} of all pairs; {quality['bad_share']:.3%} of the rows are bad; "
        f"{cold['candidates_without_train_rows']:,} items have no train row, and "
        f"{cold['share_of_held_out_rows']:.2%} of what is held out is of them."
    )
    reasons = [(reason, f"{number:,}") for reason, number in quality["bad_reasons"].items()]
    bad = table(["reason for a bad row", "rows"], reasons) if reasons else ""
    return head + paragraph(text) + columns(steps + bad, _ids(quality)) + _days(quality["days"])


def _ids(quality: dict[str, Any]) -> str:
    """How the rows are distributed over users and items."""
    users, items = quality["query"], quality["candidate"]

    def row(text: str, form: str, *path: str) -> tuple[str, str, str]:
        values = []
        for value in (users, items):
            for key in path:
                value = value[key]
            values.append(format(value, form))
        return text, values[0], values[1]

    return table(
        ["", "users", "items"],
        [
            row("before the k-core", ",", "ids_before_k_core"),
            row("left", ",", "ids"),
            row("rows each, least", ",.6g", "quantiles", "0"),
            row("rows each, median", ",.6g", "quantiles", "0.5"),
            row("rows each, most", ",.6g", "quantiles", "1"),
            row("Gini coefficient of the rows", ".3f", "gini"),
            row("share of rows of the top 1 %", ".1%", "head", "share_of_rows"),
            row("with one row", ".1%", "seen_once", "share_of_ids"),
        ],
    )


def _days(days: dict[str, Any] | None) -> str:
    if days is None:
        return paragraph("The rows have no time.")
    return paragraph(
        f"{days['with_rows']:,} days with rows from {days['first']} to {days['last']}; "
        f"{days['without_rows']:,} days between them have none."
    )
