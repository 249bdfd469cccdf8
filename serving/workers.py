"""`twotower serve`: one process, or several on the same ports that a supervisor keeps alive.

Workers share nothing but files: those of the models, and a folder in which each counts its
requests and says that it is ready. Whichever the kernel hands a connection answers it.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import fcntl
import json
import logging
import multiprocessing
import multiprocessing.resource_tracker
import os
import signal
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from pipeline.contract.files import write_atomically
from serving.monitoring import logs
from serving.runtime.process import SIGNALS, Addresses, Announce, bind
from serving.settings import ServeConfig
from serving.version.names import WORKERS_FOLDER

_MAX_DEATHS, _DEATH_SECONDS = 8, 600.0  # more deaths in that time end the service
_RETRY_SECONDS = 10.0  # until one that cannot start is tried again, where others serve
_KILL_SECONDS = 15.0  # beyond its lame duck and drain, until a worker that hangs is killed
_POLL_SECONDS = 0.1
_DEATH_OF_PARENT = 1  # PR_SET_PDEATHSIG of `prctl`
_REFUSAL = "refusal"  # file with the reason of a worker that cannot start
_REFUSED = 2  # its exit status
_log = logging.getLogger(__name__)


def serve(config: ServeConfig) -> int:
    """Serves until SIGTERM or SIGINT, then ends what is running; a second signal does not wait.

    SIGTERM leaves clients time to go elsewhere first, SIGINT comes from a terminal and does not.
    Either may come at any time. Prints one line once every model can answer. Returns 0, or 1 where
    workers die again and again.

    Raises:
      ValueError: a port is taken or cannot be opened, or the configuration cannot be read.
    """
    start = time.monotonic()

    def announce(at: Addresses, models: list[str]) -> None:
        seconds = time.monotonic() - start
        print(
            f"Serving {', '.join(models)} of {config.models} after {seconds:.1f} s: "
            f"REST {at.rest}, gRPC {at.grpc}.",
            flush=True,
        )

    if config.workers > 1:
        multiprocessing.resource_tracker.ensure_running()  # it unblocks signals
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    is_freed, status = True, 0
    try:
        with logs.installed():
            if not config.token and not config.host.startswith(("127.", "::1", "localhost")):
                _log.warning("Whoever reaches %s is answered: set $TWOTOWER_TOKEN.", config.host)
            if config.workers == 1:
                from serving.server import run_until_signalled

                is_freed = run_until_signalled(config, announce, lambda: True)
            else:
                status = _supervise(config, announce)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if not is_freed:
        sys.stdout.flush()
        os._exit(0)  # no thread is waited for that loads a version or runs a batch
    return status


def _supervise(config: ServeConfig, announce: Announce) -> int:
    """Keeps the workers alive until a signal; the exit status."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="twotower-")))
        locked = os.open(folder, os.O_RDONLY)
        stack.callback(os.close, locked)
        fcntl.flock(locked, fcntl.LOCK_SH)  # systemd-tmpfiles leaves alone what is locked
        ports = {}
        for flag in ("rest_port", "grpc_port"):
            if port := getattr(config, flag):  # workers could share it with those of another one
                bind(config, flag, port, is_shared=False).close()
            reserved = stack.enter_context(bind(config, flag, port, is_shared=True))
            ports[flag] = reserved.getsockname()[1]
        workers = _Workers(dataclasses.replace(config, **ports), folder)
        number = signal.SIGINT
        try:
            while not (received := signal.sigtimedwait(SIGNALS, _POLL_SECONDS)):
                if not workers.look(announce):
                    return 1
            number = signal.Signals(received.si_signo)
        finally:
            workers.end(number)
    return 0


class _Workers:
    """The processes, by their number, and what they tell in `folder`."""

    def __init__(self, config: ServeConfig, folder: Path) -> None:
        self._config, self._folder = config, folder
        self._processes: dict[int, BaseProcess] = {}
        self._deaths: list[float] = []
        self._retry_at: dict[int, float] = {}
        self._are_announced = False

    def look(self, announce: Announce) -> bool:
        """Starts those that are missing; announces the service once all were ready.

        Returns False where they die again and again.

        Raises:
          ValueError: none was ready yet, and one cannot start.
        """
        for number, process in list(self._processes.items()):
            if process.exitcode is not None:
                self._bury(number, process)
        if len(self._deaths) >= _MAX_DEATHS:
            message = "%d workers died within %g s: their own lines in this log say why."
            _log.critical(message, _MAX_DEATHS, _DEATH_SECONDS)
            return False
        context = multiprocessing.get_context("spawn")
        for number in set(range(self._config.workers)) - self._processes.keys():
            if time.monotonic() < self._retry_at.get(number, 0.0):
                continue
            level = logging.getLogger("serving").level
            arguments = self._config, number, self._folder, level, os.getpid()
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            self._processes[number] = process
        if not self._are_announced and _all_ready(self._config, self._folder):
            rest, grpc, models = json.loads(_ready_file(self._folder, 0).read_bytes())
            announce(Addresses(rest, grpc), models)
            self._are_announced = True
        return True

    def end(self, number: int) -> None:
        """Hands a signal and those that follow to all, and waits until they are gone."""
        seconds = self._config.lame_duck_seconds + self._config.drain_seconds + _KILL_SECONDS
        end = time.monotonic() + seconds
        received = number
        while alive := [process for process in self._processes.values() if process.is_alive()]:
            for process in alive if received else ():
                assert process.pid is not None
                os.kill(process.pid, signal.SIGKILL if time.monotonic() > end else received)
            information = signal.sigtimedwait(SIGNALS, _POLL_SECONDS)
            received = information.si_signo if information else int(time.monotonic() > end)

    def _bury(self, number: int, process: BaseProcess) -> None:
        from prometheus_client.multiprocess import mark_process_dead

        del self._processes[number]
        refusal = self._folder / _REFUSAL
        if refusal.exists() and not self._are_announced:
            raise ValueError(refusal.read_text())
        mark_process_dead(process.pid, str(self._folder))
        now = time.monotonic()
        if process.exitcode == _REFUSED and self._processes:
            self._retry_at[number] = now + _RETRY_SECONDS
        else:
            self._deaths = [then for then in self._deaths if now - then < _DEATH_SECONDS] + [now]
        message = "Worker %d, process %s, ended with status %s: another one takes its place."
        _log.error(message, number, process.pid, process.exitcode)


def _work(config: ServeConfig, number: int, folder: Path, level: int, supervisor: int) -> None:
    """A worker, from the start of its process to the end; signals are blocked at the start."""
    os.setpgid(0, 0)  # what a terminal sends goes to the supervisor, who hands it on
    ctypes.CDLL(None).prctl(_DEATH_OF_PARENT, signal.SIGTERM)
    if os.getppid() != supervisor:  # it died before this process asked to be told
        return
    threads = max(1, len(os.sched_getaffinity(0)) // config.workers)
    os.environ.setdefault("TF_NUM_INTRAOP_THREADS", str(threads))
    os.environ[WORKERS_FOLDER] = str(folder)  # read when its package is imported
    from serving.server import run_until_signalled

    def tell(at: Addresses, models: list[str]) -> None:
        write_atomically(_ready_file(folder, number), json.dumps([*at, models]))

    logging.getLogger("serving").setLevel(level)
    status = 0
    with logs.installed():
        try:
            run_until_signalled(config, tell, lambda: _all_ready(config, folder))
        except ValueError as error:
            write_atomically(folder / _REFUSAL, str(error))
            if _all_ready(config, folder):  # it takes the place of another one, and is not read
                _log.error("Worker %d cannot start: %s", number, error)
            status = _REFUSED
    sys.stdout.flush()
    os._exit(status)  # no thread is waited for that loads a version or runs a batch


def _all_ready(config: ServeConfig, folder: Path) -> bool:
    """Whether every worker was ready once."""
    return all(_ready_file(folder, number).exists() for number in range(config.workers))


def _ready_file(folder: Path, number: int) -> Path:
    return folder / f"ready-{number}"
