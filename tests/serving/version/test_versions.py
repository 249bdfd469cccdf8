import json
import shutil

import pytest

from pipeline.contract import schema
from serving.publish.publish import publish
from serving.retrieval.retriever import Retriever
from serving.version.versions import find_version, numbered_directories


@pytest.fixture
def models(without_scann, tmp_path):
    """Versions 1 and 2, which a test may damage."""
    for number in ("1", "2"):
        shutil.copytree(without_scann.version, tmp_path / "models" / "twotower" / number)
    return tmp_path / "models"


def test_the_newest_version_answers_unless_one_is_pinned(models):
    assert find_version(models, "twotower").number == 2
    assert find_version(models, "twotower", 1).number == 1
    assert Retriever.load(models, version=1).version.path == models / "twotower" / "1"


def test_numbers_of_versions_are_int64(models, bundle):
    home = models / "twotower"
    newest = 2**63 - 1
    (home / "2").rename(home / str(newest))
    for name in (str(2**63), "9" * 250, "0" * 5 + "1"):
        shutil.copytree(home / "1", home / name)
    assert sorted(numbered_directories(home)) == [1, newest]
    assert find_version(models, "twotower").number == newest
    with pytest.raises(ValueError, match="the last one: name a free number"):
        publish(bundle, models, k=5, scann=False)
    with pytest.raises(ValueError, match="version must be at most"):
        publish(bundle, models, k=5, scann=False, version=2**63)


def test_what_is_unfinished_is_not_a_version(models):
    home = models / "twotower"
    (home / ".partial-3").mkdir()
    (home / "3").mkdir()  # a copy that has not arrived: no manifest
    (home / "notes").mkdir()
    assert find_version(models, "twotower").number == 2


def test_a_missing_version_names_those_that_exist(models):
    with pytest.raises(ValueError, match=r"version 7 of .* does not exist; there are: 1, 2\."):
        find_version(models, "twotower", 7)


def test_a_directory_without_versions_is_said_so(models):
    for name in ("nothing", "twotower/1"):
        with pytest.raises(ValueError, match=r"holds no model version; (it has|make one) "):
            find_version(models, name)


def test_a_newer_format_is_refused(models):
    path = models / "twotower" / "2" / schema.MANIFEST
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "format_version": "2.0"}))
    with pytest.raises(ValueError, match=r"format version 2.0, this program reads up to 1"):
        Retriever.load(models)


def test_a_file_cut_short_is_refused(models):
    path = models / "twotower" / "2" / "variables" / "variables.data-00000-of-00002"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"must have .* bytes by its manifest, got"):
        find_version(models, "twotower")
