"""The report of a run: what stands on it, that it stands alone, and that nothing gets through."""

import html.parser
import json
import re
import shutil

import pytest
from browser import assert_file_fits, assert_shared_look

import twotower
from towers.evaluation.evaluate import evaluate_run
from towers.evaluation.settings import EvaluateConfig
from towers.report.pages import write_report
from towers.training.settings import TrainConfig
from towers.training.train import train

HOSTILE = '<img src=x onerror="document.title=1">'
VOID = {"meta", "img", "br"}


class Page(html.parser.HTMLParser):
    """A page whose tags must match: the text of its parts by their headings."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.tags, self.sections = [], [], set(), {"": ""}
        self.heading = ""
        self.feed(text)
        self.sections = {head: " ".join(text.split()) for head, text in self.sections.items()}
        assert self.open == []
        assert len(self.ids) == len(set(self.ids))

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["h2"]:
            self.heading = data
            self.sections[data] = ""
        elif "style" not in self.open:
            self.sections[self.heading] += data + " "


@pytest.fixture(scope="module")
def run(prepared, tmp_path_factory):
    run = tmp_path_factory.mktemp("report") / "run"
    settings = {"normalize": True, "temperature": 0.2, "patience": 5, "jit_compile": False}
    train(
        TrainConfig(data=str(prepared), run=str(run), dim=4, epochs=2, batch_size=256, **settings)
    )
    evaluate_run(EvaluateConfig(data=str(prepared), run=str(run), ks=(5, 10)))
    return run


@pytest.fixture
def copied(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


def edited(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_evaluate_writes_the_report(run, copied, prepared, data):
    text = (run / "report.html").read_text()
    page = Page(text)
    assert_shared_look(text)
    assert not page.tags & {"script", "link", "img", "iframe"}
    without_names = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    assert "//" not in re.sub(r"<!DOCTYPE[^>]*>", "", without_names)  # no address of anything
    assert "tower id" in page.sections[""]
    assert re.search(r"twotower train --data \S+ --run \S+ .*--temperature 0.2", page.sections[""])
    metrics = json.loads((run / "metrics.json").read_text())
    for name, value in metrics["test"].items():
        half_width, popular = metrics["confidence_95"][name], metrics["popularity"][name]
        row = rf"{name}\s+{value:.4f}\s+± {half_width:.4f}\s+{popular:.4f}\s"
        assert re.search(row, page.sections["Metrics"])
    groups = json.loads((run / "breakdown.json").read_text())
    assert groups["k"] == 10
    for heading, key in (
        ("Recall by popularity", "popularity"),
        ("Recall by activity", "activity"),
    ):
        for bucket in groups[f"by_{key}"]:
            for ranking in ("model", "popularity"):
                assert f"{bucket[ranking]['mean']:.4f}" in page.sections[heading]
    users = {one["query_id"] for one in groups["examples"]}
    assert len(users) == 4
    assert all(f"user {user} " in page.sections["Examples"] for user in users)
    assert "@10" in page.sections["Training"]
    assert "loss" in page.sections["Training"]
    best = json.loads((run / "training.json").read_text())["best_epoch"]
    assert f"Epoch {best} was best on validation" in page.sections["Training"]
    assert "Not exported yet" in page.sections["Index"]
    assert f"{data.num_rows('train'):,}" in page.sections["Data"]
    assert "recorded no measures of quality" in page.sections["Data"]
    assert re.search(r"temperature\s+0.2\s", page.sections["Configuration"])
    assert not list(run.glob(".*.html*"))
    write_report(copied, prepared)
    assert (copied / "report.html").read_text() == text  # the same records, the same bytes


def test_other_than_default_settings_stand_out(run):
    text = (run / "report.html").read_text()
    marked = re.findall(r'<tr class="marked"><td>(\w+)</td>', text)
    changed = {
        "data",
        "run",
        "dim",
        "epochs",
        "batch_size",
        "normalize",
        "temperature",
        "patience",
        "jit_compile",
    }
    assert set(marked) == changed


def test_export_adds_index_and_card(copied, prepared, tmp_path, capsys):
    places = ["--data", str(prepared), "--run", str(copied), "--models", str(tmp_path / "models")]
    assert twotower.main(["export", *places, "--k", "5", "--scann", "false"]) == 0
    page = Page((copied / "report.html").read_text())
    version = tmp_path / "models" / "twotower" / "1"
    exact = json.loads((version / "ann_report.json").read_text())["exact"]
    assert f"{exact['single_ms']:.3g}" in page.sections["Index"]
    assert "No approximate index: it was switched off" in page.sections["Index"]
    assert "Scores order the candidates of one query" in page.sections["Model card"]


def ann_report():
    """Two trees; of the first, one setting is beaten in both by another."""
    sweep = [
        {
            "num_leaves": leaves,
            "leaves_to_search": searched,
            "num_reordered": 30,
            "recall": recall,
            "batch_ms": milliseconds,
        }
        for leaves, searched, recall, milliseconds in (
            (20, 2, 0.7, 1.0),
            (20, 1, 0.6, 1.5),
            (20, 4, 0.96, 3.0),
            (40, 3, 0.8, 2.0),
        )
    ]
    chosen = sweep[2] | {"kind": "tree", "recall": 0.951, "batch_ms": 3.1, "single_ms": 0.4}
    return {
        "at": 10,
        "candidates": 1234,
        "dimensions": 4,
        "target_recall": 0.95,
        "default_index": "scann",
        "exact": {"batch_ms": 9.0, "single_ms": 0.7},
        "scann": chosen | {"sweep": sweep},
    }


@pytest.mark.long
def test_the_curve_of_a_version_with_a_tree(copied, prepared, tmp_path):
    (tmp_path / "ann_report.json").write_text(json.dumps(ann_report()))
    write_report(copied, prepared, tmp_path)
    page = Page((copied / "report.html").read_text())
    for text in (
        "20 leaves",
        "40 leaves",
        "exact search",
        "0.951 on other queries",
        "1,234 candidates",
    ):
        assert text in page.sections["Index"]
    assert "a card is written with a version" in page.sections["Model card"]
    assert_file_fits(copied / "report.html")


def test_names_and_options_are_text(copied, prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "data")
    edited(tmp_path / "data" / "manifest.json", source=HOSTILE)
    record = json.loads((copied / "config.json").read_text())
    record["configuration"]["options"] = [f"name={HOSTILE}"]
    record["configuration"]["method"] = HOSTILE
    edited(copied / "config.json", **record)
    (tmp_path / "model_card.md").write_text(f"# {HOSTILE}\n\n| a | {HOSTILE} |\n\n```\n{HOSTILE}\n")
    write_report(copied, tmp_path / "data", tmp_path)
    page = Page((copied / "report.html").read_text())
    assert "img" not in page.tags
    assert page.sections["Data"].count(HOSTILE) == 1
    assert page.sections["Model card"].count(HOSTILE) == 3
    assert HOSTILE in page.sections[""]
    assert HOSTILE.replace('"', '\\"') in page.sections["Configuration"]


def test_examples_are_named_by_title_and_hits_stand_out(copied, prepared):
    chosen = [{"id": f"i{n}", "title": f"tea {n}"} for n in range(2)]
    example = {
        "query_id": HOSTILE,
        "chosen": chosen,
        "num_chosen": 1234,
        "held_out": [{"id": "i9", "title": HOSTILE}],
        "num_held_out": 1,
        "recommended": [
            {"id": "i9", "title": HOSTILE, "hit": True},
            *({"id": f"i{n}", "title": None, "hit": False} for n in range(3, 6)),
        ],
    }
    edited(copied / "breakdown.json", examples=[example])
    write_report(copied, prepared)
    text = (copied / "report.html").read_text()
    page = Page(text)
    assert "img" not in page.tags
    part = page.sections["Examples"]
    assert part.count(HOSTILE) == 3
    assert "the last 2 of 1,234" in part
    assert "tea 0 i0" in part
    assert f"1 {HOSTILE} i9 ✓ tea 0" in part
    assert text.count('<tr class="hit">') == 1


def test_records_that_are_behind_are_told(copied, prepared):
    edited(copied / "training.json", steps=999_999)
    (copied / "breakdown.json").unlink()
    write_report(copied, prepared)
    page = Page((copied / "report.html").read_text())
    assert "trained on since, to step 999,999: evaluate it again" in page.sections[""]
    assert "evaluate the run again" in page.sections["Recall by group"]


def test_quality_of_the_data(copied, attributed):
    quality = json.loads((attributed / "manifest.json").read_text())["details"]["quality"]
    write_report(copied, attributed)
    text = (copied / "report.html").read_text()
    assert f"{quality['density']:.3%} of all pairs" in text
    users, items = quality["query"], quality["candidate"]
    cells = f"<td>{users['gini']:.3f}</td><td>{items['gini']:.3f}</td>"
    assert f"<td>Gini coefficient of the rows</td>{cells}" in text
    assert f"<td>kept</td><td>{quality['rows']['rows']:,}</td>" in text
    assert f"{quality['days']['with_rows']:,} days with rows" in Page(text).sections["Data"]
