"""The page `quality.html`: the quality of prepared data for people, as one file without others.

The same numbers give the same bytes: no time, no machine and no name of a source is in it.
"""

from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from pipeline.contract import schema
from pipeline.contract.files import write_atomically
from pipeline.contract.pages import render
from pipeline.quality.histogram import quantile_name
from pipeline.quality.plots import plot_concentration, plot_days, plot_degrees
from pipeline.quality.report import DROPS, span

_TEMPLATE = Path(__file__).with_name("templates") / "quality.html"
_MAX_GAPS = 10  # listed, the longest
_Cells = list[tuple[str, ...]]


def write_page(path: Path, quality: dict[str, Any]) -> None:
    """Writes the page in one step."""
    write_atomically(path, page(quality))


def page(quality: dict[str, Any]) -> str:
    """The page as HTML; `quality` is that of the manifest, from `quality.report`."""
    days = quality["days"]
    gaps = days["longest_gaps"] if days else []
    return render(
        _TEMPLATE,
        title="Data quality",
        **quality,
        step_cells=_step_cells(quality["rows"]),
        reason_cells=[(text, f"{rows:,}") for text, rows in quality["bad_reasons"].items()],
        gap_cells=[(span(gap), f"{gap['days']:,}") for gap in gaps[:_MAX_GAPS]],
        shorter_gaps=len(gaps[_MAX_GAPS:]),
        days_plot=plot_days(days["rows"]) if days and "rows" in days else "",
        id_cells=_id_cells([quality[side] for side in schema.SIDES]),
        plots=[
            plot_concentration(quality),
            *(plot_degrees(quality[side]["bins"], side) for side in schema.SIDES),
        ],
    )


def _step_cells(rows: dict[str, int]) -> _Cells:
    names = {"read": "read", **DROPS, "rows": "kept"}
    names |= {split: f"of them {split}" for split in schema.SPLITS}
    return [
        (text, f"{rows[step]:,}", f"{rows[step] / rows['read']:.2%}")
        for step, text in names.items()
    ]


def _id_cells(sides: list[dict[str, Any]]) -> _Cells:
    def row(text: str, form: str, *path: str) -> tuple[str, ...]:
        values = (reduce(getitem, path, side) for side in sides)
        return (text, *(format(value, form) for value in values))

    quantiles = [
        row(f"rows each, {quantile_name(share)}", ",.6g", "quantiles", share)
        for share in sides[0]["quantiles"]
    ]
    return [
        row("before the k-core", ",", "ids_before_k_core"),
        row("lost to the k-core", ",", "lost_to_k_core"),
        row("left", ",", "ids"),
        *quantiles,
        row("Gini coefficient of the rows", ".3f", "gini"),
        row("share of rows of the top 1%", ".1%", "head", "share_of_rows"),
        row("with one row", ",", "seen_once", "ids"),
        row("with one row, share of them", ".1%", "seen_once", "share_of_ids"),
        row("rarest, sharing 20% of the rows", ".1%", "tail", "share_of_ids"),
    ]
