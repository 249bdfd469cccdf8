"""One question to a model version, printed: what `twotower query` does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from pipeline.contract.settings import require_in_corpus
from serving.retrieval.attributes import as_where
from serving.retrieval.requests import RetrieveResult, UnknownQuery
from serving.retrieval.retriever import Retriever
from serving.retrieval.settings import QueryConfig


def answer(config: QueryConfig) -> list[RetrieveResult]:
    """Prints the best candidates of some queries, as tables or as JSON, and returns them.

    Raises:
      UnknownQuery: the version knows nothing of a query.
      ValueError: the version cannot be found or cannot do what is asked.
    """
    retriever = Retriever.load(config.models, config.name, config.version)
    require_in_corpus(config, "k", retriever.num_candidates)
    choice: dict[str, Any] = {"index": config.index, "exclude_seen": config.exclude_seen}
    if config.where:
        choice["where"] = as_where(config.where, retriever.corpus.attributes.kinds())
    if config.history or config.set:
        choice["queries"] = [_described(config, retriever)]
    else:
        choice["query_ids"] = list(config.query)
    results = retriever.top_k(k=config.k, **choice)
    if unknown := [result.query_id for result in results if not result.known]:
        what = ", ".join(map(repr, unknown)) if unknown[0] else "what --history and --set say"
        raise UnknownQuery(
            f"{what} is not known to {retriever.version.path}: it was not in the training data; "
            "check the ids, or export a newer version."
        )
    if config.where and not any(len(result.scores) for result in results):
        raise ValueError(f"no candidate is {' '.join(config.where)}; change where.")
    given = config.history.split(",") if config.history else None
    histories = [given or retriever.history(result.query_id) for result in results]
    pairs = list(zip(results, histories, strict=True))
    if config.json:
        answers = [_json(config, retriever, *pair) for pair in pairs]
        content = answers[0] if len(answers) == 1 else answers
        print(json.dumps(content, indent=2, ensure_ascii=False))
    for result, history in () if config.json else pairs:
        print(
            (f"\n{result.query_id}\n" if len(results) > 1 else "")
            + _table(result, history, retriever.corpus.titles_of(history))
        )
    return results


def _described(config: QueryConfig, retriever: Retriever) -> dict[str, Any]:
    described: dict[str, Any] = {"query_id": config.query[0]} if config.query else {}
    if config.history:
        described["history"] = config.history.split(",")
    kinds = retriever.query_inputs.kinds()
    for pair in config.set:
        name, _, value = pair.partition("=")
        described[name] = value.split(",") if kinds.get(name) == "list" else value
        if kinds.get(name) == "number":
            try:
                described[name] = float(value)
            except ValueError as error:
                raise ValueError(f"set must give {name} a number, got {value!r}.") from error
    return described


def _json(
    config: QueryConfig, retriever: Retriever, result: RetrieveResult, history: list[str]
) -> dict[str, Any]:
    titles = result.titles or [""] * len(result.scores)
    ranked = enumerate(zip(result.candidate_ids, result.scores, titles, strict=True), start=1)
    return {
        "query_id": result.query_id,
        "model": config.name,
        "version": retriever.version.number,
        "index": retriever.default_index if config.index == "default" else config.index,
        "history": history,
        "results": [
            {"rank": rank, "candidate_id": name, "score": score, "seen": name in history}
            | ({"title": title} if title else {})
            for rank, (name, score, title) in ranked
        ],
    }


def _table(result: RetrieveResult, history: list[str], titles: Sequence[str]) -> str:
    """The results as rows, with a mark on what was seen; the query's history beside them."""
    names = _named(result.candidate_ids, result.titles)
    width = max([len("candidate_id"), *map(len, names)])
    rows = [f"rank  {'candidate_id':<{width}}  {'score':>9}  seen  "]
    ranked = zip(result.candidate_ids, names, result.scores, strict=True)
    for rank, (raw_id, name, score) in enumerate(ranked, start=1):
        mark = "yes" if raw_id in history else ""
        rows.append(f"{rank:>4}  {name:<{width}}  {score:>9.4f}  {mark:4}  ")
    shown = _named(history, titles)[: len(rows) - 1]
    of_all = "" if len(shown) == len(history) else f" ({len(shown)} of {len(history)})"
    beside = [f"history{of_all}", *shown] + [""] * (len(rows) - 1 - len(shown))
    return "\n".join((row + other).rstrip() for row, other in zip(rows, beside, strict=True))


def _named(ids: Sequence[str], titles: Sequence[str]) -> list[str]:
    """Ids, each with its title where there is one."""
    return [f"{raw_id}  {title or ''}".rstrip() for raw_id, title in zip_longest(ids, titles)]
