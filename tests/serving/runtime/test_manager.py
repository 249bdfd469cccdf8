"""The manager over versions that are directories; broken ones are real SavedModels."""

import contextlib
import gc
import os
import shutil
import threading
import time

import numpy as np
import pytest
from saved_models import write_affine, write_config

from pipeline.contract.schema import Manifest
from serving.errors import InvalidRequest, NotFound, Unavailable
from serving.runtime.configuration import Configuration, ModelConfig
from serving.runtime.loaded_version import LoadedVersion
from serving.runtime.manager import ModelManager
from serving.version.names import State
from serving.version.versions import numbered_directories


class Loaded:
    """A version that answers with its own number, and notes that it was freed."""

    def __init__(self, files):
        self.number, self.is_closed = files.number, False

    def close(self):
        self.is_closed = True


class LoadedAffine(LoadedVersion):
    """A SavedModel that adds the number of its version."""

    def __init__(self, files):
        super().__init__(files)
        outputs = self.run("serving_default", {"x": np.zeros((1, 2), np.float32)})
        assert int(outputs["amount"][0]) == self.number


def until(condition, seconds=120):
    """Waits for what another thread does."""
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)
    return result


@pytest.fixture(scope="module", autouse=True)
def _settled():
    """What is imported is left out of the garbage collections that follow each version."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def _old_enough(monkeypatch):
    monkeypatch.setattr("serving.version.versions._FRESH_SECONDS", 0.0)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Versions 1 and 2, to be copied: version n adds n."""
    home = tmp_path_factory.mktemp("library")
    for number in (1, 2):
        write_affine(home / str(number), float(number))
    return home


@pytest.fixture
def models(tmp_path):
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


@pytest.fixture
def put(models, _old_enough):
    """Writes versions, each by one rename."""

    def put(*numbers, name="adder"):
        home = models / name
        home.mkdir(exist_ok=True)
        for number in numbers:
            aside = home / f".partial-{number}"
            aside.mkdir()
            (aside / "saved_model.pb").write_bytes(b"")
            aside.rename(home / str(number))
        return home

    return put


@pytest.fixture
def start(models, tmp_path):
    made = []

    def start(configs=None, *, load=lambda name, files: Loaded(files), **options):
        file = write_config(tmp_path / "models.config", configs) if configs else ""
        configuration = Configuration(models, str(file))
        manager = ModelManager(configuration, load, **{"poll_seconds": 0.01, **options})
        made.append(manager)
        manager.start()
        return manager

    yield start
    for manager in made:
        manager.close()


def answer(manager, name="adder", version=None, label=None):
    with manager.served.pinned(name, version, label) as loaded:
        assert not getattr(loaded, "is_closed", False)
        return loaded.number


def served(manager, name="adder"):
    with manager.served.lock:
        models = manager.served.models
        return sorted(models[name].available) if name in models else []


def status(manager, version, name="adder"):
    """None before the version was looked at."""
    with manager.served.lock:
        found = manager.served.status(name)
    return next((status for status in found if status.version == version), None)


def state(manager, version, name="adder"):
    found = status(manager, version, name)
    return found and found.state


def ended(manager, version):
    """The status of a version that has ended, None until then; it may be tried again later."""
    found = status(manager, version)
    return found if found and found.state == State.END else None


def test_the_newest_version_is_served_and_a_newer_one_replaces_it(put, start):
    put(1, 3)
    manager = start()
    until(lambda: manager.ready)
    assert answer(manager) == 3
    put(4)
    until(lambda: served(manager) == [4])
    assert answer(manager) == 4
    until(lambda: state(manager, 3) == State.END)
    statuses = manager.served.status("adder")
    assert [(status.version, status.state, status.error_code) for status in statuses] == [
        (4, State.AVAILABLE, "OK"),
        (3, State.END, "OK"),
    ]


def test_new_models_are_found_and_what_is_no_model_is_not(put, start, models):
    put(1)
    (models / "empty").mkdir()
    (models / ".hidden" / "1").mkdir(parents=True)
    (models / "file").write_text("")
    manager = start()
    until(lambda: manager.ready)
    assert list(manager.served.models) == ["adder"]
    put(2, name="other")
    until(lambda: served(manager, "other") == [2])
    assert answer(manager, "other") == 2
    assert manager.ready


def test_a_request_keeps_its_version_until_it_is_done(put, start):
    put(1)
    manager = start()
    until(lambda: manager.ready)
    with manager.served.pinned("adder") as pinned:
        put(2)
        until(lambda: served(manager) == [2])
        assert answer(manager) == 2
        for _ in range(20):  # the thread looks many times and does not free it
            time.sleep(0.005)
            assert state(manager, 1) == State.UNLOADING
        assert not pinned.is_closed
        with pytest.raises(NotFound, match="Version 1 of model 'adder' is not served"):
            answer(manager, version=1)
    until(lambda: state(manager, 1) == State.END)
    assert pinned.is_closed


def test_the_last_request_of_a_version_has_it_freed_at_once(put, start):
    put(1)
    manager = start(poll_seconds=3600)
    until(lambda: manager.served.models and manager.served.models["adder"].statuses)
    manager.reload([ModelConfig("adder")], wait_seconds=30)  # a second look
    with manager.served.pinned("adder"):
        put(2)
        manager.reload([ModelConfig("adder")], wait_seconds=30)
        manager.reload([ModelConfig("adder")], wait_seconds=30)
        assert served(manager) == [2]
        assert state(manager, 1) == State.UNLOADING
    until(lambda: state(manager, 1) == State.END)


BREAK = {
    "garbage for a graph": lambda path: (path / "saved_model.pb").write_bytes(b"\x08\xffgarbage"),
    "an empty graph": lambda path: (path / "saved_model.pb").write_bytes(b""),
    "a graph cut short": lambda path: os.truncate(path / "saved_model.pb", 3000),
    "no variables": lambda path: (path / "variables/variables.data-00000-of-00001").unlink(),
    "variables cut short": lambda path: os.truncate(
        path / "variables/variables.data-00000-of-00001", 2
    ),
    "no index of variables": lambda path: (path / "variables/variables.index").unlink(),
    "a manifest that is none": lambda path: (path / "manifest.json").write_text("{"),
    "a newer format": lambda path: (path / "manifest.json").write_text('{"format_version": "2.0"}'),
}


def test_a_version_is_told_before_it_answers(put, start):
    told = []

    def tell(name, change, seconds):
        told.append((change, manager.ready, served(manager)))
        if change == "loaded":
            raise OSError("no room for metrics")  # which does not keep it from answering

    put(1)
    asked = threading.Event()
    manager = start(on_change=tell, load=lambda name, files: asked.wait(60) and Loaded(files))
    asked.set()  # `manager` has its name
    until(lambda: manager.ready)
    assert answer(manager) == 1
    assert told[0] == ("loaded", False, [])


def test_broken_versions_are_reported_and_replace_nothing(start, library, models):
    """Each kind of damage, while the good version answers on."""
    home = models / "adder"
    changes = []
    shutil.copytree(library / "1", home / "1")
    manager = start(
        load=lambda name, files: LoadedAffine(files),
        on_change=lambda *change: changes.append(change[:2]),
    )
    until(lambda: manager.ready)
    for number, damage in enumerate(BREAK.values(), start=2):
        broken = shutil.copytree(library / "2", home / ".broken")
        damage(broken)
        broken.rename(home / str(number))
        found = until(lambda n=number: ended(manager, n))
        assert found.error_code == "INTERNAL"
        assert found.error_message
        assert answer(manager) == 1
        assert manager.ready
    assert {("adder", "failed"), ("adder", "waiting")} <= set(changes)
    # Once its files are good it is loaded, without a restart.
    shutil.rmtree(home / "2")
    shutil.copytree(library / "2", home / ".whole").rename(home / "2")
    until(lambda: served(manager) == [2])
    assert answer(manager) == 2


def test_a_version_that_failed_is_tried_at_once_when_its_files_change(put, start, monkeypatch):
    monkeypatch.setattr("serving.runtime.model_versions._RETRY_SECONDS", 3600.0)
    tries = []

    def load(name, files):
        tries.append(files.number)
        if files.number == 2:
            raise RuntimeError("out of luck")
        return Loaded(files)

    home = put(1, 2)
    manager = start(load=load)
    until(lambda: manager.ready)
    assert answer(manager) == 1
    told = manager.served.status("adder", 2)[0].error_message
    assert told == "RuntimeError: out of luck (it is tried again in 3600 s)"
    put(3)
    until(lambda: served(manager) == [3])
    assert tries == [2, 1, 3]  # many looks later
    shutil.rmtree(home / "3")
    until(lambda: served(manager) == [1])  # the newest that is good
    (home / "2" / "variables").write_bytes(b"another one")
    until(lambda: tries.count(2) == 2)
    assert answer(manager) == 1


def test_a_version_that_failed_is_tried_again_less_and_less_often(put, start, monkeypatch):
    monkeypatch.setattr("serving.runtime.model_versions._RETRY_SECONDS", 0.02)
    tries = []

    def load(name, files):
        tries.append(time.monotonic())
        if len(tries) < 4:
            raise OSError(24, "Too many open files")
        return Loaded(files)

    put(1)
    manager = start(load=load)
    until(lambda: served(manager) == [1])
    assert manager.ready
    waits = np.diff(tries)
    assert (waits >= [0.02, 0.04, 0.08]).all()


def test_a_copy_under_way_is_waited_for(start, library, models):
    home = models / "adder"
    shutil.copytree(library / "1", home / "1")
    manager = start(load=lambda name, files: LoadedAffine(files))
    until(lambda: manager.ready)
    for path in sorted((library / "2").rglob("*")):  # file by file, with looks in between
        target = home / "2" / path.relative_to(library / "2")
        if path.is_dir():
            target.mkdir(parents=True)
            continue
        target.parent.mkdir(exist_ok=True)
        shutil.copy(path, target)
        time.sleep(0.005)
        assert answer(manager) in (1, 2)
    until(lambda: served(manager) == [2])


def test_a_deleted_version_gives_way_only_where_another_can_answer(put, start):
    home = put(1, 2)
    manager = start()
    until(lambda: manager.ready)
    assert answer(manager) == 2
    shutil.rmtree(home / "2")
    until(lambda: served(manager) == [1])


@pytest.mark.parametrize("is_served", [True, False])
def test_a_version_published_anew_while_another_one_is_loaded_is_loaded(put, start, is_served):
    """Removed and there again under its number: before it is served, or once it is."""
    goes_on, loading, changes = threading.Event(), [], []

    def publish(content):
        shutil.rmtree(put() / "1", ignore_errors=True)
        files = {"saved_model.pb": {"bytes": 0}}
        aside = put(name="aside") / "1"
        aside.mkdir()
        (aside / "saved_model.pb").write_bytes(b"")
        Manifest("version", content, {}, {}, files).write(aside)
        aside.rename(put() / "1")

    def load(name, files):
        loading.append(name)
        assert name != ("other" if is_served else "adder") or goes_on.wait(60)
        loaded = Loaded(files)
        loaded.number = files.manifest.source if files.manifest else files.number
        return loaded

    publish("first")
    put(1, name="other")
    manager = start(load=load, on_change=lambda *change: changes.append(change[:2]))
    try:
        until(lambda: ("other" if is_served else "adder") in loading)
        publish("second")
    finally:
        goes_on.set()
    with manager.served.pinned("adder") if is_served else contextlib.nullcontext() as first:
        until(lambda: served(manager) and answer(manager) == "second")
        assert first is None or not first.is_closed
    until(lambda: ("adder", "unloaded") in changes)
    assert first is None or first.is_closed
    assert state(manager, 1) == State.AVAILABLE
    until(lambda: sorted(loading) == ["adder", "adder", "other"])


@pytest.mark.parametrize("configured", [False, True])
def test_a_model_without_versions_is_unloaded(put, start, models, caplog, configured):
    home = put(1)
    put(2, name="other")
    manager = start([ModelConfig("adder"), ModelConfig("other")] if configured else None)
    until(lambda: manager.ready)
    until(lambda: served(manager) == [1])
    shutil.rmtree(home / "1")
    if not configured:
        home.rmdir()
    until(lambda: served(manager) == [])
    until(lambda: state(manager, 1) == State.END)
    assert "'adder' has no wanted version on disk: what is served is unloaded" in caplog.text
    with pytest.raises(Unavailable, match="no version loaded"):
        answer(manager)
    assert answer(manager, "other") == 2
    put(3)
    until(lambda: served(manager) == [3])
    until(lambda: [status.version for status in manager.served.status("adder")] == [3])


@pytest.mark.parametrize("configured", [False, True])
def test_a_disk_that_is_away_unloads_nothing(put, start, models, caplog, configured):
    home = put(1)
    manager = start([ModelConfig("adder")] if configured else None)
    until(lambda: manager.ready)
    away = home if configured else models
    away.rename(away.with_name("away"))
    until(lambda: not configured or "what is served stays until there is one" in caplog.text)
    for _ in range(10):
        time.sleep(0.005)
        assert answer(manager) == 1
    away.with_name("away").rename(away)
    put(2)
    until(lambda: served(manager) == [2])
    assert manager.alive


@pytest.mark.parametrize("configured", [False, True])
def test_a_folder_that_cannot_be_listed_is_told_once(put, start, models, caplog, configured):
    looks = []

    def fail(path):
        if not path.is_relative_to(models):  # services of other tests look meanwhile
            return numbered_directories(path)
        looks.append(path)
        raise PermissionError(13, "Permission denied", "one" if len(looks) < 20 else "two")

    put(1)
    manager = start([ModelConfig("adder")] if configured else None)
    until(lambda: manager.ready)
    module = "model_versions" if configured else "configuration"  # which looks first
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"serving.runtime.{module}.numbered_directories", fail)
        until(lambda: len(looks) > 40)
        assert answer(manager) == 1
    told = [line for line in caplog.messages if "Looking for versions of" in line]
    assert ["'one'" in line for line in told] == [True, False]
    assert all("Permission denied" in line for line in told)
    put(2)
    until(lambda: served(manager) == [2])


def test_a_wanted_version_that_is_not_there_yet_unloads_nothing(put, start, tmp_path):
    put(1)
    manager = start([ModelConfig("adder")])
    until(lambda: manager.ready)
    wanted = ModelConfig("adder", specific=(2,))
    write_config(tmp_path / "edited", [wanted]).rename(tmp_path / "models.config")
    for _ in range(10):
        time.sleep(0.005)
        assert answer(manager) == 1
    put(2)
    until(lambda: served(manager) == [2])


def test_what_is_not_there_is_told_with_what_is(put, start):
    put(1)
    manager = start()
    until(lambda: manager.ready)
    with pytest.raises(NotFound, match="Model 'nobody' is not served; there are: adder"):
        answer(manager, "nobody")
    with pytest.raises(NotFound, match="Version 7 of model 'adder' is not served; there are: 1"):
        answer(manager, version=7)
    with pytest.raises(InvalidRequest, match=r"Label 'stable' is not one of model 'adder'; .*none"):
        answer(manager, label="stable")
    with pytest.raises(InvalidRequest, match="a version or a label, not both"):
        answer(manager, version=1, label="stable")
    with pytest.raises(NotFound, match="Could not find any version 7 of model 'adder'"):
        manager.served.status("adder", 7)
    with pytest.raises(NotFound, match=r"Model '\.\./adder' is not served"):
        answer(manager, "../adder")


def test_before_anything_is_loaded_the_service_is_unavailable(put, start):
    going_on = threading.Event()

    def load(name, files):
        assert going_on.wait(30)
        return Loaded(files)

    put(1)
    manager = start(load=load)
    try:
        until(lambda: "adder" in manager.served.models and served(manager) == [])
        until(lambda: manager.served.models["adder"].statuses)
        with pytest.raises(Unavailable, match="has no version loaded yet"):
            answer(manager)
        until(lambda: state(manager, 1) == State.LOADING)
        with pytest.raises(Unavailable, match="has no version 1 loaded yet"):
            answer(manager, version=1)
        assert not manager.ready
    finally:
        going_on.set()
    until(lambda: manager.ready)


def test_policies_and_labels(put, start):
    put(1, 2, 3, 4)
    put(1, 2, 3, name="every")
    configs = [
        ModelConfig("adder", "", latest=2, labels={"stable": 1}),
        ModelConfig("every", "", latest=0),
    ]
    manager = start(configs)
    until(lambda: manager.ready)
    until(lambda: served(manager) == [1, 3, 4])  # the label keeps version 1
    until(lambda: served(manager, "every") == [1, 2, 3])  # ready once one of them is there
    assert answer(manager, label="stable") == 1
    assert answer(manager, version=3) == 3
    assert answer(manager) == 4
    with pytest.raises(InvalidRequest, match=r"Label 'canary' .* there are: stable"):
        answer(manager, label="canary")


def test_a_reload_rolls_back_and_forth(put, start):
    put(1, 2)
    manager = start()
    until(lambda: manager.ready)
    pinned = ModelConfig("adder", specific=(1,), labels={"stable": 1})
    manager.reload([pinned], wait_seconds=30)
    assert answer(manager) == answer(manager, label="stable") == 1
    assert served(manager) == [1]
    put(3)
    time.sleep(0.05)
    assert served(manager) == [1]  # a newer version changes nothing
    manager.reload([ModelConfig("adder")], wait_seconds=30)
    assert answer(manager) == 3
    with pytest.raises(InvalidRequest, match="stable"):
        answer(manager, label="stable")


def test_a_reload_adds_and_removes_models(put, start):
    put(1)
    put(2, name="other")
    put(3, name="third")
    manager = start([ModelConfig("adder"), ModelConfig("third")])
    until(lambda: manager.ready)
    assert sorted(manager.served.models) == ["adder", "third"]
    manager.reload([ModelConfig("adder"), ModelConfig("other")], wait_seconds=30)
    assert answer(manager, "other") == 2
    assert answer(manager) == 1
    with pytest.raises(NotFound, match="there are: adder, other"):
        answer(manager, "third")


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (ModelConfig("adder", "/etc"), InvalidRequest, "cannot be changed while it is served"),
        (ModelConfig("new", "/etc"), InvalidRequest, "must lie below"),
        (ModelConfig("new", "../models/../outside"), InvalidRequest, "must lie below"),
        (ModelConfig("new", "."), InvalidRequest, "must lie below"),
        (ModelConfig("new"), NotFound, "Model 'new' has no version on disk"),
        (
            ModelConfig("adder", specific=(9,)),
            NotFound,
            "Model 'adder' has no version 9; there are: 1",
        ),
        (ModelConfig("adder", labels={"stable": 9}), NotFound, "has no version 9"),
    ],
)
def test_a_reload_that_cannot_be_done_changes_nothing(put, start, config, error, message):
    put(1)
    manager = start()
    until(lambda: manager.ready)
    with pytest.raises(error, match=message):
        manager.reload([ModelConfig("adder"), config], wait_seconds=30)
    put(2)
    until(lambda: served(manager) == [2])
    assert answer(manager) == 2


def test_a_reload_to_a_broken_version_says_why_and_keeps_the_good_one(put, start):
    def load(name, files):
        if files.number == 3:
            raise ValueError("a graph cut short")
        return Loaded(files)

    put(1, 2)
    manager = start(load=load)
    until(lambda: manager.ready)
    put(3)
    pinned = ModelConfig("adder", specific=(3,))
    with pytest.raises(
        Unavailable, match="Version 3 cannot be loaded: ValueError: a graph cut short"
    ):
        manager.reload([pinned], wait_seconds=30)
    assert answer(manager) == 2


def test_a_reload_that_takes_too_long_goes_on(put, start):
    going_on = threading.Event()

    def load(name, files):
        assert files.number != 1 or going_on.wait(30)
        return Loaded(files)

    put(1, 2)
    manager = start(load=load)
    until(lambda: manager.ready)
    try:
        pinned = ModelConfig("adder", specific=(1,))
        manager.reload([pinned])
        until(lambda: state(manager, 1) == State.LOADING)
        with pytest.raises(Unavailable, match="still being loaded"):
            manager.reload([pinned], wait_seconds=0.05)
        assert answer(manager) == 2
    finally:
        going_on.set()
    until(lambda: served(manager) == [1])


def test_the_file_of_the_operator_may_place_a_model_anywhere(put, start, models, tmp_path):
    put(1)
    (models / "adder").rename(tmp_path / "elsewhere")
    manager = start([ModelConfig("adder", str(tmp_path / "elsewhere"))])
    until(lambda: manager.ready)
    manager.reload([ModelConfig("adder")], wait_seconds=30)  # an empty path leaves it there
    manager.reload([], wait_seconds=30)
    manager.reload([ModelConfig("adder", str(tmp_path / "elsewhere"))], wait_seconds=30)
    assert answer(manager) == 1


def test_a_configured_model_that_is_missing_holds_up_readiness(put, start):
    put(1)
    manager = start([ModelConfig("adder"), ModelConfig("other")])
    until(lambda: served(manager) == [1])
    assert not manager.ready
    assert answer(manager) == 1  # what is there answers all the same
    put(2, name="other")
    until(lambda: manager.ready)


def test_a_found_model_that_is_broken_does_not_hold_up_readiness(put, start, models):
    put(1)
    (models / "broken" / "1").mkdir(parents=True)
    (models / "broken" / "1" / "manifest.json").write_text("{")
    manager = start()
    until(lambda: manager.ready)
    with pytest.raises(Unavailable, match="is not a manifest"):
        answer(manager, "broken")


def test_old_versions_are_pruned_but_none_that_is_needed(put, start):
    home = put(1, 2, 3, 4)
    (home / "notes").mkdir()
    config = ModelConfig("adder", labels={"stable": 1})
    manager = start([config], prune_versions=2)
    until(lambda: not (home / "2").exists())
    until(lambda: manager.ready)
    put(5)
    until(lambda: not (home / "3").exists())
    until(lambda: served(manager) == [1, 5])
    left = ["1", "4", "5", "notes"]
    until(lambda: sorted(path.name for path in home.iterdir()) == left)  # .pruned-3 goes, too


def test_a_version_newer_than_what_is_served_is_never_pruned(put, start):
    home = put(1, 2, 3)
    pinned = ModelConfig("adder", specific=(1,))
    manager = start([pinned], prune_versions=1)
    until(lambda: manager.ready)
    before = manager._wanted
    manager.reload([pinned], wait_seconds=30)
    assert manager._wanted is not before
    assert manager._wanted.was_tried
    assert sorted(path.name for path in home.iterdir()) == ["1", "2", "3"]


def test_no_directory_of_models_is_a_mistake_of_the_user(tmp_path):
    with pytest.raises(ValueError, match="models must be a directory"):
        Configuration(tmp_path / "none")
