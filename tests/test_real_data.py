"""The published protocol on Gowalla: what the README claims, end to end through the commands."""

import json
import os
from pathlib import Path

import pytest

import twotower

GOWALLA = (
    Path(os.environ.get("TWOTOWER_DATA", Path(__file__).parents[2] / "shared" / "data"))
    / "gowalla"
    / "interactions.parquet"
)
pytestmark = [
    pytest.mark.real_data,
    pytest.mark.skipif(
        not GOWALLA.exists(), reason=f"{GOWALLA} is not there; set TWOTOWER_DATA to its parent"
    ),
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    out = tmp_path_factory.mktemp("gowalla") / "prepared"
    assert twotower.main(["prepare", "--source", str(GOWALLA), "--output", str(out)]) == 0
    return out


@pytest.mark.long
def test_the_split_has_the_published_sizes(prepared):
    counts = json.loads((prepared / "manifest.json").read_text())["counts"]
    assert (counts["train"], counts["test"]) == (822_358, 205_106)
    assert (counts["queries"], counts["candidates"]) == (29_858, 40_988)


@pytest.mark.parametrize(
    ("flags", "floors"),
    [
        pytest.param(
            "--dim 32 --epochs 20 --l2 1e-5",
            {"recall@10": 0.115, "recall@50": 0.250},
            marks=pytest.mark.long,
        ),
        pytest.param(
            "--dim 32 --epochs 5 --normalize --temperature 0.1 --l2 0",
            {"recall@10": 0.113, "recall@50": 0.278},
            marks=pytest.mark.long,
        ),
        pytest.param(
            "--dim 64 --epochs 20 --normalize --temperature 0.1 --l2 0",
            {"recall@20": 0.205},
            marks=pytest.mark.soak,
        ),
    ],
)
def test_recall_reaches_the_published_figures(prepared, tmp_path, flags, floors):
    run = ["--data", str(prepared), "--run", str(tmp_path / "run")]
    settings = "--method ssl_pop --batch_size 2048 --learning_rate 0.01 --seed 10"
    assert twotower.main(["train", *run, *settings.split(), *flags.split()]) == 0
    assert twotower.main(["evaluate", *run]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert {
        name: metrics["test"][name]
        for name, floor in floors.items()
        if metrics["test"][name] < floor
    } == {}
    assert metrics["users"] == 29_858
    # The popularity baseline validates the evaluation: it is the same for every model.
    assert metrics["popularity"]["recall@50"] == pytest.approx(0.0499, abs=5e-4)
