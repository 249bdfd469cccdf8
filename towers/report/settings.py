"""The settings of runs on a page: those of one, or in which several differ."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from towers.report.html import columns, paragraph, table
from towers.training.settings import TrainConfig


def settings_html(configuration: dict[str, Any]) -> str:
    """Every setting of a run; those that differ from their default stand out."""
    defaults = _defaults()
    rows = [(name, _text(value)) for name, value in sorted(configuration.items())]
    other = [name not in defaults or configuration[name] != defaults[name] for name, _ in rows]
    half = -(-len(rows) // 2)
    parts = [
        table(
            ["setting", "value"],
            rows[start:end],
            kind="text",
            marked=[n for n, marked in enumerate(other[start:end]) if marked],
        )
        for start, end in ((0, half), (half, len(rows)))
    ]
    return paragraph("In bold: other than the default.", "soft") + columns(*parts)


def differing_settings_html(names: Sequence[str], configurations: list[dict[str, Any]]) -> str:
    """The settings that are not the same in all runs, a column a run.

    Args:
      names: of the runs.
      configurations: of the runs; what an older one does not have was as it is by default.
    """
    known = [_defaults() | one for one in configurations]
    rows = []
    for setting in sorted({name for one in known for name in one} - {"run"}):
        values = [_text(one.get(setting)) for one in known]
        if len(set(values)) > 1:
            rows.append((setting, *values))
    if not rows:
        return paragraph("All settings are the same.")
    return table(["setting", *names], rows, kind="text")


def _defaults() -> dict[str, Any]:
    """The defaults of training, as JSON gives them back."""
    values = {}
    for field in dataclasses.fields(TrainConfig):
        factory = field.default_factory
        values[field.name] = field.default if factory is dataclasses.MISSING else factory()
    return json.loads(json.dumps(values))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
