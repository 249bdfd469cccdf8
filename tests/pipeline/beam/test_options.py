"""What our pipelines need of Beam's runners, and the fault of one that they must not meet."""

import threading

import apache_beam as beam
import pytest
from apache_beam.runners.portability.fn_api_runner import worker_handlers
from apache_beam.runners.worker import data_plane

from pipeline.beam import options as beam_options
from pipeline.beam.accounting import AccountingError, lost_in
from pipeline.beam.options import running


def test_the_limit_is_a_name_that_beam_knows():
    """Set before anything of ours: an assignment to a name that Beam dropped would say nothing."""
    code = worker_handlers.GrpcServer.__init__.__code__
    assert "DATA_BUFFER_TIME_LIMIT_MS" in code.co_names
    assert beam_options.DATA_BUFFER_TIME_LIMIT_MS == 0


@pytest.mark.parametrize("flags", [["--runner=DaskRunner"], ["--runner", "DaskRunner"]])
def test_dask_is_known_by_its_short_name(flags):
    """The second form is that of a file of settings."""
    options = beam_options.beam_options([*flags, "--dask_npartitions", "3"])
    known = options.get_all_options(drop_default=True)
    assert known.pop("runner").endswith(".DaskRunner")
    assert known == {"npartitions": 3}


@pytest.mark.parametrize("limit", [0, 60_000])
def test_the_limit_reaches_all_channels_of_the_workers(monkeypatch, limit):
    """Both ends of the workers are in this process where they are threads."""
    limits, original = [], data_plane.ClosableOutputStream.create

    def create(close, flush, data_buffer_time_limit_ms):
        limits.append(data_buffer_time_limit_ms)
        return original(close, flush, data_buffer_time_limit_ms)

    monkeypatch.setattr(data_plane.ClosableOutputStream, "create", staticmethod(create))
    monkeypatch.setattr(beam_options, "DATA_BUFFER_TIME_LIMIT_MS", limit)
    flags = ["--direct_running_mode=multi_threading", "--direct_num_workers=2"]
    with running(beam_options.beam_options(flags)) as pipeline:
        _ = pipeline | beam.Create([(1, 2), (3, 4)]) | beam.GroupByKey()
    assert set(limits) == {limit}


@pytest.mark.parametrize("limit", [0, 1])
def test_what_is_written_while_the_clock_flushes_is_lost(limit):
    """Why the limit is 0: with another one Beam drops bytes. When it does not, so may our limit."""
    sent, flushed = [], threading.Event()

    def flush(data):
        if not data:  # the clock may come before the stream has a name here
            return
        sent.append(data)
        stream.write(b"written meanwhile")  # as a second thread does
        flushed.set()

    stream = data_plane.ClosableOutputStream.create(sent.append, flush, limit)
    stream.write(b"written before, ")
    if limit:
        assert flushed.wait(60)
    else:
        stream.write(b"written meanwhile")
    stream.close()
    lost = b"".join(sent).count(b"written meanwhile") == 0
    assert lost == (limit > 0)


def test_what_a_worker_misses_is_one_line():
    def miss(_):
        raise AccountingError("candidates: 2 of 3 rows are missing")

    with pytest.raises(AccountingError) as raised, running(beam_options.beam_options([])) as begin:
        _ = begin | beam.Create([1]) | "Count" >> beam.Map(miss)
    line = (
        "candidates: 2 of 3 rows are missing; nothing is written. Please report this with the "
        "runner and its version. [while running 'Count']"
    )
    assert str(raised.value) == line
    # a worker process sends the text of the stack trace
    name = f"{AccountingError.__module__}.AccountingError"
    trace = f"Traceback (most recent call last):\n  ...\n{name}: {line}\n"
    assert str(lost_in(RuntimeError(trace + trace))) == line
    assert lost_in(RuntimeError("another AccountingError: of someone else")) is None


@pytest.mark.parametrize("endpoint", ["127.0.0.1:1", "localhost:port"])
def test_a_job_server_that_does_not_answer_is_an_error(endpoint):
    """Beam would wait for it, and say nothing."""
    with pytest.raises(ValueError, match=rf"no job server answers at {endpoint} .*--job_endpoint"):
        beam_options.beam_options(["--runner=PortableRunner", f"--job_endpoint={endpoint}"])
