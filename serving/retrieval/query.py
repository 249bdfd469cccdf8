"""One question to a model version, printed: what `twotower query` does."""

from __future__ import annotations

import json
from typing import Any

from pipeline.contract.settings import require_in_corpus
from serving.retrieval.requests import RetrieveResult, UnknownQuery
from serving.retrieval.retriever import Retriever
from serving.retrieval.settings import QueryConfig


def answer(config: QueryConfig) -> RetrieveResult:
    """Prints the best candidates of one query, as a table or as JSON, and returns them.

    Raises:
      UnknownQuery: the query was not in the training data of the version.
      ValueError: the version cannot be found or cannot do what is asked.
    """
    retriever = Retriever.load(config.models, config.name, config.version)
    require_in_corpus(config, "k", retriever.num_candidates)
    choice: dict[str, Any] = {"index": config.index, "exclude_seen": config.exclude_seen}
    if config.history or config.set:
        choice["queries"] = [_described(config, retriever)]
    else:
        choice["query_ids"] = [config.query]
    [result] = retriever.top_k(k=config.k, **choice)
    if not result.known:
        raise UnknownQuery(
            f"Query {config.query!r} is not known to {retriever.version.path}: it was not in the "
            "training data, check the id or export a newer version."
        )
    history = config.history.split(",") if config.history else retriever.history(config.query)
    if config.json:
        print(_json(config, retriever, result, history))
    else:
        print(_table(result, history))
    return result


def _described(config: QueryConfig, retriever: Retriever) -> dict[str, Any]:
    """The query as --query, --history and --set describe it."""
    described: dict[str, Any] = {"query_id": config.query} if config.query else {}
    if config.history:
        described["history"] = config.history.split(",")
    for pair in config.set:
        name, _, value = pair.partition("=")
        spec = retriever.query_inputs.specs.get(name)
        described[name] = value
        if spec is not None and spec.dtype.is_floating:
            try:
                described[name] = float(value)
            except ValueError as error:
                raise ValueError(f"set must give {name} a number, got {value!r}.") from error
        elif spec is not None and spec.shape.rank == 2:
            described[name] = value.split(",")
    return described


def _json(
    config: QueryConfig, retriever: Retriever, result: RetrieveResult, history: list[str]
) -> str:
    ranked = enumerate(zip(result.candidate_ids, result.scores, strict=True), start=1)
    content = {
        "query_id": result.query_id,
        "model": config.name,
        "version": retriever.version.number,
        "index": retriever.default_index if config.index == "default" else config.index,
        "history": history,
        "results": [
            {"rank": rank, "candidate_id": name, "score": score, "seen": name in history}
            for rank, (name, score) in ranked
        ],
    }
    return json.dumps(content, indent=2, ensure_ascii=False)


def _table(result: RetrieveResult, history: list[str]) -> str:
    """Rank, candidate id, score, a mark on what was seen; the query's history beside it."""
    width = max([len("candidate_id"), *map(len, result.candidate_ids)])
    rows = [f"rank  {'candidate_id':<{width}}  {'score':>9}  seen  "]
    ranked = zip(result.candidate_ids, result.scores, strict=True)
    for rank, (name, score) in enumerate(ranked, start=1):
        mark = "yes" if name in history else ""
        rows.append(f"{rank:>4}  {name:<{width}}  {score:>9.4f}  {mark:4}  ")
    shown = history[: len(rows) - 1]
    of_all = "" if len(shown) == len(history) else f" ({len(shown)} of {len(history)})"
    beside = [f"history{of_all}", *shown] + [""] * (len(rows) - 1 - len(shown))
    return "\n".join((row + other).rstrip() for row, other in zip(rows, beside, strict=True))
