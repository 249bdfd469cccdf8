"""Workers for the task managers or executors of one machine, which start and end them.

Example:
  python -m pipeline.beam.worker_pool --service_port=50000
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from apache_beam.portability.api import beam_fn_api_pb2
from apache_beam.runners.worker import worker_pool_main


class WorkerPool(worker_pool_main.BeamFnExternalWorkerPoolServicer):
    """Beam's pool, for several task managers at once.

    Beam's knows a worker by its id alone, and each task manager counts ids from 1: when one of them
    ended its worker, the worker of another would be killed, and that one would wait without end.
    """

    def StopWorker(self, request: Any, context: Any) -> Any:  # noqa: N802, gRPC's name
        """Nothing: a worker ends when its task manager closes the connection."""
        return beam_fn_api_pb2.StopWorkerResponse()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--service_port", type=int, required=True)
    # A pool calls `python`: this one, whether or not its environment is activated.
    os.environ["PATH"] = os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"]))
    address, server = WorkerPool.start(use_process=True, port=parser.parse_args().service_port)
    print(f"worker pool: listens at {address}", flush=True)
    server.wait_for_termination()
