"""JSON read in pieces, held against pydantic-core, which reads it at once."""

import json
import random

import pytest
from pydantic_core import from_json

from serving.rest import pieces as json_pieces


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(json_pieces, "_PIECE", 12)
    monkeypatch.setattr(json_pieces, "_BLOCK", 7)


def random_value(rng, depth=0):
    """JSON with all that could mislead: brackets, commas, quotes and backslashes in strings."""
    kind = rng.random()
    if depth < 5 and kind < 0.35:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(5))]
    if depth < 5 and kind < 0.6:
        return {random_text(rng): random_value(rng, depth + 1) for _ in range(rng.randrange(5))}
    return rng.choice([None, True, 1.5, -3, 10**20, random_text(rng)])


def random_text(rng):
    return "".join(
        rng.choices(['"', "\\", ",", ":", "[", "]", "{", "}", "a", "ñ", " "], k=rng.randrange(9))
    )


def test_pieces_give_what_the_whole_gives():
    rng = random.Random(1)
    for _ in range(1500):
        text = json.dumps(
            random_value(rng), ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 1])
        )
        assert json_pieces.parse(text.encode()) == json.loads(text)


def test_what_is_not_json_is_refused_in_pieces_too():
    rng = random.Random(2)
    refused = 0
    for _ in range(3000):
        text = json.dumps([random_value(rng, 1), random_value(rng, 1)]).encode()
        place = rng.randrange(len(text))
        text = (
            text[:place]
            + rng.choice([b"", b",", b"]", b"}", b"[", b'"', b"x", b":"])
            + text[place + 1 :]
        )
        try:
            expected = from_json(text)
        except ValueError:
            refused += 1
            with pytest.raises(ValueError, match=r"\w"):
                json_pieces.parse(text)
        else:
            assert json_pieces.parse(text) == expected
    assert refused > 1000


@pytest.mark.parametrize(
    "text", [b"[1,2,,3,4,5,6,7]", b"[1,2,3,4,5,6,7,]", b"[[1,2,3,4,5,6}]", b"  " * 20]
)
def test_commas_and_brackets_must_fit(text):
    with pytest.raises(ValueError, match=r"\w"):
        json_pieces.parse(text)


def test_values_and_levels_are_limited(monkeypatch):
    deep = b"[" * 60 + b"1" * 20 + b"]" * 60
    with pytest.raises(ValueError, match="more than 50 levels"):
        json_pieces.parse(deep)
    monkeypatch.setattr(json_pieces, "MAX_VALUES", 20)
    assert len(json_pieces.parse(b"[" + b"1," * 19 + b"1]")) == 20
    with pytest.raises(ValueError, match="more than 20 values"):
        json_pieces.parse(b"[" + b"1," * 20 + b"1]")
