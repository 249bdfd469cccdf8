"""What a trained model ranks highest, for another one to learn: distillation."""

from __future__ import annotations

import logging

import numpy as np

from samplers.methods.full_softmax import SoftTargets
from towers.data.interactions import RetrievalData
from towers.metrics.ranking import rank_blocks, tie_order
from towers.model.two_tower import TwoTower
from towers.training.run_directory import open_run
from towers.training.settings import TrainConfig

log = logging.getLogger(__name__)


def targets_of_run(config: TrainConfig, data: RetrievalData) -> SoftTargets:
    """The targets that the run `config.teacher` gives.

    Raises:
      ValueError: there is no such run, or it was trained on other data.
    """
    model, _ = open_run(config.teacher, data)
    log.info("train: the ranking of %s is read off", config.teacher)
    return soft_targets(model, data, config.teacher_candidates)


def soft_targets(
    model: TwoTower, data: RetrievalData, k: int, *, block_size: int = 256
) -> SoftTargets:
    """What a model ranks highest for each query among what the query did not choose in train.

    Held-out rows are not looked at: where the teacher ranks them high, it has found them.

    Args:
      model: the teacher, a trained model of the data.
      data: whose train split the student is trained on too.
      k: T, candidates of each query; fewer where the corpus is smaller.
      block_size: queries ranked at a time.
    """
    chosen = data.positives("train")
    blocks = rank_blocks(
        model.query_embeddings(),
        model.candidate_embeddings(),
        np.arange(data.num_queries),
        chosen,
        k=k,
        order=tie_order(data.candidate_vocabulary.fingerprints),
        block_size=block_size,
    )
    ids, scores = zip(*((ids.astype(np.int32), scores) for ids, scores in blocks), strict=True)
    return SoftTargets(
        np.concatenate(ids),
        np.concatenate(scores),
        chosen.candidate_ids.astype(np.int32),
        chosen.offsets,
    )
