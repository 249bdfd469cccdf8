"""`twotower recommend`: the top-k of all users, in Parquet files."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.contract import schema, stores
from pipeline.contract.files import describe_files, made_aside
from pipeline.contract.settings import require_in_corpus
from towers.data.interactions import Positives, RetrievalData, open_data
from towers.legacy_keras import tf_keras
from towers.metrics.ranking import rank_blocks, tie_order
from towers.model.top_k import all_fingerprints, all_ids, vectors
from towers.model.two_tower import TwoTower
from towers.output.settings import RecommendConfig
from towers.training.earlier_run import open_to_serve
from towers.training.failures import told_when_full

log = logging.getLogger(__name__)

RECOMMENDATIONS = "recommendations"  # files are {RECOMMENDATIONS}-0000i-of-0000N.parquet
_RECORDED = ("k", "index", "keep_seen", "where")  # settings, in the manifest
QUERY, CANDIDATES, SCORES = "query_id", "candidate_ids", "scores"  # their columns; ids are raw

# Some queries → for each its raw candidate ids and their scores, best first.
TopK = Callable[[Sequence[Any]], Iterable[tuple[Sequence[str], Sequence[float]]]]


class Ranker(NamedTuple):
    """Somebody who ranks in place of scoring all candidates, such as the index of a version."""

    source: str  # what it is, for messages
    candidate_ids: Sequence[str]  # raw ids of its corpus, [N]
    vectors: np.ndarray  # float32 [N, D], what it scores them by
    top_k: TopK  # ranks raw ids, or `queries`, and leaves out what is to be left out
    queries: Sequence[Mapping[str, Any]] | None = None  # to be answered in place of all users


def recommend(config: RecommendConfig, ranker: Ranker | None = None) -> schema.Manifest:
    """Writes the k candidates of highest score for every user, without what the user chose.

    A row of the files is a user: `query_id` string, `candidate_ids` list of strings and `scores`
    list of floats, best first, shorter than k where no more candidates are left. Rows go by dense
    id; users and candidates that a tower knows by their attributes alone are among them. Left out
    is what a user chose in train and validation, as in a published version. The directory is made
    as `.<output>.partial` and renamed into place, the manifest last.

    Without a `ranker` all candidates are scored. One that brings `queries` answers these, in their
    order, and neither data nor run are looked at.

    Raises:
      ValueError: the output is there already or being written, there is no trained run, it is of
        other data than those given or of another run than the ranker, or the disk is full.
    """
    destination = config.output
    if not config.overwrite and stores.exists(destination):
        raise ValueError(
            f"{destination} already exists; choose another --output, or --overwrite it."
        )
    if ranker is not None and ranker.queries is not None:
        users = pa.array([query[QUERY] for query in ranker.queries], pa.string())
        blocks = _answered(config, users, ranker.queries, ranker.top_k)
        source, details = ranker.source, {}
    else:
        model, training, data = open_to_serve(config.run, open_data(config.data))
        users, candidates = (all_ids(data, model, side) for side in schema.SIDES)
        require_in_corpus(config, "k", len(candidates))
        if ranker is None:
            blocks = _ranked(config, data, model, users, candidates)
        else:
            _check_same_run(config, ranker, candidates, model)
            blocks = _answered(config, users, users.to_pylist(), ranker.top_k)
        source, details = data.source, {"configuration": training.recorded()}
        details["data"] = {"source": data.source, "fingerprint": data.fingerprint}
    busy = f"another process is writing {destination}; wait for it, or choose another --output."
    local = stores.local_place(destination)
    with told_when_full(local), made_aside(local, busy) as aside:
        rows = _write(aside, _with_progress(blocks, len(users)), len(users), config.shard_size)
        manifest = schema.Manifest(
            kind=RECOMMENDATIONS,
            source=source,
            configuration={name: getattr(config, name) for name in _RECORDED},
            counts={"queries": len(users)},
            files=describe_files(aside, rows),
            details=details,
        )
        manifest.write(aside)
        stores.put_in_place(aside, destination)
    log.info("recommend: %d users in %d file(s) of %s", len(users), len(rows), destination)
    return manifest


def _check_same_run(
    config: RecommendConfig, ranker: Ranker, candidates: pa.Array, model: TwoTower
) -> None:
    """Raises ValueError where a ranker does not score by the vectors of the run."""
    trained = vectors(model, "candidate")
    same = (
        ranker.vectors.shape == trained.shape
        and np.allclose(ranker.vectors, trained, rtol=1e-3, atol=1e-5)
        and list(ranker.candidate_ids) == candidates.to_pylist()
    )
    if not same:
        raise ValueError(
            f"{ranker.source} was not made from {config.run} as it is now: export the run again "
            "with `twotower export`, name another with --models and --name, or use --index exact."
        )


def _ranked(
    config: RecommendConfig,
    data: RetrievalData,
    model: TwoTower,
    users: pa.Array,
    candidates: pa.Array,
) -> Iterator[pa.Table]:
    """The top of the whole corpus, block by block."""
    seen = data.positives("train", "validation")
    owners = np.repeat(np.arange(data.num_queries), seen.sizes)
    left_out = slice(0) if config.keep_seen else slice(None)
    blocks = rank_blocks(
        vectors(model, "query"),
        partial(vectors, model, "candidate"),
        np.arange(len(users)),
        Positives(owners[left_out], seen.candidate_ids[left_out], len(users)),
        k=config.k,
        order=tie_order(all_fingerprints(data, model, "candidate")),
        block_size=config.block_size,
    )
    start = 0
    for ranked, scores in blocks:
        kept = ranked >= 0
        ids = candidates.take(pa.array(ranked[kept]))
        yield _table(users.slice(start, len(ranked)), kept.sum(axis=1), ids, scores[kept])
        start += len(ranked)


def _answered(
    config: RecommendConfig, users: pa.Array, queries: Sequence[Any], top_k: TopK
) -> Iterator[pa.Table]:
    """What somebody else ranks, block by block; the queries are those of the users."""
    for start in range(0, len(users), config.block_size):
        block = users.slice(start, config.block_size)
        answers = list(top_k(queries[start : start + config.block_size]))
        ids = [name for names, _ in answers for name in names]
        scores = np.concatenate([np.asarray(each, np.float32) for _, each in answers])
        sizes = np.array([len(names) for names, _ in answers])
        yield _table(block, sizes, pa.array(ids, pa.string()), scores)


def _table(users: pa.Array, sizes: np.ndarray, ids: pa.Array, scores: np.ndarray) -> pa.Table:
    """A block of rows: [b] users with `sizes` [b] of the candidates and scores [Σ sizes]."""
    offsets = pa.array(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32))
    lists = [pa.ListArray.from_arrays(offsets, part) for part in (ids, pa.array(scores))]
    return pa.table(dict(zip((QUERY, CANDIDATES, SCORES), [users, *lists], strict=True)))


def _write(out: Path, blocks: Iterable[pa.Table], total: int, shard_size: int) -> dict[str, int]:
    """Cuts blocks into files of `shard_size` rows; rows by name of a file."""
    num_shards = -(-total // shard_size)
    rows: dict[str, int] = {}
    waiting: list[pa.Table] = []
    for block in blocks:
        waiting.append(block)
        while (n := sum(part.num_rows for part in waiting)) and (
            n >= shard_size or sum(rows.values()) + n == total
        ):
            table = pa.concat_tables(waiting)
            name = f"{RECOMMENDATIONS}-{len(rows):05d}-of-{num_shards:05d}.parquet"
            pq.write_table(table.slice(0, shard_size), out / name)
            rows[name] = min(n, shard_size)
            waiting = [table.slice(shard_size)]
    return rows


def _with_progress(blocks: Iterable[pa.Table], total: int) -> Iterator[pa.Table]:
    """The same blocks; shows how many users are done: a bar on a terminal, lines in a log."""
    bar = tf_keras.utils.Progbar(total, unit_name="user") if sys.stdout.isatty() else None
    done = logged = 0
    for block in blocks:
        yield block
        done += block.num_rows
        if bar is not None:
            bar.update(done)
        elif done * 10 // total > logged:
            logged = done * 10 // total
            log.info("recommend: %d of %d users", done, total)
