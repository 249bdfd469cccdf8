"""Loads versions in the background and swaps them while requests go on.

One thread looks at the disk, loads, retires and frees. Requests pin the version that they use; it
is freed after the last of them. What is served goes away only when all that is wanted is there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from pipeline.contract import stores
from serving.errors import Aborted, InvalidRequest, Unavailable
from serving.monitoring.logs import event
from serving.runtime.batched_version import BatchedVersion
from serving.runtime.configuration import Configuration, ModelConfig
from serving.runtime.model_versions import ModelVersions, ServedModels
from serving.version.names import State
from serving.version.versions import VersionFiles

_PRUNED = ".pruned-"  # a version is renamed before it is deleted: nobody reads half of it
_COPIES = 2  # newest versions of a store that are kept on disk, the one to roll back to included
_MAX_SECONDS = 60.0  # between two looks at a store that fails; they double from poll_seconds
_MAX_ERROR = 1000  # characters of an error that a status keeps
_LEVELS = {"waiting": logging.WARNING, "failed": logging.ERROR}
_log = logging.getLogger(__name__)


@dataclasses.dataclass(eq=False)
class _Wanted:
    """What is to be served, and how far that is: by the start, the configuration or a reload."""

    configs: Sequence[ModelConfig]
    to_keep: bool = False  # a reload that is not yet kept for the next start
    is_adopted: bool = False
    was_tried: bool = False  # a whole look at the disk followed
    not_kept: str = ""  # why, where that failed


@dataclasses.dataclass(eq=False)
class ModelManager:
    """Keeps the wanted versions of all models loaded; serves nothing before `start`.

    Attributes:
      load: the name of a model and a complete version → the version, warmed up. Whatever it
        raises is reported; the version is tried again later, and when its files change.
      on_change: called with a model, "loaded", "failed" or "unloaded", and the seconds.

    Raises:
      ValueError: the reload that was kept cannot be read.
    """

    configuration: Configuration
    load: Callable[[str, VersionFiles], BatchedVersion]
    _: dataclasses.KW_ONLY
    poll_seconds: float = 1.0
    prune_versions: int = 0
    on_change: Callable[[str, str, float], None] = lambda *_: None
    served: ServedModels = dataclasses.field(default_factory=ServedModels)

    def __post_init__(self) -> None:
        configs = self.configuration.in_force()
        self._wanted = None if configs is None else _Wanted(configs)  # None: what is discovered
        self._looked = threading.Condition()
        self._stopping = self._was_ready = False
        self._thread = threading.Thread(target=self._watch, name="versions", daemon=True)
        self._closed = threading.Event()
        self._problems: dict[str, str] = {}  # what was logged last, of those that are not over
        if self.configuration.store and not self.prune_versions:
            self.prune_versions = _COPIES

    def start(self) -> None:
        self._thread.start()
        if self.configuration.store:
            threading.Thread(target=self._follow, name="store", daemon=True).start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def ready(self) -> bool:
        """Whether every model had a version once, and nothing but a reload took one away.

        Where models are discovered, one of which all versions are broken does not hold up the
        others; and a model that comes later does not take readiness away.
        """
        wanted = self._wanted
        with self.served.lock:
            models = list(self.served.models.values())
            answers = any(model.available for model in models)
            done = [model.available or (wanted is None and model.settled) for model in models]
            self._was_ready |= answers and all(done) and (wanted is None or wanted.is_adopted)
            return self._was_ready and answers

    def reload(self, configs: Sequence[ModelConfig], wait_seconds: float = 0.0) -> None:
        """Serves these models and versions from now on; see `Service.reload`."""
        self._check_paths(configs)
        for config in configs:
            self.configuration.check(config)
        self.configuration.check_writable()
        with self._looked:
            self.configuration.note_earlier()
            self._wanted = reload = _Wanted(configs, to_keep=True)
            self._looked.notify_all()  # whoever waits for an earlier one
            self.served.attention.set()
            if wait_seconds:
                self._looked.wait_for(lambda: self._is_over(reload), wait_seconds)
                self._refuse_unless_kept(reload)

    def close(self) -> None:
        """Ends the thread, and frees everything; no request may be under way."""
        with self._looked:
            self._stopping = True
            self._looked.notify_all()
        self._closed.set()
        self.served.attention.set()
        if self._thread.ident:
            self._thread.join()
        for model in self.served.models.values():
            self.served.retire(model, list(model.available))
        self._free()

    def _follow(self) -> None:
        """Copies new versions of a store to the disk, in a thread of its own: it may be slow."""
        seconds = 0.0
        while not self._closed.wait(seconds):
            try:
                wanted = self._wanted
                named = self.configuration.named(wanted.configs if wanted else ())
                stores.follow_versions(self.configuration.store, self.prune_versions, named)
                seconds = self.poll_seconds
            except (ValueError, OSError) as error:
                seconds = min(max(2 * seconds, self.poll_seconds), _MAX_SECONDS)
                _log.warning("What is served stays as it is: %s", error)

    # --- the thread --------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._stopping:
            wanted = self._wanted
            with self._told_once("models"):
                self._look()
            with self._looked:
                if wanted is not None and wanted is self._wanted:
                    wanted.was_tried = True
                    self._keep(wanted)
                self._looked.notify_all()
            self.served.attention.wait(self.poll_seconds)
            self.served.attention.clear()

    def _look(self) -> None:
        self._adopt()
        for name, model in self.served.models.items():
            with self._told_once(repr(name)):
                self._attend(model)
        self._free()

    @contextlib.contextmanager
    def _told_once(self, whose: str) -> Iterator[None]:
        """Logs what fails inside, not at each look: what cannot be read may be readable later."""
        try:
            yield
            self._problems.pop(whose, None)
        except Exception as error:
            is_ours = not isinstance(error, OSError)
            if self._problems.get(whose) != str(error):
                _log.error("Looking for versions of %s failed: %s", whose, error, exc_info=is_ours)
            self._problems[whose] = str(error)

    def _attend(self, model: ModelVersions) -> None:
        while (wanted := self._find(model)) and not self._stopping:
            model.settled = False
            self._load(model, wanted[0])
        model.settled = True
        self.served.retire(model, model.surplus())
        self._free()
        is_kept = self._wanted is None or not self._wanted.to_keep
        if self.prune_versions and is_kept:  # otherwise the next start may want what goes
            self._prune(model)

    def _adopt(self) -> None:
        """Takes over what was asked for, or discovers new models."""
        with self._looked:
            try:
                if self.configuration.has_changed():
                    configs = self.configuration.in_force()
                    self._check_paths(configs or ())
                    self.configuration.place()
                    self._wanted = None if configs is None else _Wanted(configs)
                    self._looked.notify_all()  # whoever waits for a reload
                    _log.info("The configuration has changed, and is in force.")
            except ValueError as error:
                _log.error("What is served stays as it is: %s", error)
            wanted = self._wanted
        before, models = self.served.models, dict(self.served.models)
        if wanted is None:
            root = self.configuration.root
            for name, path in self.configuration.discover():
                models.setdefault(name, ModelVersions(ModelConfig(name), path, root))
                models[name].config = ModelConfig(name)
        elif not wanted.is_adopted:
            models = {}
            for config in wanted.configs:
                model = before.get(config.name)
                model = model or ModelVersions(config, self.configuration.path(config))
                model.config, models[config.name] = config, model
        self.served.models = models
        if wanted is not None:
            wanted.is_adopted = True
        for name in before.keys() - models.keys():
            self.served.retire(before[name], list(before[name].available))

    def _find(self, model: ModelVersions) -> list[VersionFiles]:
        before, absence = model.statuses, model.absence
        wanted = model.find()
        if model.available and model.absence != absence:
            _log.warning("%s", model.absence or f"Model {model.config.name!r} is on disk again.")
        for number, status in model.statuses.items():
            if status.error_message and status != before.get(number):
                self._report(model, "waiting", number, error=status.error_message)
        return wanted

    def _load(self, model: ModelVersions, files: VersionFiles) -> None:
        name, number = model.config.name, files.number
        model.report(number, State.LOADING)
        start = time.monotonic()
        try:
            servable = self.load(name, files)
        except Exception as error:  # whatever the files of a version can cause
            _log.debug("Loading %s failed.", files.path, exc_info=True)
            message = model.failed(files, f"{type(error).__name__}: {error}"[:_MAX_ERROR])
            self._report(model, "failed", number, time.monotonic() - start, message)
            return
        try:  # before it answers: whoever waits for it may say so at once, and last
            self._report(model, "loaded", number, time.monotonic() - start)
        finally:
            self.served.serve(model, files, servable)

    def _free(self) -> None:
        unused = self.served.take_unused()
        freed = [(version.model, version.files.number) for version in unused]
        start = time.monotonic()
        while unused:
            try:
                unused.pop().servable.close()
            except Exception:  # it is gone for requests in any case
                _log.exception("A version did not close.")
        if freed:
            gc.collect()  # the graphs are full of cycles, which hold the variables
        for model, number in freed:
            if number not in model.available:  # published anew
                model.report(number, State.END)
            self._report(model, "unloaded", number, time.monotonic() - start)

    def _prune(self, model: ModelVersions) -> None:
        for leftover in model.base_path.glob(f"{_PRUNED}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        for path in model.removable(self.prune_versions):
            pruned = path.with_name(f"{_PRUNED}{path.name}")
            path.rename(pruned)
            shutil.rmtree(pruned, ignore_errors=True)
            self._report(model, "pruned", int(path.name))

    def _report(
        self, model: ModelVersions, what: str, number: int, seconds: float = 0.0, error: str = ""
    ) -> None:
        name, level = model.config.name, _LEVELS.get(what, logging.INFO)
        message = f"Version {number} of model {name} {what}{': ' if error else ''}{error}"
        event(_log, level, message, model=name, version=number, change=what, seconds=seconds)
        self.on_change(name, what, seconds)

    # --- reload; what follows but `_check_paths` is called with `_looked` held ------------------

    def _check_paths(self, configs: Sequence[ModelConfig]) -> None:
        for config in configs:
            model = self.served.models.get(config.name)
            if model is not None and model.base_path != self.configuration.path(config):
                raise InvalidRequest(
                    f"base_path of model {config.name!r} cannot be changed while it is served: "
                    "leave it as it is, or choose another name."
                )

    def _keep(self, wanted: _Wanted) -> None:
        """Keeps a reload for the next start once all that it wants is served."""
        if not wanted.to_keep or set(self._outcomes(wanted)) - {(True, "")}:
            return
        try:
            wanted.to_keep = not self.configuration.keep(wanted.configs)  # the next look adopts it
        except OSError as error:
            if not wanted.not_kept:  # it is tried at each look
                _log.error("A reload is not kept for the next start yet: %s", error)
            why = error.strerror or type(error).__name__
            wanted.not_kept = f"The reload is in force, but not kept for the next start: {why}."

    def _is_over(self, reload: _Wanted) -> bool:
        """Whether waiting for a reload does not help."""
        has_failed = any(is_over and missing for is_over, missing in self._outcomes(reload))
        is_done = reload is not self._wanted or not reload.to_keep or bool(reload.not_kept)
        return self._stopping or is_done or (reload.was_tried and has_failed)

    def _refuse_unless_kept(self, reload: _Wanted) -> None:
        """Raises what is missing of a reload."""
        if reload is not self._wanted:
            raise Aborted("Another configuration came before all of this one was loaded.")
        if not reload.to_keep:
            return
        if self._stopping:
            raise Unavailable("The service is shutting down.")
        missing = [missing for _, missing in self._outcomes(reload) if missing]
        raise Unavailable((*missing, reload.not_kept or "The reload has not begun yet.")[0])

    def _outcomes(self, wanted: _Wanted) -> list[tuple[bool, str]]:
        """For each model, whether its loading is over, and what is missing, "" for nothing."""
        with self.served.lock:
            models = [self.served.models.get(config.name) for config in wanted.configs]
            return [(False, "") if model is None else model.outcome() for model in models]
