import asyncio
import contextlib
import gc
import json
import logging
import math
import shutil
import threading
import time
import weakref

import numpy as np
import pytest
import tensorflow as tf
from saved_models import write_affine, write_config

from serving.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InvalidRequest,
    NotFound,
    Overloaded,
    ServiceError,
    Unavailable,
)
from serving.retrieval.corpus import Corpus
from serving.retrieval.requests import RetrieveRequest
from serving.runtime import batch_queue
from serving.runtime.batch_queue import Batcher
from serving.runtime.configuration import ModelConfig
from serving.runtime.loaded_version import LoadedVersion
from serving.runtime.service import Call, Service
from serving.settings import ServeConfig
from serving.version.names import State
from serving.version.versions import Version
from serving.version.warmup_requests import WARMUP

POLL = 0.01


def ids(*raw_ids):
    return {"query_id": np.array([raw.encode() for raw in raw_ids], object)}


def decoded(prediction):
    rows = prediction.outputs["candidate_id"]
    return [json.loads(row) for row in prediction.ids["candidate_id"].json_lists(rows)]


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 120))


async def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        await asyncio.sleep(0.005)


@pytest.fixture(scope="module", autouse=True)
def _settled():
    """What is imported is left out of the garbage collections that follow each version."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def models(tmp_path):
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


def put(source, models, number, name="shop"):
    """Copies a version into place by one rename."""
    home = models / name
    home.mkdir(exist_ok=True)
    aside = shutil.copytree(source, home / f".partial-{number}")
    aside.rename(home / str(number))


def ready(service):
    """Starts a service, and waits until all that it is to serve can answer."""
    service.start()
    end = time.monotonic() + 60
    while not (service.ready and all(model.settled for model in service._served.models.values())):
        assert time.monotonic() < end
        time.sleep(POLL)


@pytest.fixture
def start():
    made = []

    def start(models, **options):
        service = Service(ServeConfig(str(models), poll_seconds=POLL, **options))
        made.append(service)
        ready(service)
        assert service.alive
        return service

    yield start
    for service in made:
        service.close()


@pytest.fixture(scope="module")
def adder(tmp_path_factory):
    """Models with one of another framework, which is loaded in a moment: what it answers is 1."""
    models = tmp_path_factory.mktemp("adder")
    write_affine(models / "adder" / "1", 1.0)
    return models


X = {"x": np.zeros((1, 2), np.float32)}


@pytest.fixture(scope="module")
def shared(small):
    """A service of the small version that no test changes."""
    service = Service(ServeConfig(str(small.models), poll_seconds=POLL, index="exact", max_k=200))
    ready(service)
    yield service
    service.close()


class Held:
    """Keeps the only thread of a service busy, so that requests wait."""

    def __init__(self, service):
        self._gate = threading.Event()
        self._batcher = Batcher(service._threads, lambda items: self._gate.wait(60) and items)

    async def __aenter__(self):
        self._running = self._batcher.submit(0, 1)
        await until(lambda: self._batcher.running)
        return self

    async def __aexit__(self, *_):
        self._gate.set()
        await self._running


def metric(service, start):
    """The sum of the samples whose line starts like that."""
    lines = service.metrics.exposition().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(start))


# --- predict ------------------------------------------------------------------------------------


def test_a_prediction_is_that_of_brute_force(shared, small):
    prediction = run(shared.predict(Call("twotower"), ids("query 3", "query 5")))
    assert decoded(prediction) == [small.sample.best_ids(3)[:40], small.sample.best_ids(5)[:40]]
    assert prediction.version == 1
    assert prediction.signature.name == "serving_default"


def test_inputs_may_be_made_when_the_signature_is_known(shared, small):
    async def decode(signature):
        assert list(signature.inputs) == ["query_id"]
        return ids("query 3")

    prediction = run(shared.predict(Call("twotower"), decode, signature="query_embedding"))
    np.testing.assert_array_equal(prediction.outputs["embedding"][0], small.sample.queries[3])


def test_requests_at_the_same_time_get_their_own_results(shared, small):
    async def client(query):
        for _ in range(5):
            [best] = decoded(await shared.predict(Call("twotower"), ids(f"query {query}")))
            assert best == small.sample.best_ids(query)[:40]

    async def main():
        await asyncio.gather(*(client(query) for query in range(20)))

    before = metric(shared, 'twotower_batch_rows_count{api="predict"')
    run(main())
    assert metric(shared, 'twotower_batch_rows_count{api="predict"') - before < 100  # joined


@pytest.mark.parametrize("rows", [0, 1, 64, 65, 200])
def test_more_rows_than_a_batch_holds_are_run_in_several(shared, small, rows):
    queries = [row % 20 for row in range(rows)]
    prediction = run(
        shared.predict(Call("twotower"), ids(*(f"query {query}" for query in queries)))
    )
    assert prediction.outputs["score"].shape == (rows, 40)
    best = {query: small.sample.best_ids(query)[:40] for query in range(20)}
    assert decoded(prediction) == [best[query] for query in queries]


def test_more_rows_than_may_wait_are_refused(shared):
    with pytest.raises(InvalidRequest, match="at most 6400 rows, got 6401"):
        run(shared.predict(Call("twotower"), ids(*["query 1"] * 6401)))


def test_a_refused_request_is_freed_with_its_error(shared):
    async def refused():
        inputs = ids("query 1" * 20_000)
        with contextlib.suppress(InvalidRequest):
            await shared.predict(Call("twotower"), inputs)
            pytest.fail("an id of 140,000 letters is not refused")
        return weakref.ref(inputs["query_id"])

    gc.disable()
    try:
        assert run(refused())() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        ({"model": "other"}, NotFound, "Model 'other' is not served; there are: twotower"),
        ({"version": 3}, NotFound, "Version 3 of model 'twotower' is not served; there are: 1"),
        ({"label": "stable"}, InvalidRequest, "Label 'stable' is not one of model 'twotower'"),
        (
            {"signature": "other"},
            FailedPrecondition,
            "there are: embedding_search, query_embedding",
        ),
        ({"version": 1, "label": "x"}, InvalidRequest, "not both"),
        ({"inputs": {"query": ["a"]}}, InvalidRequest, r"takes 'query_id': string \[any\]"),
        ({"inputs": {"query_id": np.ones(1, np.int64)}}, InvalidRequest, "got int64"),
        ({"deadline": 0.0}, DeadlineExceeded, "deadline"),
    ],
)
def test_what_cannot_be_answered_is_refused(shared, request_, error, message):
    arguments = {"inputs": ids("query 1"), **request_}
    fields = [name for name in arguments if name in Call._fields]
    call = Call(**{"model": "twotower", **{name: arguments.pop(name) for name in fields}})
    with pytest.raises(error, match=message):
        run(shared.predict(call, **arguments))
    assert decoded(run(shared.predict(Call("twotower"), ids("query 1"))))


def test_a_fault_of_ours_is_told_without_its_details(shared, caplog):
    def decode(signature):
        raise RuntimeError("secret")

    with pytest.raises(ServiceError, match=r"^The service failed; its log says why\.$") as told:
        run(shared.predict(Call("twotower", request_id="r7"), decode))
    assert told.value.http == 500
    assert "Request r7 failed." in caplog.text
    assert "RuntimeError: secret" in caplog.text


# --- retrieve -----------------------------------------------------------------------------------


def test_a_retrieval_filters_and_falls_back(shared, small):
    request = RetrieveRequest(["query 1", "nobody"], k=5, exclude_seen=True)
    response = run(shared.retrieve(Call("twotower"), request))
    assert response.version == 1
    known, unknown = response.results
    assert known.candidate_ids == small.sample.best_ids(1, small.sample.seen[1])[:5]
    assert (unknown.known, unknown.fallback, len(unknown.candidate_ids)) == (False, "popular", 5)


def test_a_retrieval_that_comes_alone_runs_in_the_event_loop(small, start, monkeypatch):
    service = start(small.models, index="exact")
    ran_in, batchers, outcomes = [], set(), Batcher._outcomes

    def noting(self, batch):
        batchers.add(self)
        ran_in.append(threading.current_thread() is threading.main_thread())
        return outcomes(self, batch)

    def retrieve(**fields):
        return service.retrieve(Call("twotower"), RetrieveRequest(["query 1"], **fields))

    async def main():
        for fields in ({}, {"k": 3}, {"exclude": ["none"]}, {"exclude_seen": True}, {"k": 100}):
            await retrieve(**fields)
            for batcher in batchers:  # a result is there before its thread has ended the batch
                batcher.wait_until_idle()
        await asyncio.gather(retrieve(), retrieve())

    monkeypatch.setattr(batch_queue, "_QUICK_SECONDS", math.inf)
    monkeypatch.setattr(Batcher, "_outcomes", noting)
    run(main())
    # The first one tells how long a row takes; filters and many results may take longer.
    assert ran_in[:5] == [False, True, False, False, False]
    assert not any(ran_in[5:])


@pytest.mark.parametrize("queries", [0, 1, 65, 130])
def test_more_queries_than_a_batch_holds_are_searched_in_several(shared, small, queries):
    rows = [row % 20 for row in range(queries)]
    request = RetrieveRequest([f"query {query}" for query in rows], k=3, exclude=["none", "nil"])
    response = run(shared.retrieve(Call("twotower"), request))
    assert [result.query_id for result in response.results] == list(request.query_ids)
    assert [result.candidate_ids for result in response.results] == [
        small.sample.best_ids(query)[:3] for query in rows
    ]
    assert response.unknown_ids == 2


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (RetrieveRequest(["nobody"], unknown_queries="error"), NotFound, "not known to the model"),
        (RetrieveRequest(["query 1"], k=201), InvalidRequest, "k must be at most 200, got 201"),
        (RetrieveRequest(features={"age": [3]}), InvalidRequest, "takes query_ids, not features"),
        (RetrieveRequest(["query 1"] * 6401), InvalidRequest, "at most 6400 rows, got 6401"),
        (RetrieveRequest(["\ud800"]), InvalidRequest, "Text must be Unicode"),
    ],
)
def test_what_cannot_be_retrieved_is_refused(shared, request_, error, message):
    with pytest.raises(error, match=message):
        run(shared.retrieve(Call("twotower"), request_))


def test_one_bad_retrieval_does_not_hit_its_neighbours(shared, small):
    requests = [
        RetrieveRequest(["query 1"], k=3),
        RetrieveRequest(["\ud800"], k=3),
        RetrieveRequest(["nobody"], k=3, unknown_queries="error"),
        RetrieveRequest(["query 2"], k=3),
    ]

    async def main():
        calls = [shared.retrieve(Call("twotower"), request) for request in requests * 3]
        return await asyncio.gather(*calls, return_exceptions=True)

    outcomes = run(main())
    for turn in range(0, 12, 4):
        one, unicode, unknown, two = outcomes[turn : turn + 4]
        assert one.results[0].candidate_ids == small.sample.best_ids(1)[:3]
        assert two.results[0].candidate_ids == small.sample.best_ids(2)[:3]
        assert isinstance(unicode, InvalidRequest)
        assert isinstance(unknown, NotFound)


@pytest.fixture
def looked_up(monkeypatch):
    """How many ids of filters were looked up, each time."""
    counts, filter_rows = [], Corpus.filter_rows

    def counting(self, request):
        counts.append(len(request.exclude) + len(request.allow or ()))
        return filter_rows(self, request)

    monkeypatch.setattr(Corpus, "filter_rows", counting)
    return counts


def test_filters_are_looked_up_once_for_all_parts_of_a_request(shared, small, looked_up):
    best = small.sample.best_ids(1)
    request = RetrieveRequest(["query 1"] * 200, k=2, allow=best[2:50], exclude=best[3:4])
    results = run(shared.retrieve(Call("twotower"), request)).results
    assert [result.candidate_ids for result in results] == [[best[2], best[4]]] * 200
    assert looked_up == [49]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"query_ids": ["query 1"] * 6401}, "at most 6400 rows, got 6401"),
        ({"query_ids": ["query 1"] * 6400, "k": 101}, "at most 640000 results"),
        ({"query_ids": ["query 1"], "allow": ["a"] * 100_001}, "at most 100000 ids, got 100001"),
    ],
)
def test_sizes_are_seen_before_anything_is_looked_up(shared, looked_up, fields, message):
    with pytest.raises(InvalidRequest, match=message):
        run(shared.retrieve(Call("twotower"), RetrieveRequest(**fields)))
    assert looked_up == []


def test_the_deadline_covers_the_encoding(shared):
    async def never(answer, deadline):
        assert deadline < time.monotonic() + 0.5
        await asyncio.sleep(3600)

    def call():
        return Call("twotower", deadline=time.monotonic() + 0.5)

    for work in (
        lambda: shared.predict(call(), ids("query 1"), encode=never),
        lambda: shared.retrieve(call(), RetrieveRequest(["query 1"]), encode=never),
    ):
        with pytest.raises(DeadlineExceeded):
            run(work())


def test_embeddings_are_retrieved_from_a_version_without_a_query_model(by_embedding, start):
    sample = by_embedding.sample
    service = start(by_embedding.models, max_batch_size=8)
    queries = [row % 20 for row in range(19)]  # more than a batch
    for rows in (sample.queries[queries], sample.queries[queries].tolist()):
        request = RetrieveRequest(features={"embedding": rows}, k=4)
        results = run(service.retrieve(Call("twotower"), request)).results
        expected = [sample.best_ids(query)[:4] for query in queries]
        assert [result.candidate_ids for result in results] == expected
    for wrong in ({"embedding": 3}, {"embedding": [[1.0]]}, {"x": [1], "y": [1, 2]}, {}):
        with pytest.raises(InvalidRequest, match="features must be"):
            run(service.retrieve(Call("twotower"), RetrieveRequest(features=wrong)))


def test_another_framework_has_no_retrieval(adder, start):
    service = start(adder)
    with pytest.raises(InvalidRequest, match="answers :predict alone"):
        run(service.retrieve(Call("adder"), RetrieveRequest(["query 1"])))
    prediction = run(service.predict(Call("adder"), {"x": np.ones((3, 2), np.float32)}))
    np.testing.assert_array_equal(prediction.outputs["y"], np.full((3, 2), 2))
    total = run(
        service.predict(Call("adder"), {"x": np.ones((100, 2), np.float32)}, signature="total")
    )
    assert total.outputs["total"] == 200


# --- limits -------------------------------------------------------------------------------------


def test_overload_is_refused_at_once_and_passes(adder, start):
    service = start(adder, num_batch_threads=1, max_batch_size=2, max_enqueued_batches=2)

    async def main():
        async with Held(service):
            waiting = [
                asyncio.create_task(service.predict(Call("adder"), {"x": X["x"] + number}))
                for number in range(4)
            ]
            await asyncio.sleep(0)
            with pytest.raises(Overloaded, match="4 rows wait already, at most 4 may"):
                await service.predict(Call("adder", entrypoint="GRPC"), X)
            with pytest.raises(Overloaded):
                await service.predict(Call("adder"), {"x": np.zeros((3, 2), np.float32)})
            assert metric(service, "twotower_queue_depth") == 4
        return await asyncio.gather(*waiting)

    predictions = run(main())
    assert [prediction.outputs["y"][0, 0] for prediction in predictions] == [1, 2, 3, 4]
    refusals = 'twotower_refusals_total{entrypoint="GRPC",reason="overloaded"}'
    assert metric(service, refusals) == 1
    assert run(service.predict(Call("adder"), X)).outputs["amount"] == [1]


def test_deadlines_and_clients_that_leave_take_nothing_with_them(adder, start):
    service = start(adder, num_batch_threads=1)

    async def main():
        rows = metric(service, "twotower_batch_rows_sum")
        async with Held(service):
            late = asyncio.create_task(
                service.predict(Call("adder", deadline=time.monotonic() + 0.01), X)
            )
            leaves = asyncio.create_task(service.predict(Call("adder"), X))
            stays = asyncio.create_task(service.predict(Call("adder"), X))
            await asyncio.sleep(0)
            leaves.cancel()
            with pytest.raises(DeadlineExceeded, match="no result before the deadline"):
                await late
            with pytest.raises(asyncio.CancelledError):
                await leaves
            assert not stays.done()
        await stays
        # The thread has measured the batch once it takes the next one.
        await service.predict(Call("adder"), X)
        return metric(service, "twotower_batch_rows_sum") - rows

    # One row each of what stayed, of what the thread was held with, and perhaps of the last one.
    assert run(main()) in (1, 2)
    requests = 'twotower_requests_total{api="predict",model="adder",status='
    assert metric(service, requests + '"CAN') == metric(service, requests + '"DEA') == 1


def test_the_services_own_deadline_holds_without_one_of_the_client(adder, start):
    service = start(adder, num_batch_threads=1, deadline_ms=10)

    async def main():
        async with Held(service):
            for deadline in (math.inf, time.monotonic() + 3600):
                with pytest.raises(DeadlineExceeded):
                    await service.predict(Call("adder", deadline=deadline), X)

    run(main())


def test_scann_by_default_is_exact_for_all_where_a_version_has_none(without_scann, start):
    service = start(without_scann.models, index="scann")
    predicted = run(service.predict(Call("twotower"), ids("query 3")))
    response = run(service.retrieve(Call("twotower"), RetrieveRequest(["query 3"], k=5)))
    assert response.index == "exact"
    assert decoded(predicted) == [response.results[0].candidate_ids]
    with pytest.raises(InvalidRequest, match="version 1, which was published without") as error:
        run(service.retrieve(Call("twotower"), RetrieveRequest(["query 3"], index="scann")))
    assert str(without_scann.models) not in str(error.value)


def test_no_request_loads_an_index(small, models, start, monkeypatch):
    put(small.version, models, 1, name="twotower")
    manifest = models / "twotower" / "1" / "manifest.json"
    exactly = json.loads(manifest.read_text())
    exactly["details"]["default_index"] = "exact"
    manifest.write_text(json.dumps(exactly))
    service = start(models)
    monkeypatch.setattr(Version, "load", None)
    for index in ("exact", "scann"):
        response = run(
            service.retrieve(Call("twotower"), RetrieveRequest(["query 3"], index=index))
        )
        assert response.index == index


def test_draining_ends_what_runs_and_takes_nothing_new(adder, start):
    service = start(adder, num_batch_threads=1)

    async def main():
        async with Held(service):
            running = asyncio.create_task(service.predict(Call("adder"), X))
            await asyncio.sleep(0)
            draining = asyncio.create_task(service.drain(3600))
            await asyncio.sleep(0.03)
            assert not draining.done()
            assert not service.ready
            assert service.alive
            with pytest.raises(Unavailable, match="shutting down"):
                await service.predict(Call("adder"), X)
        prediction = await running
        await draining
        return prediction

    assert run(main()).outputs["amount"] == [1]
    service.close()
    assert not service.alive


def test_draining_gives_up_after_its_time(adder, start):
    service = start(adder, num_batch_threads=1)

    async def main():
        async with Held(service):
            running = asyncio.create_task(service.predict(Call("adder"), X))
            await asyncio.sleep(0)
            await service.drain(0.01)
            assert not running.done()
        await running

    run(main())


# --- versions -----------------------------------------------------------------------------------


def test_metadata_and_status(shared):
    version, signatures = shared.metadata(Call("twotower"))
    assert version == 1
    assert sorted(signatures) == ["embedding_search", "query_embedding", "serving_default"]
    assert list(signatures["serving_default"].inputs) == ["query_id"]
    [status] = shared.status(Call("twotower"))
    assert (status.version, status.state, status.error_code) == (1, State.AVAILABLE, "OK")
    assert shared.status(Call("twotower", 1)) == [status]
    for call in (shared.metadata, shared.status):
        with pytest.raises(NotFound):
            call(Call("twotower", 2))
        with pytest.raises(NotFound):
            call(Call("other"))
    assert shared.models == ["twotower"]


def state(service, version):
    return service.status(Call("shop", version))[0].state


def test_no_request_fails_while_versions_are_swapped(without_scann, models, start):
    put(without_scann.version, models, 1)
    service = start(models)
    expected = [without_scann.sample.best_ids(query)[:5] for query in range(20)]
    answered, stop = [], False

    async def client(query):
        while not stop:
            prediction = await service.predict(Call("shop"), ids(f"query {query}"))
            assert decoded(prediction) == [expected[query]]
            request = RetrieveRequest([f"query {query}"], k=3, exclude_seen=True)
            response = await service.retrieve(Call("shop"), request)
            assert len(response.results[0].candidate_ids) == 3
            answered.append((prediction.version, response.version))

    async def main():
        nonlocal stop
        clients = [asyncio.create_task(client(query)) for query in range(3, 7)]
        await asyncio.to_thread(put, without_scann.version, models, 2)
        await until(lambda: any(pair[1] == 2 for pair in answered))
        rollback = ModelConfig("shop", specific=(1,))
        await asyncio.to_thread(service.reload, [rollback], 60)
        count = len(answered)
        await until(lambda: len(answered) > count + 20)
        stop = True
        await asyncio.gather(*clients)

    run(main())
    assert {version for pair in answered for version in pair} == {1, 2}
    assert answered[-1] == (1, 1)
    assert metric(service, "twotower_refusals_total") == 0


def test_a_version_is_not_freed_under_a_batch_whose_clients_have_left(
    adder, models, start, monkeypatch
):
    gate, running, run_all = threading.Event(), threading.Event(), LoadedVersion.run_all
    outcome = []

    def held(self, name, requests):
        running.set()
        assert gate.wait(60)
        outcome.append(run_all(self, name, requests))
        return outcome[-1]

    monkeypatch.setattr(LoadedVersion, "run_all", held)
    put(adder / "adder" / "1", models, 1)
    service = start(models)

    async def main():
        client = asyncio.create_task(service.predict(Call("shop"), X))
        assert await asyncio.to_thread(running.wait, 60)
        client.cancel()
        with pytest.raises(asyncio.CancelledError):
            await client
        await asyncio.to_thread(put, adder / "adder" / "1", models, 2)
        await until(lambda: service.status(Call("shop", 1))[0].state == State.UNLOADING)
        for _ in range(10):
            await asyncio.sleep(0.005)
            assert service.status(Call("shop", 1))[0].state == State.UNLOADING
        gate.set()
        await until(lambda: service.status(Call("shop", 1))[0].state == State.END)

    run(main())
    [[outputs]] = outcome  # it could still be run
    assert outputs["amount"] == [1]


@pytest.mark.long
def test_what_is_replaced_is_freed(small, models, start, monkeypatch, unshared):
    loaded = []
    load = Service._load

    def remember(self, model, files):
        unshared()  # the versions are copies of one another
        version = load(self, model, files)
        inner = version.loaded
        exact, scann = (inner.retriever.index(index).model for index in ("exact", "scann"))
        objects = [version, inner, inner.retriever, exact, scann]
        objects += tf.train.TrackableView(exact).descendants()  # the variables among them
        loaded.append([weakref.ref(part) for part in objects])
        return version

    monkeypatch.setattr(Service, "_load", remember)
    put(small.version, models, 1)
    service = start(models, index="scann")

    def graphs():
        return sum(type(thing).__name__ == "FuncGraph" for thing in gc.get_objects())

    async def main():
        counts = []
        for number in range(1, 4):
            if number > 1:
                await asyncio.to_thread(put, small.version, models, number)
            await until(lambda n=number: service.status(Call("shop"))[0].version == n)
            await until(
                lambda n=number: service.status(Call("shop", n))[0].state == State.AVAILABLE
            )
            await service.predict(Call("shop"), ids("query 1"))
            await service.retrieve(Call("shop"), RetrieveRequest(["query 1"], k=3))
            if number > 1:
                await until(lambda n=number: state(service, n - 1) == State.END)
            counts.append(graphs())
        old = [gone for version in loaded[:2] for gone in version]
        await until(lambda: not any(gone() is not None for gone in old))
        return counts

    counts = run(main())
    assert len(loaded) == 3
    assert all(part() is not None for part in loaded[2])
    assert max(counts[1:]) <= counts[0]  # graphs keep variables alive, in cycles


def test_a_version_that_fails_its_own_requests_is_not_served(adder, models, start):
    put(adder / "adder" / "1", models, 1)
    service = start(models)
    broken = shutil.copytree(adder / "adder" / "1", models.parent / "broken")
    (broken / WARMUP).parent.mkdir(exist_ok=True)
    (broken / WARMUP).write_bytes(b"not a TFRecord")
    put(broken, models, 2)

    async def main():
        await until(lambda: any(status.version == 2 for status in service.status(Call("shop"))))
        await until(lambda: service.status(Call("shop", 2))[0].state == State.END)
        return await service.predict(Call("shop"), X)

    assert run(main()).version == 1
    assert "TFRecord" in service.status(Call("shop", 2))[0].error_message


def test_a_config_file_chooses_models_and_labels(adder, models, tmp_path, start):
    for number, name in ((1, "shop"), (2, "shop"), (1, "left out")):
        put(adder / "adder" / "1", models, number, name)
    shop = ModelConfig("shop", latest=0, labels={"stable": 1})
    service = start(models, config_file=str(write_config(tmp_path / "models.config", [shop])))
    assert service.models == ["shop"]
    assert run(service.predict(Call("shop", label="stable"), X)).version == 1
    assert run(service.predict(Call("shop"), X)).version == 2


def test_a_service_that_cannot_start_says_why(tmp_path):
    with pytest.raises(ValueError, match="models must be a directory"):
        Service(ServeConfig(str(tmp_path / "none")))
    with pytest.raises(ValueError, match=r"config_file .*none cannot be read"):
        Service(ServeConfig(str(tmp_path), config_file=str(tmp_path / "none")))


def test_before_a_version_is_there_the_service_is_alive_but_not_ready(tmp_path):
    service = Service(ServeConfig(str(tmp_path), poll_seconds=POLL))
    service.start()
    try:
        assert service.alive
        assert not service.ready
        with pytest.raises(NotFound, match="there are: none"):
            run(service.predict(Call("shop"), ids("query 1")))
    finally:
        service.close()
    assert not service.alive


# --- monitoring ---------------------------------------------------------------------------------


def requests_logged(caplog):
    fields = [getattr(record, "fields", {}) for record in caplog.records]
    return {each["request_id"]: each for each in fields if each.get("request_id")}


@pytest.mark.parametrize("log_requests", [False, True])
def test_requests_are_counted_and_refusals_logged(adder, start, caplog, log_requests):
    service = start(adder, log_requests=log_requests)
    with caplog.at_level(logging.INFO, "serving"):
        run(service.predict(Call("adder", entrypoint="REST", request_id="good"), X))
        with pytest.raises(NotFound):
            run(service.predict(Call("x" * 1000, entrypoint="REST", request_id="bad"), X))
    latency = ":tensorflow:serving:request_latency_count"
    labels = '{model_name="adder",API="predict",entrypoint="REST"}'
    assert metric(service, latency + labels) == 1
    assert metric(service, ':tensorflow:serving:request_count{model_name="",status="NOT_FO') == 1
    assert metric(service, 'twotower_version_state{model="adder",version="1"}') == 30
    assert metric(service, "twotower_ready") == 1
    assert "xxxx" not in service.metrics.exposition().decode()  # a client makes up no labels
    logged = requests_logged(caplog)
    assert logged["bad"]["status"] == "NOT_FOUND"
    assert ("good" in logged) == log_requests
    if log_requests:
        assert logged["good"]["model"] == "adder"
        assert logged["good"]["seconds"] > 0
