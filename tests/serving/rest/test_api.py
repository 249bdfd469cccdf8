"""The REST API over a real socket, asked as its clients ask it."""

import gzip
import http.client
import json
import random
import socket
import threading
import zlib

import numpy as np
import pytest

from serving.rest import guard as rest_guard

MODEL = "/v1/models/twotower"


def test_status(server):
    status = {"error_code": "OK", "error_message": ""}
    expected = {"model_version_status": [{"version": "1", "state": "AVAILABLE", "status": status}]}
    assert server.get(MODEL).json == expected
    assert server.get(f"{MODEL}/versions/1").json == expected
    assert server.get("/v1/models").json == {"models": ["twotower"]}


def test_metadata(server):
    for path in (f"{MODEL}/metadata", f"{MODEL}/versions/1/metadata"):
        described = server.get(path).json
        assert described["model_spec"] == {
            "name": "twotower",
            "signature_name": "",
            "version": "1",
        }
        signatures = described["metadata"]["signature_def"]["signature_def"]
        assert set(signatures) == {"serving_default", "query_embedding", "embedding_search"}
        [query] = signatures["serving_default"]["inputs"].values()
        assert query["dtype"] == "DT_STRING"
        assert query["tensor_shape"]["dim"] == [{"size": "-1", "name": ""}]


def test_predict_by_row_and_by_column(server, small):
    ids = ["query 0", "query 7"]
    by_row = server.post(f"{MODEL}:predict", {"instances": ids}).json["predictions"]
    for number, row in zip((0, 7), by_row, strict=True):
        assert row["candidate_id"] == small.sample.best_ids(number)[:40]
        best = small.sample.vectors @ small.sample.queries[number]
        np.testing.assert_allclose(row["score"], np.sort(best)[::-1][:40], rtol=1e-5)
    found = [row["candidate_id"] for row in by_row]
    named = {"instances": [{"query_id": query} for query in ids]}
    again = server.post(f"{MODEL}/versions/1:predict", named).json["predictions"]
    assert [row["candidate_id"] for row in again] == found
    by_column = server.post(f"{MODEL}:predict", {"inputs": {"query_id": ids}}).json["outputs"]
    assert by_column["candidate_id"] == found
    assert np.shape(by_column["score"]) == (2, 40)
    in_base64 = {"instances": [{"b64": "cXVlcnkgMA=="}]}
    [row] = server.post(f"{MODEL}:predict", in_base64).json["predictions"]
    assert row["candidate_id"] == found[0]


def test_other_signatures(server, small):
    body = {"signature_name": "query_embedding", "instances": ["query 3", "nobody"]}
    embedded = server.post(f"{MODEL}:predict", body).json["predictions"]
    assert [row["known"] for row in embedded] == [True, False]
    np.testing.assert_array_equal(
        np.float32(embedded[0]["embedding"]), small.sample.queries[3], strict=True
    )
    body = {"signature_name": "embedding_search", "instances": [embedded[0]["embedding"]]}
    [found] = server.post(f"{MODEL}:predict", body).json["predictions"]
    assert found["candidate_row"] == small.sample.best(3)[:40]


def test_more_rows_than_a_batch(server, small):
    body = {"instances": [f"query {number % 20}" for number in range(150)]}
    rows = server.post(f"{MODEL}:predict", body).json["predictions"]
    assert [row["candidate_id"][:3] for row in rows] == [
        small.sample.best_ids(number % 20)[:3] for number in range(150)
    ]


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        (":predict", b"{", 400, "JSON Parse error"),
        (":predict", b"", 400, "JSON Parse error"),
        (":predict", b"query_id=1", 400, "JSON Parse error"),
        (":predict", {"instances": [1]}, 400, "must be a string"),
        (":predict", {"instances": [["query 0"]]}, 400, "string [any]"),
        (":predict", {"inputs": "query 0"}, 400, "string [any]"),
        (":predict", {"instances": [{"user": "query 0"}]}, 400, "query_id"),
        (":predict", {"instances": ["a"], "signature_name": "no"}, 400, "'no'"),
        ("/versions/9:predict", {"instances": ["a"]}, 404, "Version 9"),
        ("/labels/canary:predict", {"instances": ["a"]}, 400, "canary"),
        ("/versions/9:retrieve", {"query_ids": ["a"]}, 404, "Version 9"),
        (":retrieve", b"[", 400, "Invalid JSON"),
        (":retrieve", {}, 400, "one of query_ids, queries and features"),
        (":retrieve", {"query_ids": "a"}, 400, "query_ids: Input should be a valid list"),
        (":retrieve", {"query_ids": ["a", 1]}, 400, "query_ids.1"),
        (
            ":retrieve",
            {"query_ids": ["a"], "features": {"embedding": [[1]]}},
            400,
            "one of query_ids, queries and features",
        ),
        (":retrieve", {"features": {"embedding": [[1.0]]}}, 400, "takes query_ids"),
        (":retrieve", {"query_ids": ["a"], "k": 0}, 400, "k: Input should be greater"),
        (":retrieve", {"query_ids": ["a"], "k": -1}, 400, "k: Input should be greater"),
        (":retrieve", {"query_ids": ["a"], "k": "5"}, 400, "k: Input should be a valid integer"),
        (":retrieve", {"query_ids": ["a"], "k": 501}, 400, "k must be at most 500"),
        (":retrieve", {"query_ids": ["a"], "k": 10**30}, 400, "k"),
        (":retrieve", {"query_ids": ["a"], "index": "hnsw"}, 400, "index"),
        (":retrieve", {"query_ids": ["a"], "where": ["b"]}, 400, "where: Input should be a valid"),
        (":retrieve", {"query_ids": ["a"], "where": {"color": ["b"]}}, 400, "did you mean colour"),
        (":retrieve", {"query_ids": ["a"], "where": {"weight": 3}}, 400, "weight must be numbers"),
        (
            ":retrieve",
            {"query_ids": ["a"], "where": {"colour": ["b"] * 10**5}},
            400,
            "at most 10000 values",
        ),
        (
            ":retrieve",
            {"query_ids": ["a"], "where": dict.fromkeys(map(str, range(10**4)), "x")},
            400,
            "at most 20 fields",
        ),
        (
            ":retrieve",
            {"query_ids": ["a"], "kk": 5},
            400,
            "kk: there is no such field, a body has query_ids,",
        ),
        (":retrieve", b'{"query_ids": ["a"], "min_score": NaN}', 400, "min_score"),
        (":retrieve", b'{"query_ids": ["\\ud800"]}', 400, "Invalid JSON"),
        (":retrieve", {"query_ids": ["a"], "unknown_queries": "error"}, 404, "'a'"),
    ],
)
def test_what_is_refused(server, path, body, status, message):
    answer = server.post(MODEL + path, body)
    assert (answer.status, message in answer.error) == (status, True), answer
    assert len(answer.error) < 500
    assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/models/other", 404),
        ("POST", "/v1/models/other:predict", 404),
        ("POST", "/v1/models/other:retrieve", 404),
        ("GET", "/v1/models/other/metadata", 404),
        ("GET", f"{MODEL}/versions/9", 404),
        ("GET", f"{MODEL}/versions/{'9' * 5000}", 400),
        ("GET", f"{MODEL}/versions/{2**63 - 1}", 404),
        ("GET", f"{MODEL}/versions/{2**63}", 400),
        ("POST", f"{MODEL}/versions/{2**63}:predict", 400),
        ("GET", f"{MODEL}/versions/one", 400),
        ("GET", f"{MODEL}/labels/none", 400),
        ("GET", "/v1/models/..%2f..%2fetc", 400),
        ("GET", "/v1/models/%2e%2e", 404),
        ("GET", "/v1/models/a%00b", 404),
        ("GET", "/nothing", 404),
        ("POST", f"{MODEL}:classify", 400),
        ("GET", f"{MODEL}:predict", 400),
        ("POST", MODEL, 400),
        ("DELETE", f"{MODEL}/versions/1", 400),
        ("PUT", "/healthz", 405),
    ],
)
def test_what_is_not_there(server, method, path, status):
    body = {"query_ids": ["a"]} if path.endswith("retrieve") else {"instances": ["a"]}
    answer = server.ask(method, path, body if method == "POST" else None)
    assert answer.status == status
    assert answer.error


def test_retrieve(server, small):
    body = {"query_ids": ["query 1", "query 4"], "k": 5}
    answer = server.post(f"{MODEL}:retrieve", body).json
    assert (answer["model"], answer["version"], answer["unknown_ids"]) == ("twotower", 1, 0)
    assert answer["index"] in ("exact", "scann")
    for number, result in zip((1, 4), answer["results"], strict=True):
        assert (result["query_id"], result["known"], result["fallback"]) == (
            f"query {number}",
            True,
            "",
        )
        assert [one["id"] for one in result["candidates"]] == small.sample.best_ids(number)[:5]
        best = small.sample.vectors @ small.sample.queries[number]
        scores = [one["score"] for one in result["candidates"]]
        np.testing.assert_allclose(scores, np.sort(best)[::-1][:5], rtol=1e-5)


def candidates(server, **body):
    [result] = server.post(f"{MODEL}:retrieve", {"query_ids": ["query 1"], **body}).json["results"]
    return [one["id"] for one in result["candidates"]]


def test_filters(server, small):
    best, seen = small.sample.best_ids(1), small.sample.seen[1]
    assert candidates(server, k=4, exclude=best[:2]) == best[2:6]
    red = [name for row, name in enumerate(small.sample.candidate_ids) if row % 3 == 0]
    where = {"colour": ["red", "a\n\0"], "weight": {"min": -1e300}}
    weighed = [name for name in best if name in red and small.sample.candidate_ids.index(name) % 7]
    assert (
        candidates(server, k=5, where=where, exclude=best[:2])
        == [name for name in weighed if name not in best[:2]][:5]
    )
    assert candidates(server, k=5, where={}) == best[:5]
    assert candidates(server, k=3, exclude_seen=True) == small.sample.best_ids(1, seen)[:3]
    assert candidates(server, k=9, allow=[best[250], best[7], "nothing"]) == [best[7], best[250]]
    scores = np.sort(small.sample.vectors @ small.sample.queries[1])[::-1]
    between = float(scores[2] + scores[3]) / 2
    assert candidates(server, k=9, min_score=between) == best[:3]
    assert candidates(server, k=3, index="exact") == best[:3]


def test_k_beyond_the_corpus_gives_all_of_it(server, small):
    assert candidates(server, k=500) == small.sample.best_ids(1)


def test_unknown_queries_are_marked(server):
    body = {"query_ids": ["nobody", "query 0"], "unknown_queries": "empty", "k": 2}
    unknown, known = server.post(f"{MODEL}:retrieve", body).json["results"]
    assert (unknown["known"], unknown["fallback"], unknown["candidates"]) == (False, "", [])
    assert (known["known"], len(known["candidates"])) == (True, 2)


def test_request_ids(server):
    answer = server.get("/healthz", **{"X-Request-Id": "abc-1/2"})
    assert answer.headers["x-request-id"] == "abc-1/2"
    made = [
        server.get("/healthz", **{"X-Request-Id": bad}).headers["x-request-id"]
        for bad in ("has space", 'quote"', "x" * 200)
    ]
    assert len(set(made)) == 3
    assert all(len(one) == 32 for one in made)
    refused = server.post(f"{MODEL}:predict", b"{", **{"X-Request-Id": "bad-body"})
    assert (refused.status, refused.headers["x-request-id"]) == (400, "bad-body")


def test_health_and_metrics(server):
    for path in ("/healthz", "/readyz"):
        answer = server.get(path)
        assert (answer.status, answer.body) == (200, b"ok\n")
    server.post(f"{MODEL}:predict", {"instances": ["query 0"]})
    server.post(f"{MODEL}:predict", {"instances": [0]})
    text = server.get("/monitoring/prometheus/metrics").body.decode()
    counts = [line for line in text.splitlines() if line.startswith("twotower_requests_total{")]
    for status in ("OK", "INVALID_ARGUMENT"):
        labels = ('model="twotower"', 'api="predict"', f'status="{status}"')
        [line] = [line for line in counts if all(label in line for label in labels)]
        assert float(line.split()[-1]) >= 1
    assert 'model="other"' not in text  # a client cannot make up labels


def send(server, head, *pieces):
    """A request written by hand; the answer as far as it comes."""
    with socket.create_connection((server.host, server.rest_port), timeout=30) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n")
        for piece in pieces:
            try:
                connection.sendall(piece)
            except ConnectionError:
                break  # the server need not read on
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        return answer.status, json.loads(answer.read())


def test_a_body_above_the_limit(server):
    large = b"x" * ((1 << 20) + 1)
    answer = server.post(f"{MODEL}:predict", large)
    assert (answer.status, "1 MB" in answer.error) == (413, True)
    head = f"POST {MODEL}:predict HTTP/1.1\r\nHost: a\r\n"
    status, content = send(server, f"{head}Content-Length: 99999999999")  # nothing was sent
    assert (status, list(content)) == (413, ["error"])
    chunk = b"%x\r\n%s\r\n" % (1 << 18, b"x" * (1 << 18))
    status, content = send(server, f"{head}Transfer-Encoding: chunked", *[chunk] * 6, b"0\r\n\r\n")
    assert (status, list(content)) == (413, ["error"])
    padded = json.dumps({"instances": ["query 0"]}).encode().ljust(1 << 20)
    assert server.post(f"{MODEL}:predict", padded).status == 200


def test_large_bodies_may_not_hold_all_memory(server, monkeypatch):
    large, small = b" " * 60_000, {"instances": ["query 0"]}
    monkeypatch.setattr(rest_guard, "_SMALL_BODY", 50_000)
    assert server.post(f"{MODEL}:predict", large).status == 400
    monkeypatch.setattr(rest_guard, "_HELD", 0)
    answer = server.post(f"{MODEL}:predict", large)
    assert (answer.status, "large bodies" in answer.error) == (429, True)
    assert server.post(f"{MODEL}:predict", small).status == 200
    monkeypatch.setattr(rest_guard, "_HELD", 2)
    assert server.post(f"{MODEL}:predict", large).status == 400  # nothing is held any more


@pytest.mark.parametrize(
    ("verb", "body"),
    [("predict", {"instances": ["x" * 70_000]}), ("retrieve", {"query_ids": ["x" * 70_000]})],
)
def test_an_id_has_a_length(server, verb, body):
    answer = server.post(f"{MODEL}:{verb}", body)
    assert (answer.status, "at most 65536" in answer.error) == (400, True)


def test_a_gzip_body_is_taken_as_far_as_a_plain_one(server):
    body = json.dumps({"instances": ["query 0"]}).encode()
    plain = server.post(f"{MODEL}:predict", body)

    def compressed(content, encoding="gzip"):
        return server.post(f"{MODEL}:predict", content, **{"Content-Encoding": encoding})

    assert compressed(gzip.compress(body)).json == plain.json
    assert compressed(gzip.compress(body.ljust(1 << 20))).json == plain.json
    assert compressed(gzip.compress(body), "GZIP").json == plain.json
    for content, encoding, status, told in (
        (gzip.compress(bytes(1 << 24)), "gzip", 413, "at most 1 MB"),
        (gzip.compress(body)[:-9], "gzip", 400, "its end is missing"),
        (gzip.compress(body) + gzip.compress(b" "), "gzip", 400, "more than one gzip stream"),
        (gzip.compress(body) + bytes(1 << 19), "gzip", 400, "more than one gzip stream"),
        (body, "gzip", 400, "is not gzip"),
        (zlib.compress(body), "deflate", 415, "Content-Encoding"),
    ):
        answer = compressed(content, encoding)
        assert (answer.status, told in answer.error) == (status, True)


def test_what_follows_a_gzip_body_is_not_held(server):
    """In chunks, which say no length: it would be kept until the deadline."""
    head = f"POST {MODEL}:predict HTTP/1.1\r\nHost: a\r\nContent-Encoding: gzip"
    chunk = b"80000\r\n%s\r\n" % bytes(1 << 19)
    member = gzip.compress(b"{}")
    body = b"%x\r\n%s\r\n" % (len(member), member) + 4 * chunk  # twice the limit
    status, content = send(server, f"{head}\r\nTransfer-Encoding: chunked", body)
    assert (status, "more than one gzip stream" in content["error"]) == (400, True)


def test_a_body_that_does_not_come(server):
    head = f"POST {MODEL}:predict HTTP/1.1\r\nHost: a\r\nX-Timeout-Ms: 50\r\nContent-Length: 9"
    status, content = send(server, head, b"{")
    assert (status, "did not arrive" in content["error"]) == (408, True)
    for wrong in ("0", "-5", "soon", "1" * 30, "1" * 5000, "0" * 5000, "0" * 20 + "1" * 30):
        answer = server.post(f"{MODEL}:predict", b"{}", **{"X-Timeout-Ms": wrong})
        assert (answer.status, "X-Timeout-Ms" in answer.error) == (400, True)
    padded = {"X-Timeout-Ms": "0" * 5000 + "9000"}
    assert server.post(f"{MODEL}:predict", {"instances": ["query 0"]}, **padded).status == 200


def test_a_client_that_leaves_while_it_sends(server):
    with socket.create_connection((server.host, server.rest_port)) as connection:
        head = f"POST {MODEL}:predict HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n"
        connection.sendall(head.encode() + b"{")
    assert server.post(f"{MODEL}:predict", {"instances": ["query 0"]}).status == 200


def test_a_request_that_is_no_http(server):
    with socket.create_connection((server.host, server.rest_port), timeout=30) as connection:
        connection.sendall(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
        assert b" 400 " in connection.recv(1000).splitlines()[0]
    assert server.get("/healthz").status == 200


def random_value(rng, depth=0):
    """Anything that JSON can say, and some of what it cannot."""
    if depth < 4 and rng.random() < 0.5:
        if rng.random() < 0.5:
            return [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
        keys = ["query_id", "b64", "embedding", "", "signature_name", "k"]
        return {rng.choice(keys): random_value(rng, depth + 1) for _ in range(rng.randrange(3))}
    numbers = [0, -1, 1.5, 2**31, -(2**63) - 1, 10**25, 1e308, float("nan"), float("inf")]
    texts = ["", "query 0", "nobody", "a\0b", "ñ\u2028", "x" * 1000, "../..", "serving_default"]
    return rng.choice([*numbers, *texts, None, True, False])


def test_random_bodies_never_fail_the_service(server):
    rng = random.Random(7)
    fields = {
        "predict": ["instances", "inputs", "signature_name"],
        "retrieve": [
            *("query_ids", "features", "k", "exclude_seen", "exclude", "allow"),
            *("min_score", "index", "unknown_queries"),
        ],
    }
    statuses = set()
    for _ in range(400):
        verb = rng.choice(["predict", "retrieve"])
        body = {name: random_value(rng) for name in fields[verb] if rng.random() < 0.4}
        if rng.random() < 0.5:
            body["query_ids" if verb == "retrieve" else "inputs"] = ["query 0"]
        text = json.dumps(body).encode()
        if rng.random() < 0.1:
            text = text[: rng.randrange(len(text))] + rng.randbytes(2)
        answer = server.post(f"{MODEL}:{verb}", text)
        assert answer.status in (200, 400, 404), (body, answer)
        statuses.add(answer.status)
    assert {200, 400} <= statuses


def test_openapi_describes_every_route(server):
    description = server.get("/openapi.json").json
    assert set(description["paths"]["/v1/models/{model}:retrieve"]) == {"post"}
    operations = [
        (path, operation)
        for path, methods in description["paths"].items()
        for operation in methods.values()
    ]
    assert len({operation["operationId"] for _, operation in operations}) == len(operations)
    for path, operation in operations:
        in_path = {one["name"] for one in operation.get("parameters", []) if one["in"] == "path"}
        assert in_path == {name for name in ("model", "version", "label") if f"{{{name}}}" in path}
    retrieve = description["paths"]["/v1/models/{model}/labels/{label}:retrieve"]["post"]
    body = retrieve["requestBody"]["content"]["application/json"]["schema"]
    assert body["properties"]["k"]["minimum"] == 1
    assert {"200", "400", "404", "413", "429", "503", "504"} <= set(retrieve["responses"])
    for reference in references(description):
        place = description
        for part in reference.removeprefix("#/").split("/"):
            place = place[part]


def references(value):
    if isinstance(value, dict):
        yield from (one for key, one in value.items() if key == "$ref")
    for inner in value.values() if isinstance(value, dict) else value:
        if isinstance(inner, dict | list):
            yield from references(inner)


def bearer(token):
    return {"Authorization": f"Bearer {token}"}


def test_token(guarded):
    for path in ("/", "/docs", "/healthz", "/readyz"):
        assert guarded.get(path).status == 200
    right = bearer("s3cret")
    for path in (MODEL, "/v1/models", "/openapi.json", "/monitoring/prometheus/metrics"):
        assert guarded.get(path).status == 401
        assert guarded.get(path, **right).status == 200
    body = {"instances": ["query 0"]}
    for wrong in ("Bearer s3cre", "Bearer ", "s3cret", "Basic s3cret"):
        answer = guarded.post(f"{MODEL}:predict", body, Authorization=wrong)
        assert (answer.status, "Bearer TOKEN" in answer.error) == (401, True)
        assert answer.headers["www-authenticate"] == "Bearer"
    assert guarded.post(f"{MODEL}:predict", body, **right).status == 200


def test_an_admin_token_opens_what_tells_of_users(guarded):
    headers = ({}, bearer("s3cret"), bearer("adm1n"))
    for path, expected in (
        (f"{MODEL}:history?query_id=query%201", [401, 401, 200]),
        (f"{MODEL}:sample_queries", [401, 401, 200]),
        (MODEL, [401, 200, 200]),
    ):
        assert [guarded.get(path, **header).status for header in headers] == expected


def test_head_is_get_without_a_body(server):
    for path in ("/healthz", MODEL, f"{MODEL}/versions/9"):
        get, head = server.get(path), server.ask("HEAD", path)
        assert (head.status, head.body) == (get.status, b"")
        assert head.headers["content-length"] == str(len(get.body))


def test_many_connections_at_once(server, small):
    answers = {}

    def work(number):
        body = {"instances": [f"query {number}"]}
        answers[number] = server.post(f"{MODEL}:predict", body)

    threads = [threading.Thread(target=work, args=[number]) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, answer in answers.items():
        [row] = answer.json["predictions"]
        assert row["candidate_id"] == small.sample.best_ids(number)[:40]
