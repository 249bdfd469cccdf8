"""A step that does not fit: split into blocks with the same result, or refused in one line."""

import pandas as pd
import pytest

import towers
from towers.model import memory


@pytest.fixture(scope="module")
def data():
    pairs = [(query, (query * 7 + place) % 512) for query in range(300) for place in range(4)]
    frame = pd.DataFrame(pairs, columns=["query", "candidate"])
    return towers.from_dataframe(frame, user="query", item="candidate", train_ratio=1.0)


ROWS = 4096


def make_model(data, method, **options):
    model = towers.TwoTower(data, dim=16, method=method, **options)
    model.compile(optimizer="adam")
    return model


def machine_with(monkeypatch, model, share, rows=ROWS):
    """A machine that has room for the tables and for a share of a step."""
    weights = sum(int(v.shape.num_elements()) for v in model.trainable_variables)
    step = memory.step_bytes(model.method, rows, 16)
    size = (4 * 5 * weights + share * step) / 0.8
    monkeypatch.setattr(memory, "machine_bytes", lambda: size)
    return step


@pytest.mark.parametrize("method", ["ssl_pop", "bir", "bmns", "full_softmax"])
def test_a_step_that_does_not_fit_is_split_into_blocks(data, method, monkeypatch, caplog):
    model = make_model(data, method)
    machine_with(monkeypatch, model, 1.01)
    memory.fit_to_memory(model, ROWS)
    assert model.method.block_size is None
    machine_with(monkeypatch, model, 0.6)
    with caplog.at_level("INFO"):
        memory.fit_to_memory(model, ROWS)
    block = model.method.block_size
    assert block is not None
    assert f"candidates are scored {block} at a time" in caplog.text
    assert memory.step_bytes(model.method, ROWS, 16) <= 0.8 * memory.machine_bytes()


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("softmax_v", {}, "lower batch_size, such as to 1024, or num_negatives"),
        ("ssl_pop", {"block_size": 2048}, "lower batch_size, such as to 1024."),
        ("bir", {"draws": "independent"}, "lower batch_size, such as to 1024."),
    ],
)
def test_a_step_that_cannot_be_split_is_refused(data, method, options, message, monkeypatch):
    model = make_model(data, method, **options)
    machine_with(monkeypatch, model, 0.5)
    with pytest.raises(ValueError, match=f"a step of {method} with batch_size 4096") as error:
        memory.fit_to_memory(model, ROWS)
    assert str(error.value).rstrip(".").endswith(message.rstrip("."))


@pytest.mark.long
def test_fit_looks_at_the_memory_of_its_batches(data, monkeypatch):
    """A step that was compiled for smaller batches is compiled again, with blocks."""
    model = make_model(data, "ssl_pop")
    model.fit(data.train(8), epochs=1, verbose=0)
    machine_with(monkeypatch, model, 0.9, rows=1200)
    before = model._differentiate
    model.fit(data.train(10**7), epochs=1, verbose=0)  # 1,200 rows are all there are
    assert model.method.block_size == 1024
    assert model._differentiate is not before
    machine_with(monkeypatch, model, 0.01, rows=1200)
    with pytest.raises(ValueError, match=r"with batch_size 1200 needs about .* lower batch_size"):
        model.fit(data.train(1200), epochs=1, verbose=0)


def test_fit_refuses_what_are_no_batches_of_its_data(data):
    model = make_model(data, "ssl_pop")
    frame = pd.DataFrame({"query": ["a", "b"], "candidate": ["c", "d"]})
    other = towers.from_dataframe(frame, user="query", item="candidate", train_ratio=1.0)
    for wrong in (data, frame):
        with pytest.raises(ValueError, match=r"model\.fit\(data\.train\(2048\)\), got "):
            model.fit(wrong, verbose=0)
    with pytest.raises(ValueError, match="made of other data"):
        model.fit(other.train(2), verbose=0)


def test_tables_that_do_not_fit_are_refused(data, monkeypatch):
    model = make_model(data, "bpr")
    monkeypatch.setattr(memory, "machine_bytes", lambda: 1000)
    with pytest.raises(ValueError, match="lower dim, or take the optimizer rowwise_adagrad"):
        memory.fit_to_memory(model, ROWS)


def test_the_memory_of_this_machine_is_known():
    assert 1 << 28 < memory.machine_bytes() < 1 << 50
