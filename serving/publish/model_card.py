"""The model card of a version: what it is, what it was made of, how good, how to load it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.contract.bundle import Bundle
from pipeline.contract.pages import render
from pipeline.contract.schema import Manifest

_TEMPLATE = Path(__file__).with_name("templates") / "model_card.md.jinja"


def write(manifest: Manifest, bundle: Bundle, report: dict[str, Any]) -> str:
    """The card of a version as Markdown, from the content of `ann_report.json` as well.

    `details` of the manifest of its bundle may hold "configuration", "data" and "metrics" (one
    dictionary of numbers for each split).
    """
    details = bundle.manifest.details
    by_id = manifest.details["input"] == "query_id"
    return render(
        _TEMPLATE,
        manifest=manifest,
        bundle=bundle,
        report=report,
        data=details.get("data", {}),
        configuration=details.get("configuration") or bundle.manifest.configuration,
        metrics=_by_columns(details.get("metrics", {})),
        example='["some id"]' if by_id else f"[[0.0] * {manifest.counts['dimensions']}]",
        table=_table,
        text=_text,
        times=_times,
    )


def _table(title: str, values: dict[str, Any], otherwise: str) -> str:
    """Names and values as a Markdown table, or a sentence if there are no values."""
    if not values:
        return otherwise + "\n"
    rows = "".join(f"| {name} | {_text(value)} |\n" for name, value in sorted(values.items()))
    return f"| {title} | |\n| --- | --- |\n{rows}"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.replace("|", "\\|")


def _by_columns(metrics: dict[str, Any]) -> dict[str, Any]:
    """Plain values, and rankings with the same metrics together: columns of one table."""
    alike: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for name, values in metrics.items():
        if isinstance(values, dict):
            alike.setdefault(tuple(sorted(values)), {})[name] = values
    alone = {name: value for name, value in metrics.items() if not isinstance(value, dict)}
    return {"alone": alone, "alike": list(alike.values())}


def _times(measured: dict[str, Any]) -> str:
    return f"{measured['batch_ms']:.3g} ms a batch of 64, {measured['single_ms']:.3g} ms a query"
