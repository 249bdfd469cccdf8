"""Events of a stream by their steps, and what transforms make of them."""

import pickle
import uuid

import numpy as np
from paper_recursion import Paper

from pipeline.streaming.estimator import FILES, STATE, Block

SIZES = {"num_buckets": 23, "num_hashes": 3, "alpha": 0.1}


def paper_of(events):
    return Paper.over(events, **SIZES)


def make_events(num_events=600, num_steps=60, num_ids=40, seed=0):
    """(step, fingerprint) pairs with popular and rare ids, repeats, and steps without any."""
    rng = np.random.default_rng(seed)
    steps = np.sort(rng.choice(np.arange(1, 2 * num_steps), num_steps, replace=False))
    ids = rng.integers(-(2**63), 2**63, num_ids)
    return [
        (int(step), int(ids[int(num_ids * place**2)]))
        for step, place in zip(rng.choice(steps, num_events), rng.random(num_events), strict=True)
    ]


def as_block(events):
    steps, prints = np.array(events, np.int64).reshape(-1, 2).T
    return Block(steps, prints, np.ones(len(steps), np.int64))


def keep(element, directory):
    (directory / uuid.uuid4().hex).write_bytes(pickle.dumps(element))


def kept(directory):
    return [pickle.loads(path.read_bytes()) for path in directory.iterdir()]


def save(directory, state):
    directory.mkdir()
    for name, file in zip(STATE.names, FILES, strict=True):
        np.save(directory / file, state[name])
    return str(directory)
