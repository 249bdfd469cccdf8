"""One pool of workers serves two task managers, which both count their workers from 1."""

import subprocess

import pytest
from apache_beam.portability.api import beam_fn_api_pb2
from apache_beam.runners.worker.worker_pool_main import BeamFnExternalWorkerPoolServicer

from pipeline.beam.worker_pool import WorkerPool


@pytest.mark.parametrize("pool", [WorkerPool, BeamFnExternalWorkerPoolServicer])
def test_the_end_of_one_worker_is_not_that_of_another(pool, monkeypatch):
    """With Beam's pool it is: when that changes, ours can go."""
    started, popen = [], subprocess.Popen

    def start(command, **options):
        started.append(popen(["sleep", "60"], **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    pool = pool(use_process=True)
    for _ in range(2):  # the first task manager, then the second
        pool.StartWorker(beam_fn_api_pb2.StartWorkerRequest(worker_id="1-1"), None)
    pool.StopWorker(beam_fn_api_pb2.StopWorkerRequest(worker_id="1-1"), None)  # the first
    try:
        assert (started[1].poll() is None) == isinstance(pool, WorkerPool)
    finally:
        for process in started:
            process.kill()
            process.wait()
