"""What a live history is worth, and what a model is worth to users that it has never seen.

    python -m benchmarks.live [--quick] [--parts freshness fitting] --data DIR --json FILE

DIR holds tafeng/ with interactions.parquet, users.parquet and items.parquet, and
gowalla/interactions.parquet. FILE is written after every training; what stands in it already is not
measured again, so that a killed benchmark goes on.

freshness: Ta-Feng by time, as `benchmarks.features` splits it, with nothing withheld. Each test row
is predicted from all that its user chose before that day, and from what was prepared; what was
chosen before is not ranked. Then a tenth of the users, chosen by a hash, is kept out of training:
their test rows by history alone, by popularity, and by the model that was trained on them, too.
Of the settings of a tower the best on validation is taken, with the first seed.

fitting: users kept out of training, for towers that know ids alone: the mean of the vectors of
what they chose, and a vector fitted to it with the candidates fixed (Hu, Koren and Volinsky, ICDM
2008, doi:10.1109/ICDM.2008.22, eq. (4)), in the scale of Rendle et al., RecSys 2022:

    w = (Σ_{i in history} v_i v_iᵀ + α Σ_i v_i v_iᵀ + λ I)^-1 Σ_{i in history} v_i

Both weights are chosen on the users' validation rows with their train rows as history; the test
rows are predicted from both. A large λ is the mean.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.features import BATCH, LEARNING_RATE, SHARED, prepared
from benchmarks.record import command, write
from pipeline.contract import hashing, schema
from towers.data.dataframe import from_dataframe
from towers.data.interactions import Positives, RetrievalData
from towers.evaluation.evaluate import live_embeddings
from towers.legacy_keras import tf_keras
from towers.metrics.definitions import mean_metrics
from towers.metrics.held_out import FullCorpusMetrics, HeldOut, Means, Ranking
from towers.metrics.ranking import find_hits, rank_by_popularity, rank_corpus, tie_order
from towers.model.optimizers import CoupledAdam
from towers.model.two_tower import TwoTower

KS = (10, 20, 50)
UNSEEN = 0.1  # share of the users
TOWERS: dict[str, list[dict[str, Any]]] = {  # name → settings, of which validation chooses
    # the best on validation of all in `benchmarks.features`
    "features": [
        {"tower": "features", "query_inputs": ("history",), "candidate_inputs": ("id",)},
    ],
    "fism": [{"tower": "fism"}, {"tower": "fism", "temperature": 0.15}],
}
UNOBSERVED = (0.0, 1e-4, 1e-3, 1e-2, 0.1)  # α
RIDGE = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0, 1e6)  # λ


def main() -> None:
    """Parses, and runs the parts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="directory of the logs")
    parser.add_argument("--json", required=True, help="where to write the results")
    parser.add_argument("--quick", action="store_true", help="one epoch and one seed")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[10, 11, 12])
    parser.add_argument("--epochs", type=int, default=20, help="at most")
    options = parser.parse_args()
    if options.quick:
        options.epochs, options.seeds = 1, options.seeds[:1]
    file = Path(options.json)
    results = json.loads(file.read_text()) if file.exists() else {}
    with tempfile.TemporaryDirectory() as work:
        tafeng = prepared(Path(options.data) / "tafeng", Path(work), withheld=0.0)
        for part in options.parts:
            results.setdefault(part, {})["command"] = command("live")
            for _ in PARTS[part](tafeng, options, results[part]):
                write(options.json, results)
    print(json.dumps(results, indent=1))


def freshness(data: RetrievalData, options: argparse.Namespace, results: dict[str, Any]) -> Any:
    """Live and stale histories, and unseen users; yields after every training."""
    rows = HeldOut(data, "test", history="live")
    unseen = unseen_queries(data)
    in_train = data.positives("train").sizes[rows.query_ids] > 0
    groups = {
        "all": np.ones(len(rows.query_ids), bool),
        "users with train rows": in_train,
        "users without train rows": ~in_train,
        "unseen": np.isin(rows.query_ids, unseen),
    }
    results["rows"] = {name: int(group.sum()) for name, group in groups.items()}
    results["popularity"] = by_group(rows, rows.rank_by_popularity(max(KS)), groups)
    towers = results.setdefault("towers", {})
    first = {}  # the best model of each tower with the first seed
    for name, settings in TOWERS.items():
        if name in towers:
            continue
        models = [trained(data, setting, options.seeds[0], options.epochs) for setting in settings]
        best = max(range(len(models)), key=lambda number: models[number][1]["validation"])
        first[name] = models[best]
        choice = [record for _, record in models]
        towers[name] = {"choice": choice, "settings": SHARED | settings[best], "seeds": {}}
    for seed, name in itertools.product(options.seeds, TOWERS):
        seeds, setting = towers[name]["seeds"], towers[name]["settings"]
        if "trained without" in seeds.get(str(seed), {}):
            continue
        known = first.get(name) if seed == options.seeds[0] else None
        model, record = known or trained(data, setting, seed, options.epochs)
        candidates = model.candidate_embeddings()
        stale = rows.rank(model.query_embeddings().numpy()[rows.query_ids], candidates, max(KS))
        live = rows.rank(live_embeddings(model, rows), candidates, max(KS))
        measured = {"live": by_group(rows, live, groups), "stale": by_group(rows, stale, groups)}
        seeds[str(seed)] = {"trained on all": record | measured}
        yield
        model, record = trained(without_queries(data, unseen), setting, seed, options.epochs)
        live = rows.rank(live_embeddings(model, rows), model.candidate_embeddings(), max(KS))
        only = {"unseen": groups["unseen"]}
        seeds[str(seed)]["trained without"] = record | {"live": by_group(rows, live, only)}
        yield


def fitting(tafeng: RetrievalData, options: argparse.Namespace, results: dict[str, Any]) -> Any:
    """Fitted vectors against means, of unseen users; yields after every training."""
    df = pd.read_parquet(Path(options.data) / "gowalla" / "interactions.parquet")
    gowalla = from_dataframe(df, user="user_id", item="item_id", validation_ratio=0.1)
    for name, data, tower in (
        ("gowalla", gowalla, "id"),
        ("tafeng", tafeng, "id"),
        ("tafeng", tafeng, "gmf"),
    ):
        if f"{name} {tower}" in results:
            continue
        without = without_queries(data, unseen_queries(data))
        setting = {"tower": tower} | ({"temperature": 0.1} if name == "gowalla" else {})
        model, record = trained(without, setting, options.seeds[0], options.epochs, faster=4)
        candidates = model.candidate_embeddings().numpy()
        results[f"{name} {tower}"] = record | fit_and_measure(data, candidates)
        yield


PARTS = {"freshness": freshness, "fitting": fitting}


def without_queries(data: RetrievalData, query_ids: np.ndarray) -> RetrievalData:
    """The same data with the rows of some queries in the test split alone."""
    unseen = np.zeros(data.num_queries, bool)
    unseen[query_ids] = True

    def load(split: str) -> dict[str, np.ndarray]:
        rows = data.arrays(split)
        kept = ~unseen[rows[schema.QUERY_ID]] | (split == "test")
        return {name: values[kept] for name, values in rows.items()}

    chosen = load("train")[schema.CANDIDATE_ID]
    return RetrievalData(
        data.query_vocabulary,
        data.candidate_vocabulary,
        np.bincount(chosen, minlength=data.num_candidates),
        load,
        fingerprint=data.fingerprint,
        source=data.source,
        features=data.features,
    )


def unseen_queries(data: RetrievalData) -> np.ndarray:
    """The users that are kept out of training."""
    hashes = hashing.row_hash(0, "unseen", data.query_vocabulary.fingerprints)
    return np.flatnonzero(hashes < np.uint64(UNSEEN * 2**64))


def trained(
    data: RetrievalData, setting: dict[str, Any], seed: int, epochs: int, *, faster: float = 1
) -> tuple[TwoTower, dict[str, Any]]:
    """A model, stopped by validation, and what to record of it."""
    model = TwoTower(data, **SHARED | setting, seed=seed)
    model.compile(optimizer=CoupledAdam(faster * LEARNING_RATE))
    stop = tf_keras.callbacks.EarlyStopping(
        "val_recall@50", mode="max", patience=2, restore_best_weights=True
    )
    started = time.monotonic()
    callbacks = [FullCorpusMetrics(data, "validation", ks=(50,)), stop]
    rows = data.train(BATCH, seed=seed)
    history = model.fit(rows, epochs=epochs, verbose=0, callbacks=callbacks).history
    values = history["val_recall@50"]
    record = {
        "setting": SHARED | setting | {"learning_rate": faster * LEARNING_RATE},
        "validation": round(max(values), 5),
        "best_epoch": int(np.argmax(values)) + 1,
        "seconds": round(time.monotonic() - started, 1),
    }
    print(record, flush=True)
    return model, record


def by_group(rows: HeldOut, ranking: Ranking, groups: dict[str, np.ndarray]) -> dict[str, Any]:
    """Recall and NDCG of the rows of each group."""
    return {name: rounded(rows.means(ranking, KS, rows_in)) for name, rows_in in groups.items()}


def fit_and_measure(data: RetrievalData, candidates: np.ndarray) -> dict[str, Any]:
    """Chooses both weights on validation and measures on test, beside mean and popularity."""
    users = unseen_queries(data)
    train = data.positives("train")
    users = users[train.sizes[users] > 0]
    validation = {}
    for alpha, ridge in itertools.product(UNOBSERVED, RIDGE):
        vectors = fit(candidates, train, users, alpha, ridge)
        measured = measure(data, "validation", users, vectors, candidates)
        validation[f"alpha {alpha:g}, lambda {ridge:g}"] = measured["recall@50"]
    validation["mean"] = measure(
        data, "validation", users, mean_of(candidates, train, users), candidates
    )["recall@50"]
    number = int(np.argmax(list(validation.values())[:-1]))
    alpha, ridge = list(itertools.product(UNOBSERVED, RIDGE))[number]
    before = data.positives("train", "validation")
    return {
        "validation_recall@50": validation,
        "chosen": {"alpha": alpha, "lambda": ridge},
        "users": len(users),
        "test": {
            "fitted": measure(
                data, "test", users, fit(candidates, before, users, alpha, ridge), candidates
            ),
            "mean": measure(data, "test", users, mean_of(candidates, before, users), candidates),
            "popularity": measure(data, "test", users, None, candidates),
        },
    }


def mean_of(candidates: np.ndarray, chosen: Positives, users: np.ndarray) -> np.ndarray:
    """The mean of what each user chose: [U, D]."""
    return np.stack([candidates[chosen.of(user)].mean(axis=0) for user in users])


def fit(
    candidates: np.ndarray, chosen: Positives, users: np.ndarray, alpha: float, ridge: float
) -> np.ndarray:
    """The fitted vector of each user: [U, D]."""
    wide = candidates.astype(np.float64)
    every = alpha * wide.T @ wide + ridge * np.eye(wide.shape[1])
    rows = [wide[chosen.of(user)] for user in users]
    return np.stack([np.linalg.solve(own.T @ own + every, own.sum(axis=0)) for own in rows])


def measure(
    data: RetrievalData,
    split: str,
    users: np.ndarray,
    vectors: np.ndarray | None,
    candidates: np.ndarray,
) -> dict[str, float]:
    """Metrics of some users, who have vectors [U, D], or by popularity."""
    held_out = data.positives(split)
    known = data.positives(*schema.SPLITS[: schema.SPLITS.index(split)])
    order = tie_order(data.candidate_vocabulary.fingerprints)
    asked = users[held_out.sizes[users] > 0]
    if vectors is None:
        ranked = rank_by_popularity(data.train_counts, asked, known, k=max(KS), order=order)
    else:
        queries = np.zeros((data.num_queries, candidates.shape[1]), np.float32)
        queries[users] = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        ranked = rank_corpus(queries, candidates, asked, known, k=max(KS), order=order)
    hits = find_hits(ranked, asked, held_out)
    return rounded(mean_metrics(hits, held_out.sizes[asked], KS))


def rounded(means: Means, metrics: Sequence[str] = ("recall", "ndcg")) -> dict[str, float]:
    """Some metrics, and the half-width of recall at the deepest cut-off."""
    kept = {name: round(v, 5) for name, v in means[0].items() if name.split("@")[0] in metrics}
    return kept | {"recall@50 ±": round(means[1]["recall@50"], 5)}


if __name__ == "__main__":
    main()
