import json
import shutil
import time

import pytest

from pipeline.contract import schema
from serving.version.versions import look_at


@pytest.fixture
def ours(without_scann, tmp_path):
    """A published version that a test may damage."""
    return shutil.copytree(without_scann.version, tmp_path / "1")


@pytest.fixture
def foreign(tmp_path):
    """What lies there of another framework; nobody loads it."""
    (tmp_path / "2" / "variables").mkdir(parents=True)
    (tmp_path / "2" / "saved_model.pb").write_bytes(b"a graph")
    return tmp_path / "2"


def test_a_published_version_is_complete_at_the_first_look(ours):
    files = look_at(1, ours)
    assert not files.problem
    assert files.manifest.kind == "version"


def test_another_framework_has_no_manifest_and_two_looks(foreign):
    first = look_at(2, foreign)
    assert first.on_its_way
    assert "has just been written" in first.problem
    second = look_at(2, foreign, first.stamp)
    assert not second.problem
    assert second.manifest is None
    (foreign / "variables" / "more").write_bytes(b"still copying")
    third = look_at(2, foreign, second.stamp)
    assert third.on_its_way
    assert third.stamp != second.stamp


def test_files_that_are_old_enough_need_one_look(foreign, monkeypatch):
    assert look_at(2, foreign).on_its_way
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 60)
    assert not look_at(2, foreign).problem


def test_a_copy_under_way_has_no_saved_model_yet(tmp_path):
    (tmp_path / "3").mkdir()
    files = look_at(3, tmp_path / "3")
    assert files.on_its_way
    assert "a copy under way" in files.problem


@pytest.mark.parametrize("missing", [(), ("ann_report.json", "assets.extra", "model_card.md")])
def test_ours_without_its_manifest_is_not_taken_for_anothers(ours, missing):
    (ours / schema.MANIFEST).unlink()
    for name in missing:
        path = ours / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    first = look_at(1, ours)
    assert look_at(1, ours, first.stamp).on_its_way
    assert "has no manifest.json, which arrives last" in first.problem


def test_a_file_cut_short_is_a_problem_until_it_is_whole(ours):
    path = ours / "variables" / "variables.data-00000-of-00002"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    files = look_at(1, ours)
    assert "by its manifest, got" in files.problem
    assert not files.on_its_way
    path.write_bytes(whole)
    assert not look_at(1, ours).problem


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "is not a manifest"),
        (json.dumps({"format_version": "2.0", "kind": "version"}), "has format version 2.0"),
        (json.dumps({"format_version": "1.0", "kind": "bundle"}), "describes a 'bundle'"),
    ],
)
def test_a_manifest_that_cannot_be_read_is_a_problem(foreign, content, problem):
    (foreign / schema.MANIFEST).write_text(content)
    assert problem in look_at(2, foreign).problem


def test_a_manifest_with_missing_fields_is_a_problem(foreign):
    (foreign / schema.MANIFEST).write_text('{"format_version": "1.0", "kind": "version"}')
    assert look_at(2, foreign).problem
