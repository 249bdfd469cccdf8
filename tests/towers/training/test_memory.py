"""A step that does not fit: split into blocks with the same result, or refused in one line."""

import pandas as pd
import pytest

import towers
from towers.training import memory
from towers.training.settings import TrainConfig


@pytest.fixture(scope="module")
def data():
    pairs = [(query, (query * 7 + place) % 512) for query in range(300) for place in range(4)]
    frame = pd.DataFrame(pairs, columns=["query", "candidate"])
    return towers.from_dataframe(frame, user="query", item="candidate", train_ratio=1.0)


def model_and_config(data, method, **options):
    model = towers.TwoTower(data, dim=16, method=method, **options)
    config = TrainConfig(data="data", run="run", method=method, dim=16, batch_size=4096)
    return model, config


def machine_with(monkeypatch, model, config, share):
    """A machine that has room for the tables and for a share of a step."""
    weights = sum(int(v.shape.num_elements()) for v in model.trainable_variables)
    step = memory.step_bytes(model.method, config.batch_size, config.dim)
    size = (4 * 5 * weights + share * step) / 0.8
    monkeypatch.setattr(memory, "machine_bytes", lambda: size)
    return step


@pytest.mark.parametrize("method", ["ssl_pop", "bir", "bmns", "full_softmax"])
def test_a_step_that_does_not_fit_is_split_into_blocks(data, method, monkeypatch, caplog):
    model, config = model_and_config(data, method)
    machine_with(monkeypatch, model, config, 1.01)
    memory.fit_to_memory(model, config)
    assert model.method.block_size is None
    machine_with(monkeypatch, model, config, 0.6)
    with caplog.at_level("INFO"):
        memory.fit_to_memory(model, config)
    block = model.method.block_size
    assert block is not None
    assert f"candidates are scored {block} at a time" in caplog.text
    assert memory.step_bytes(model.method, 4096, 16) <= 0.8 * memory.machine_bytes()


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("softmax_v", {}, "lower batch_size, such as to 1024, or num_negatives"),
        ("ssl_pop", {"block_size": 2048}, "lower batch_size, such as to 1024."),
        ("bir", {"draws": "systematic"}, "lower batch_size, such as to 1024."),
    ],
)
def test_a_step_that_cannot_be_split_is_refused(data, method, options, message, monkeypatch):
    model, config = model_and_config(data, method, **options)
    machine_with(monkeypatch, model, config, 0.5)
    with pytest.raises(ValueError, match=f"a step of {method} with batch_size 4096") as error:
        memory.fit_to_memory(model, config)
    assert str(error.value).rstrip(".").endswith(message.rstrip("."))


def test_tables_that_do_not_fit_are_refused(data, monkeypatch):
    model, config = model_and_config(data, "bpr")
    monkeypatch.setattr(memory, "machine_bytes", lambda: 1000)
    with pytest.raises(ValueError, match="lower dim, or take the optimizer adagrad"):
        memory.fit_to_memory(model, config)


def test_the_memory_of_this_machine_is_known():
    assert 1 << 28 < memory.machine_bytes() < 1 << 50
