"""The contract: golden values, and what a reader refuses."""

import json
import subprocess

import numpy as np
import pytest

from pipeline.contract import hashing, schema
from pipeline.contract.bundle import write_bundle


def test_fingerprints_do_not_change():
    golden = {"": -5426141060434712860, "42": 8820412187630416983, "käse": 7584503891383709300}
    for raw, value in golden.items():
        assert hashing.fingerprint(raw) == value
    encoded = [raw.encode() for raw in golden]
    assert hashing.fingerprints(encoded).tolist() == list(golden.values())


def test_a_newer_format_is_refused_and_an_unknown_field_is_not(tmp_path):
    manifest = schema.Manifest("prepared", "s", {}, {}, {})
    manifest.write(tmp_path)
    fields = json.loads((tmp_path / schema.MANIFEST).read_text())
    (tmp_path / schema.MANIFEST).write_text(
        json.dumps(fields | {"format_version": "1.7", "news": 1})
    )
    assert schema.read_manifest(tmp_path, "prepared").format_version == "1.7"
    (tmp_path / schema.MANIFEST).write_text(json.dumps(fields | {"format_version": "2.0"}))
    with pytest.raises(ValueError, match=r"format version 2\.0.*update twotower"):
        schema.read_manifest(tmp_path, "prepared")


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "no finished prepared data"), ("{", "is not a manifest"), ("[]", "is not a manifest")],
)
def test_what_is_no_manifest(tmp_path, text, message):
    if text is not None:
        (tmp_path / schema.MANIFEST).write_text(text)
    with pytest.raises(ValueError, match=message):
        schema.read_manifest(tmp_path, "prepared")


def test_a_manifest_of_another_kind(tmp_path):
    schema.Manifest("bundle", "s", {}, {}, {}).write(tmp_path)
    with pytest.raises(ValueError, match="'bundle' directory, not 'prepared'"):
        schema.read_manifest(tmp_path, "prepared")


def test_two_ids_of_one_fingerprint_are_told_apart():
    from pipeline.prepare.vocabulary import distinct_ids

    same = np.array([5, 5, 6])
    prints, raw = distinct_ids([(same, [b"a", b"a", b"b"])])
    assert (prints.tolist(), raw) == ([5, 6], [b"a", b"b"])
    with pytest.raises(ValueError, match="same 64-bit fingerprint"):
        distinct_ids([(same, [b"a", b"c", b"b"])])


def test_python_makes_no_folder_of_the_name_of_a_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="must be a local path"):
        schema.read_manifest("s3://bucket/prepared", "prepared")
    with pytest.raises(ValueError, match="must be a local path"):
        write_bundle("s3://bucket/bundle", np.ones((2, 2)), ["a", "b"])
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_says_which_commit_wrote_it(tmp_path, monkeypatch):
    """Of a checkout, not of a repository that an environment with the package lies in."""
    source = tmp_path / "repository" / "pipeline" / "contract" / "schema.py"
    source.parent.mkdir(parents=True)
    source.write_text("")
    (tmp_path / ".git").mkdir()
    git = ["git", "-C", str(tmp_path / "repository"), "-c", "user.name=a", "-c", "user.email=a@b"]
    monkeypatch.setattr(schema, "__file__", str(source))
    plain = schema.program_version.__wrapped__()
    assert "+" not in plain
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "a"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    clean = schema.program_version.__wrapped__()
    assert clean.startswith(f"{plain}+")
    assert commit.stdout.startswith(clean.removeprefix(f"{plain}+"))
    source.write_text("x")
    assert schema.program_version.__wrapped__() == f"{clean}.changed"


def test_an_older_manifest_does_not_take_the_version_of_its_reader(tmp_path):
    manifest = schema.Manifest("prepared", "s", {}, {}, {})
    assert manifest.code_version == schema.program_version()
    manifest.write(tmp_path)
    assert schema.read_manifest(tmp_path, "prepared") == manifest
    fields = json.loads((tmp_path / schema.MANIFEST).read_text())
    del fields["code_version"]
    (tmp_path / schema.MANIFEST).write_text(json.dumps(fields))
    assert schema.read_manifest(tmp_path, "prepared").code_version == ""
