"""What jobs need of Beam beyond their transforms: its options, and the end of a pipeline."""

from __future__ import annotations

import argparse
import contextlib
import socket
from collections.abc import Iterable, Iterator
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import (
    DirectOptions,
    PipelineOptions,
    PortableOptions,
    StandardOptions,
)
from apache_beam.utils import interactive_utils

from pipeline.beam.accounting import lost_in
from pipeline.contract.files import quiet_standard_error
from pipeline.contract.settings import did_you_mean

# The runner for several processes of one machine sends what it has each second, from a thread that
# loses what another thread writes meanwhile (docs/beam.md). 0: all is sent when it is complete.
DATA_BUFFER_TIME_LIMIT_MS = 0
_DASK_RUNNER = "--runner=apache_beam.runners.dask.dask_runner.DaskRunner"
_DASK_SIZES = ("--dask_partition_size", "--dask_npartitions")


@contextlib.contextmanager
def running(options: PipelineOptions | None) -> Iterator[beam.Pipeline]:
    """A pipeline that runs when the context ends; returns when it is done.

    Raises:
      AccountingError: a worker missed something that another one must have sent, told in one line.
    """
    from apache_beam.runners.portability.fn_api_runner import worker_handlers

    worker_handlers.DATA_BUFFER_TIME_LIMIT_MS = DATA_BUFFER_TIME_LIMIT_MS
    # Workers in processes of their own log how they start and end.
    mode = options.view_as(DirectOptions).direct_running_mode if options else ""
    in_processes = mode == "multi_processing"
    quiet = quiet_standard_error() if in_processes else contextlib.nullcontext()
    try:
        with quiet, _not_interactive(), beam.Pipeline(options=options) as pipeline:
            yield pipeline
    except Exception as error:
        lost = lost_in(error)
        if lost is None:
            raise
        raise lost from None
    if client := getattr(pipeline.result, "client", None):
        client.close()  # the DaskRunner opens one for each pipeline and leaves it open


@contextlib.contextmanager
def _not_interactive() -> Iterator[None]:
    """In IPython, Beam would load its interactive part: it needs pandas < 3, and we do not need it.

    Beam would name steps by their cell, leave temporary files to that part, and refuse Dask.
    """
    places: tuple[Any, ...] = (interactive_utils, beam.pipeline)
    before = [place.is_in_ipython for place in places]
    for place in places:
        place.is_in_ipython = lambda: False
    try:
        yield
    finally:
        for place, original in zip(places, before, strict=True):
            place.is_in_ipython = original


def spread(pipeline: beam.Pipeline, name: str, values: Iterable[Any]) -> beam.PCollection:
    """The values, each for the next worker that is free."""
    created = pipeline | name >> beam.Create(values, reshuffle=False)
    return created | f"Spread{name}" >> beam.Reshuffle()


def finish(*branches: beam.PCollection) -> None:
    """Joins the ends of all branches of a pipeline; call it last.

    The DaskRunner computes what the last transform needs and nothing else: a branch that ends
    in a file of its own would be left out without a word.
    """
    _ = branches | "Join" >> beam.Flatten() | "Finish" >> beam.FlatMap(lambda _: ())


def beam_options(arguments: list[str], ours: Iterable[str] = ()) -> PipelineOptions:
    """Options for a runner; FnApiRunner unless they name one.

    Beam only warns about a flag that nobody knows; a misspelt one then changes nothing and says
    nothing. What stands behind `--` goes to the runner unchecked. `ours` are names of the job's own
    flags, to suggest when one is misspelt.

    Raises:
      ValueError: neither the job nor Beam knows a flag, or no job server answers.
    """
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    checked, runner_only = arguments[:cut], arguments[cut + 1 :]
    runner = PipelineOptions([*checked, *runner_only]).view_as(StandardOptions).runner or ""
    on_dask = "Dask" in runner
    if on_dask:
        import apache_beam.runners.dask.dask_runner  # noqa: F401, its import makes its flags known

    parser = argparse.ArgumentParser(
        add_help=False,
        allow_abbrev=False,
        conflict_handler="resolve",  # some flags are in two
    )
    for options in _subclasses(PipelineOptions):
        if "_add_argparse_args" in vars(options):
            options._add_argparse_args(parser)  # type: ignore[arg-type]
    _, unknown = parser.parse_known_args(checked)
    if unknown:
        known = [*(f"--{name}" for name in ours), *parser._option_string_actions]
        flag = unknown[0].split("=")[0]
        raise ValueError(f"unknown argument {flag}; {did_you_mean(flag, known, 'see --help.')}")
    flags = checked + runner_only
    if runner == "DaskRunner":  # Beam knows it only by its long name
        flags.append(_DASK_RUNNER)
    if on_dask and not any(flag.startswith(_DASK_SIZES) for flag in flags):
        flags = [*flags, f"--dask_npartitions={2 * _dask_threads(flags)}"]
    _check_job_server(flags)
    if not runner:
        # DirectRunner would look for a binary to download before it falls back to this one
        flags = ["--runner=FnApiRunner", *flags]
    return PipelineOptions(flags)


def _dask_threads(flags: list[str]) -> int:
    """Threads of all workers of the cluster.

    By default the DaskRunner makes one task of 128 elements, which one worker then runs alone.
    """
    from apache_beam.runners.dask.dask_runner import DaskOptions
    from distributed import Client

    options = PipelineOptions(flags).view_as(DaskOptions)
    known = options.get_all_options(drop_default=True, current_only=True)
    try:
        with Client(**known) as client:
            return sum(client.nthreads().values()) or 1
    except OSError as error:
        raise ValueError(
            f"no Dask scheduler answers at {known.get('address')} ({error}); "
            "check --dask_client_address."
        ) from error


def _check_job_server(flags: list[str]) -> None:
    """Beam waits for one without a word."""
    endpoint = PipelineOptions(flags).view_as(PortableOptions).job_endpoint or ""
    host, colon, port = endpoint.rpartition(":")
    if not colon:
        return  # none, or Beam's own
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no job server answers at {endpoint} ({error}); check --job_endpoint."
        ) from error


def _subclasses(base: type[PipelineOptions]) -> Iterator[type[PipelineOptions]]:
    for child in base.__subclasses__():
        yield child
        yield from _subclasses(child)
