"""The configuration file, edits of it, and reloads: over one life of a service and the next."""

import gc
import hashlib
import json
import logging
import threading
import time

import pytest
from full_disk import largest_file
from google.protobuf import text_format
from tensorflow_serving.config import model_server_config_pb2

from pipeline.contract.files import write_atomically
from serving.errors import Aborted, FailedPrecondition, Unavailable
from serving.runtime.configuration import (
    KEPT,
    Configuration,
    ModelConfig,
    from_proto,
)
from serving.runtime.manager import ModelManager

SECONDS = 30


def pinned(version, **labels):
    return ModelConfig("adder", specific=(version,), labels=labels)


def text(version):
    policy = f"model_version_policy {{ specific {{ versions: {version} }} }}"
    return f'model_config_list {{ config {{ name: "adder" {policy} }} }}'


def of(version):
    proto = model_server_config_pb2.ModelServerConfig()
    return from_proto(text_format.Parse(text(version), proto))


class Loaded:
    def close(self):
        pass


class Life:
    """A manager from its start to its end, over versions that are directories with a name."""

    def __init__(self, root, load=lambda name, files: Loaded()):
        self.file = root / "models.config"
        file = str(self.file) if self.file.exists() else ""
        configuration = Configuration(root / "models", file)
        self.manager = ModelManager(configuration, load, poll_seconds=0.01)

    def __enter__(self):
        self.manager.start()
        return self

    def __exit__(self, *_):
        self.manager.close()

    def write(self, text):
        """Edits the file by one rename: nobody reads half of it."""
        write_atomically(self.file, text)

    def serves(self, *versions):
        end = time.monotonic() + SECONDS
        while self._available() != list(versions):
            assert time.monotonic() < end, self.manager.served.models
            time.sleep(0.005)
        return True

    def _available(self):
        model = self.manager.served.models.get("adder")
        return model and sorted(model.available)

    def reload(self, config, seconds=SECONDS):
        self.manager.reload([config], wait_seconds=seconds)


@pytest.fixture
def root(tmp_path):
    for number in (1, 2, 3):
        version = tmp_path / "models" / "adder" / str(number)
        version.mkdir(parents=True)
        (version / "saved_model.pb").write_bytes(b"")
    return tmp_path


@pytest.fixture(scope="module", autouse=True)
def _settled():
    """What is imported is left out of the garbage collections that follow each version."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _old_enough(monkeypatch):
    monkeypatch.setattr("serving.version.versions._FRESH_SECONDS", 0.0)


def wait_for_a_look(life):
    """Until a look that began after this call has ended."""
    looks, end = [], time.monotonic() + SECONDS
    before = life.manager._look

    def look():
        looks.append(None)
        before()

    life.manager._look = look
    while len(looks) < 3:
        assert time.monotonic() < end
        time.sleep(0.005)
    life.manager._look = before


@pytest.mark.parametrize("with_file", [False, True])
def test_an_accepted_reload_outlives_the_process(root, with_file):
    if with_file:
        (root / "models.config").write_text(text(3))
    with Life(root) as life:
        assert life.serves(3)
        life.reload(pinned(1, stable=1))
    with Life(root) as life:
        assert life.serves(1)
        assert life.manager.served.models["adder"].config == pinned(1, stable=1)
        life.reload(ModelConfig("adder"))
    with Life(root) as life:
        assert life.serves(3)


def test_an_edited_file_is_taken_over_and_ends_earlier_reloads(root):
    (root / "models.config").write_text(text(3))
    with Life(root) as life:
        life.write(text(2))
        assert life.serves(2)
        life.reload(pinned(1))
        wait_for_a_look(life)
        assert life.serves(1)  # the file is as it was when the reload came
        life.write(text(3))
        assert life.serves(3)
        life.write(text(2))
        assert life.serves(2)
    with Life(root) as life:
        assert life.serves(2)


def test_an_edit_while_nothing_runs_ends_a_reload(root):
    (root / "models.config").write_text(text(3))
    with Life(root) as life:
        life.reload(pinned(1))
    (root / "models.config").write_text(text(2))
    with Life(root) as life:
        assert life.serves(2)
    (root / "models.config").write_text(text(3))  # as it was before the reload
    with Life(root) as life:
        assert life.serves(3)


@pytest.mark.parametrize(
    "damage",
    [
        "model_config_list { config {",
        "",
        text(2).replace('"adder"', '"../adder"'),
        text(2).replace("name:", 'base_path: "/elsewhere" name:'),
    ],
)
def test_an_edit_that_cannot_be_used_is_told_once_and_changes_nothing(root, damage, caplog):
    (root / "models.config").write_text(text(3))
    with Life(root) as life, caplog.at_level(logging.ERROR):
        life.serves(3)
        life.write(damage)
        wait_for_a_look(life)
        assert life.serves(3)
        life.file.unlink()
        wait_for_a_look(life)
        assert life.serves(3)
        life.write(text(3))  # as it was; then the same mistake once more
        wait_for_a_look(life)
        life.file.unlink()
        wait_for_a_look(life)
        life.write(text(2))
        assert life.serves(2)
    told = [message for message in caplog.messages if "stays as it is" in message]
    assert len(told) == 3


def test_a_reload_that_nobody_may_write_down_changes_nothing(root, monkeypatch):
    with Life(root) as life:
        life.serves(3)
        monkeypatch.setattr("serving.runtime.configuration.os.access", lambda *_: False)
        with pytest.raises(FailedPrecondition, match="another state_dir"):
            life.reload(pinned(1))
        wait_for_a_look(life)
        assert life.serves(3)


def test_a_reload_that_finds_no_room_is_in_force_and_kept_once_there_is(root, caplog):
    labels = {f"label{number}": 1 for number in range(400)}  # that fill more than the limit
    with Life(root) as life:
        assert life.serves(3)
        with largest_file(8000):
            text = "in force, but not kept for the next start: File too large"
            with pytest.raises(Unavailable, match=text):
                life.reload(pinned(1, **labels))
            wait_for_a_look(life)
            assert life.serves(1)
        wait_for_a_look(life)
    assert len([message for message in caplog.messages if "is not kept" in message]) == 1
    assert sorted(path.name for path in (root / "models").iterdir()) == [KEPT, "adder"]
    with Life(root) as life:
        assert life.serves(1)


def test_a_reload_is_kept_when_all_of_it_is_served_and_not_before(root):
    gate = threading.Event()

    def load(name, files):
        assert files.number == 3 or gate.wait(SECONDS)
        return Loaded()

    with Life(root, load) as life:
        life.serves(3)
        waiting = threading.Thread(target=life.reload, args=(pinned(1),))
        waiting.start()
        assert not (root / "models" / KEPT).exists()
        gate.set()
        waiting.join(SECONDS)
        assert (root / "models" / KEPT).exists()


def aborted_reload(life, outcome):
    """A thread in which a reload of version 1 waits, and notes that it is aborted."""

    def reload():
        try:
            life.reload(pinned(1))
        except Aborted as error:
            outcome.append(error)

    waiting = threading.Thread(target=reload)
    waiting.start()
    return waiting


def test_a_later_reload_takes_the_place_of_one_that_waits(root):
    gate, outcome = threading.Event(), []

    def load(name, files):
        assert files.number != 1 or gate.wait(SECONDS)
        return Loaded()

    with Life(root, load) as life:
        life.serves(3)
        waiting = aborted_reload(life, outcome)
        while life.manager._wanted is None:
            time.sleep(0.001)
        life.manager.reload([pinned(2)])
        waiting.join(SECONDS)
        assert outcome
        gate.set()
        life.reload(pinned(2))
    with Life(root) as life:
        assert life.serves(2)


def test_a_reload_that_an_earlier_version_kept_is_in_force(root):
    digest = hashlib.sha256(b"").hexdigest()
    policy = {"latest": 1, "specific": [1]}
    models = [{"name": "adder", "base_path": "", "policy": policy, "labels": {"stable": 1}}]
    (root / "models" / KEPT).write_text(json.dumps({"after": digest, "models": models}))
    assert Configuration(root / "models").in_force() == [pinned(1, stable=1)]


def test_what_was_kept_and_cannot_be_read_is_told(root):
    (root / "models" / KEPT).write_text('{"after": ')
    with pytest.raises(ValueError, match=r"must hold the last reload, .* delete it"):
        Life(root)


def test_a_reload_that_cannot_be_read_any_more_holds_up_no_version(root, caplog):
    with Life(root) as life:
        assert life.serves(3)
        (root / "models" / KEPT).mkdir()
        (root / "models" / "adder" / "3").rename(root / "models" / "adder" / "4")
        assert life.serves(4)
        wait_for_a_look(life)
    told = [message for message in caplog.messages if "stays as it is" in message]
    assert len(told) == 1
    assert KEPT in told[0]
    with pytest.raises(ValueError, match=rf"{KEPT}.* cannot be read"):
        Life(root)


def test_services_with_one_state_follow_each_others_reloads(root):
    (root / "models.config").write_text(text(3))
    with Life(root) as life, Life(root) as other:
        assert life.serves(3)
        assert other.serves(3)
        life.reload(pinned(1, stable=1))
        assert other.serves(1)
        assert other.manager.served.models["adder"].config == pinned(1, stable=1)
        other.reload(pinned(2))
        assert life.serves(2)
        (root / "models" / KEPT).unlink()  # takes back all reloads
        assert life.serves(3)
        assert other.serves(3)
        life.reload(pinned(1))
        life.write(text(2))
        assert other.serves(2)
        assert life.serves(2)


def test_a_later_reload_of_another_service_wins_while_an_earlier_one_is_loaded(root):
    gate, loads, outcome = threading.Event(), threading.Event(), []

    def load(name, files):
        if files.number == 1:
            loads.set()
            assert gate.wait(SECONDS)
        return Loaded()

    with Life(root, load) as life, Life(root) as other:
        assert life.serves(3)
        assert other.serves(3)
        waiting = aborted_reload(life, outcome)
        assert loads.wait(SECONDS)
        other.reload(pinned(2))
        gate.set()
        waiting.join(SECONDS)
        assert life.serves(2)
        wait_for_a_look(other)
        assert other.serves(2)
        assert outcome
    with Life(root) as life:
        assert life.serves(2)


def test_a_reload_that_is_taken_back_leaves_what_is_discovered(root):
    with Life(root) as life:
        life.reload(pinned(1))
        assert life.serves(1)
        (root / "models" / KEPT).unlink()
        assert life.serves(3)
