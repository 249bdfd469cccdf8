"""What the pages for people ask, and what they are allowed to do."""

import pytest
from browser import assert_shared_look

MODEL = "/v1/models/twotower"


def test_samples_and_history(server, small):
    sample = small.sample
    described = server.get(f"{MODEL}:sample_queries?limit=3").json
    assert len(described["query_ids"]) == 3
    assert set(described["query_ids"]) <= set(sample.query_ids)
    assert (described["k"], described["num_candidates"], described["version"]) == (40, 300, 1)
    assert described["input"] == "query_id"
    assert described["attributes"] == {"colour": "text", "sizes?": "list", "weight": "number"}
    answer = server.get(f"{MODEL}/versions/1:history?query_id=query%201&limit=4").json
    assert answer["candidate_ids"] == [sample.candidate_ids[row] for row in sample.seen[1][:4]]
    assert (answer["total"], answer["version"]) == (90, 1)
    assert server.get(f"{MODEL}:history?query_id=nobody").json["candidate_ids"] == []


@pytest.mark.parametrize(
    ("path", "status"),
    [
        (f"{MODEL}:history", 400),
        (f"{MODEL}:history?query_id=a&limit=0", 400),
        (f"{MODEL}:sample_queries?limit=x", 400),
        (f"{MODEL}:sample_queries?limit={'1' * 5000}", 400),
        (f"{MODEL}:sample_queries?limit={'0' * 5000}", 400),
        (f"{MODEL}:sample_queries?limit=0000000019999999", 400),
        (f"{MODEL}:sample_queries?limit={'0' * 30}5", 200),
        (f"{MODEL}:sample_queries?limit=²", 400),
        ("/v1/models/other:sample_queries", 404),
        (f"{MODEL}/versions/9:history?query_id=a", 404),
    ],
)
def test_what_is_refused(server, path, status):
    answer = server.get(path.replace("²", "%C2%B2"))
    assert (answer.status, "error" in answer.json) == (status, status != 200)


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_a_page_may_run_its_own_script_alone(server, path):
    answer = server.get(path)
    assert answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    page = answer.body.decode()
    assert_shared_look(page)
    for foreign in ("http://", "https://", "//cdn", "innerHTML", "@import", " src="):
        assert foreign not in page
