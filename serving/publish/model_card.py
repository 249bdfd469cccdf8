"""The model card of a version: what it is, what it was made of, how good, how to load it."""

from __future__ import annotations

import json
from typing import Any

from pipeline.contract.bundle import Bundle
from pipeline.contract.schema import Manifest

_LIMITS = """\
- It ranks only the candidates it was exported with; new ones need a new export.
- A query that was not in the training data has no results: `known` is False, ids are empty.
  `Retriever.answer` and the service can give popular candidates in their place, marked as such.
- Scores order the candidates of one query; they are not probabilities.
- Filters (seen candidates, exclusions) are applied outside the graph, by `serving.Retriever`.
- It learned from observed interactions and repeats what they favour, popular candidates above all.
"""

_LOADING = """\
With TensorFlow alone, or with TensorFlow Serving, which finds the same signatures:

```python
model = tf.saved_model.load(PATH)
model.signatures["serving_default"]({input}=tf.constant({example}))
# {{"candidate_id": string [B, {k}], "score": float32 [B, {k}]}}
```
"""

_LOADING_SCANN = """\
The same with ScaNN; without the import its graph cannot be read:

```python
from scann.scann_ops.py import scann_ops
model = tf.saved_model.load(PATH + "/assets.extra/scann")
```
"""

_LOADING_RETRIEVER = """\
With history and filters:

```python
from serving.retrieval.retriever import Retriever
retriever = Retriever.load(MODELS, "{name}")
retriever.top_k(["some id"], k=10, exclude_seen={seen})
```
"""


def write(manifest: Manifest, bundle: Bundle, report: dict[str, Any]) -> str:
    """The card as Markdown.

    Args:
      manifest: of the version.
      bundle: that it was made of; `details` of its manifest may hold "configuration", "data"
        and "metrics" (one dictionary of numbers for each split).
      report: the content of `ann_report.json`.
    """
    made_of = bundle.manifest.details
    counts, k = manifest.counts, manifest.details["k"]
    name = manifest.configuration["name"]
    sections = [
        f"# {name}\n",
        f"A two-tower retrieval model: the {k} best of {counts['candidates']:,} candidates for a "
        f"query, by the dot product of embeddings with {counts['dimensions']} dimensions.\n",
        "## Data\n",
        f"Source: {bundle.manifest.source or 'not stated'}.\n",
        _table("What", made_of.get("data", {}), "Nothing more was stated."),
        "## Configuration\n",
        _table("Setting", _configuration(bundle), "Not stated."),
        "## Metrics\n",
        _metrics(made_of.get("metrics", {})),
        "## Index\n",
        _index(report),
        "## Limits\n",
        _LIMITS,
        "## How to load it\n",
        _loading(manifest, name, bundle, report),
    ]
    return "\n".join(sections)


def _configuration(bundle: Bundle) -> dict[str, Any]:
    return bundle.manifest.details.get("configuration") or bundle.manifest.configuration


def _table(title: str, values: dict[str, Any], otherwise: str) -> str:
    """Names and values as a Markdown table, or a sentence where there are none."""
    if not values:
        return otherwise + "\n"
    rows = "".join(f"| {name} | {_text(value)} |\n" for name, value in sorted(values.items()))
    return f"| {title} | |\n| --- | --- |\n{rows}"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.replace("|", "\\|")


def _metrics(metrics: dict[str, Any]) -> str:
    """Plain values as one table; rankings that were measured alike as columns of another."""
    if not metrics:
        return "None were measured.\n"
    columns = {name: values for name, values in metrics.items() if isinstance(values, dict)}
    single = {name: value for name, value in metrics.items() if name not in columns}
    alike: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for name, values in columns.items():
        alike.setdefault(tuple(sorted(values)), {})[name] = values
    parts = [_columns(names, rankings) for names, rankings in alike.items()]
    return "\n".join([_table("Measured", single, "")] * bool(single) + parts)


def _columns(names: tuple[str, ...], rankings: dict[str, dict[str, Any]]) -> str:
    """A row for each metric and a column for each ranking."""
    lines = [["Metric", *rankings], ["---"] * (1 + len(rankings))]
    lines += [[name, *(_text(values[name]) for values in rankings.values())] for name in names]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _index(report: dict[str, Any]) -> str:
    exact, scann = report["exact"], report["scann"]
    lines = [f"Default: **{report['default_index']}**. Exact search: {_times(exact)}."]
    if scann is None:
        lines.append(f"There is no ScaNN index: {report['scann_is_absent_because']}.")
    else:
        leaves = f"{scann['leaves_to_search']} of {scann['num_leaves']} leaves"
        reordered = f"{scann['num_reordered']} candidates scored exactly"
        lines.append(
            f"ScaNN ({scann['kind']}, {leaves}, {reordered}): {_times(scann)}, recall "
            f"{scann['recall']:.3f} of the exact top {report['at']}, promised "
            f"{report['target_recall']}."
        )
    queries = report["queries"]
    lines.append(
        f"Measured with {queries['judging']:,} queries from `{queries['source']}`, "
        "others than those that chose the settings."
    )
    return "\n".join(lines) + "\n"


def _times(measured: dict[str, Any]) -> str:
    return f"{measured['batch_ms']:.3g} ms a batch of 64, {measured['single_ms']:.3g} ms a query"


def _loading(manifest: Manifest, name: str, bundle: Bundle, report: dict[str, Any]) -> str:
    by_id = manifest.details["input"] == "query_id"
    example = '["some id"]' if by_id else f"[[0.0] * {manifest.counts['dimensions']}]"
    parts = [
        _LOADING.format(input=manifest.details["input"], example=example, k=manifest.details["k"])
    ]
    if report["scann"] is not None:
        parts.append(_LOADING_SCANN)
    if by_id:
        parts.append(_LOADING_RETRIEVER.format(name=name, seen=bundle.num_queries is not None))
    return "\n".join(parts)
