"""The rows of the standard split: baselines of other libraries, and ours, as flags of `twotower`.

    scores = popularity(train, 0)  # train: float32 [Q, N] of ones, a row for each query
    scores(np.arange(2)).shape  # (2, N)

EASE, from one matrix of users by users (3.6 GB for Gowalla), and GF-CF are computed here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp
from scipy.linalg import lapack
from scipy.sparse.linalg import svds

from towers.presets import FLAGS

Scores = Callable[[np.ndarray], np.ndarray]  # queries int64 [b] → scores [b, N], as train has N


@dataclasses.dataclass(frozen=True)
class Ours:
    """A row that `twotower train` makes.

    Attributes:
      settings: fields of `TrainConfig` that are fixed.
      space: what is searched, as for `twotower tune --space`.
      epochs: at most; the best one on what was set aside is taken.
      teacher: the row whose run of the same rows and seed is learned from and started from.
    """

    settings: Mapping[str, Any]
    space: Sequence[str]
    epochs: int = 20
    source: str = "ours"
    teacher: str = ""


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A row of another library.

    Attributes:
      fit: train matrix, seed, and settings by name → scores.
      space: name → range, as for `twotower tune --space`.
      source: the library.
      seeded: whether the seed changes anything.
    """

    fit: Callable[..., Scores]
    space: Mapping[str, str]
    source: str
    seeded: bool = False


def irspack(name: str, **fixed: Any) -> Callable[..., Scores]:
    """A recommender of irspack, by its name there."""

    def fit(train: sp.csr_matrix, seed: int, **settings: Any) -> Scores:
        import irspack.recommenders as library

        seeded = {"random_seed": seed} if name == "IALSRecommender" else {}
        model = getattr(library, name)(train, **fixed, **settings, **seeded, n_threads=1)
        return model.learn().get_score

    return fit


def ease(train: sp.csr_matrix, seed: int, *, reg: float) -> Scores:
    """Steck, WWW 2019, arXiv 1905.03375: X B for B = I - P / diag(P), P = (XᵀX + λI)⁻¹.

    P is not made: with K = XXᵀ + λI, of users by users, X P = K⁻¹ X and λ P = I - Xᵀ K⁻¹ X.
    """
    del seed
    size, blocks = train.shape[0], range(0, train.shape[0], 1024)
    gram = np.empty((size, size), np.float32, order="F")
    for start in blocks:
        gram[:, start : start + 1024] = (train @ train[start : start + 1024].T).toarray()
    gram[np.diag_indices(size)] += reg
    factor, failed = lapack.spotrf(gram, lower=1, overwrite_a=1)
    inverse, failed = lapack.spotri(factor, lower=1, overwrite_c=1) if not failed else (0, failed)
    if failed:
        raise ValueError(f"the Gram matrix is not positive definite with reg {reg}; raise it.")
    for start in blocks:  # the lower triangle is all that LAPACK fills
        stop = min(start + 1024, size)
        inverse[start:stop, stop:] = inverse[stop:, start:stop].T
        block = inverse[start:stop, start:stop]
        block[:] = np.tril(block) + np.tril(block, -1).T
    kept = np.ones(train.shape[1])  # λ diag(P)
    for start in blocks:
        rows = slice(start, start + 1024)
        kept -= np.asarray(train[rows].multiply(inverse[rows] @ train).sum(axis=0), float)[0]
    scale = (reg / kept).astype(np.float32)
    return lambda queries: train[queries].toarray() - (inverse[queries] @ train) * scale


def graph_filter(train: sp.csr_matrix, seed: int, *, low_pass: float, rank: int = 256) -> Scores:
    """GF-CF, Shen et al., CIKM 2021, arXiv 2108.07567: r (R̃ᵀR̃ + α D_i^-½ V Vᵀ D_i^½) for a row r.

    R̃ = D_u^-½ R D_i^-½, D the train rows of users and of items, V the first right singular vectors.
    """
    by_user, by_item = (np.maximum(train.sum(axis=axis), 1).A1 ** -0.5 for axis in (1, 0))
    scaled = (sp.diags(by_user) @ train @ sp.diags(by_item)).astype(np.float32).tocsr()
    transposed, rank = scaled.T.tocsr(), min(rank, min(train.shape) - 1)
    right = svds(scaled, k=rank, random_state=seed)[2].T
    first, second = by_item[:, None] * right, low_pass * (right / by_item[:, None]).T
    first, second = first.astype(np.float32), second.astype(np.float32)

    def scores(queries: np.ndarray) -> np.ndarray:
        rows = train[queries]
        linear = (transposed @ (scaled @ rows.T.toarray())).T
        return np.asarray(linear + (rows @ first) @ second)

    return scores


def popularity(train: sp.csr_matrix, seed: int) -> Scores:
    """Train rows of an item."""
    del seed
    counts = np.asarray(train.sum(axis=0), np.float32)
    return lambda queries: np.repeat(counts, len(queries), axis=0)


_COSINE = {
    "dim": 64,
    "method": "ssl_pop",
    "normalize": True,
    "l2": 0.0,
    "batch_size": 1024,
    "optimizer": "adagrad",
    "init_stddev": 0.03,
    "learning_rate_decay": 0.85,
    "decay_epochs": 1,
    "patience": 3,
}
_SPACE = (
    "learning_rate=log:0.5:5",
    "temperature=log:0.05:0.2",
    "popularity_power=linear:0:0.3",
)
_PRESET = {key: value for key, value in FLAGS["best"].items() if key != "popularity_power"}
_STUDENT = {key: value for key, value in FLAGS["student"].items() if key != "teacher_graph"}
_EPOCHS, _STUDENT_EPOCHS = _PRESET.pop("epochs"), _STUDENT.pop("epochs")
_KNN = {"top_k": "log:20:1000", "shrinkage": "linear:0:300", "feature_weighting": "NONE,BM_25"}
_IALS = {"alpha0": "log:0.003:1", "reg": "log:1e-4:0.1", "train_epochs": "log:4:32"}
ROWS: Mapping[str, Ours | Baseline] = {
    "popularity": Baseline(popularity, {}, "counts"),
    "ItemKNN": Baseline(irspack("CosineKNNRecommender", normalize=True), _KNN, "irspack"),
    "iALS": Baseline(irspack("IALSRecommender", n_components=64), _IALS, "irspack", True),
    "SLIM": Baseline(
        irspack("SLIMRecommender", n_iter=20),
        {"alpha": "log:0.0001:0.1", "l1_ratio": "log:0.001:0.3"},
        "irspack",
    ),
    "GF-CF": Baseline(graph_filter, {"low_pass": "log:0.03:3.0"}, "scipy"),
    "EASE": Baseline(ease, {"reg": "log:30:3000"}, "scipy"),
    "ids": Ours(_COSINE, _SPACE),
    "history": Ours(_COSINE | {"tower": "fism"}, (*_SPACE, "history=10,20,50")),
    "preset": Ours(_PRESET, ("popularity_power=linear:0:0.15",), epochs=_EPOCHS),
    "student": Ours(
        _STUDENT, ("teacher_graph=log:0.03:0.3",), epochs=_STUDENT_EPOCHS, teacher="preset"
    ),
}
