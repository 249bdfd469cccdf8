"""Clusters of processes on loopback: Flink's or Spark's, Beam's job server, a pool of workers."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
CONFIGURATION = CHECKOUT / "tests" / "pipeline" / "cluster"  # flink-conf.yaml
JARS = CHECKOUT / "build" / "cluster"  # `make test-cluster` fetches them
_FLINK = "org.apache.flink.runtime"
_SPARK = "org.apache.spark.deploy"
_SPARK_SETTINGS = {
    "spark.driver.host": "127.0.0.1",
    "spark.driver.bindAddress": "127.0.0.1",
    "spark.executor.memory": "512m",
    "spark.ui.enabled": "false",
}


class Cluster:
    """A context: its processes run while it is open. Their logs lie in `folder`."""

    def __init__(self, engine, folder):
        self.engine, self.folder = engine, folder
        self.processes = {}
        self._jars = JARS / engine / "jars"
        self._ports = {}

    def __enter__(self):
        assert self._jars.exists(), f"{self._jars} is missing; `make test-cluster` fetches it."
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # the processes end then, too
        try:
            (self._start_flink if self.engine == "flink" else self._start_spark)()
            self._start_pool()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error):
        for name in list(self.processes):
            self.kill(name)

    def kill(self, name):
        """Ends a process with all that it started."""
        process = self.processes.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def flags(self):
        """What `twotower` needs to run its jobs here."""
        return [
            "--runner=PortableRunner",
            f"--job_endpoint=127.0.0.1:{self.port('jobs')}",
            "--environment_type=EXTERNAL",
            f"--environment_config=127.0.0.1:{self.port('pool')}",
        ]

    def port(self, name):
        """A free port, which keeps its name."""
        if name not in self._ports:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self._ports[name] = free.getsockname()[1]
        return self._ports[name]

    def rest(self, path, method="GET", **fields):
        """An answer of Flink's REST API."""
        url, body = f"http://127.0.0.1:{self.port('rest')}{path}", None
        if fields:
            body = json.dumps(fields).encode()
        asked = urllib.request.Request(
            url, body, {"Content-Type": "application/json"}, method=method
        )
        with urllib.request.urlopen(asked) as answer:
            return json.load(answer)

    def wait_for_the_workers_to_end(self):
        group = ["pgrep", "-f", "SdkHarness", "-g", str(self.processes["pool"].pid)]
        until(lambda: not subprocess.run(group, stdout=subprocess.PIPE).stdout)

    def start_task_manager(self, name):
        self._java(name, f"{_FLINK}.taskexecutor.TaskManagerRunner", *self._configuration())

    def _configuration(self):
        settings = {"jobmanager.rpc.port": self.port("rpc"), "rest.port": self.port("rest")}
        settings |= {"io.tmp.dirs": self.folder, "web.refresh-interval": 100}  # ms
        settings |= {"state.checkpoints.dir": (self.folder / "checkpoints").as_uri()}
        changed = [f"-D{name}={value}" for name, value in settings.items()]
        return ["--configDir", CONFIGURATION, *changed]

    def _start_flink(self):
        entry = f"{_FLINK}.entrypoint.StandaloneSessionClusterEntrypoint"
        self._java("job-manager", entry, *self._configuration())
        self._start_job_server("flink.FlinkJobServerDriver", "--flink-master", "rest")
        for name in ("task-manager-1", "task-manager-2"):
            self.start_task_manager(name)
        until(self._has_both)

    def _has_both(self):
        with contextlib.suppress(OSError):
            return len(self.rest("/taskmanagers")["taskmanagers"]) == 2
        return False

    def _start_spark(self):
        host = ["--host", "127.0.0.1"]
        ports = ["--port", self.port("master"), "--webui-port", 0]
        self._java("master", f"{_SPARK}.master.Master", *host, *ports)
        self._until_open("master")
        for name in ("worker-1", "worker-2"):
            size = ["--cores", 1, "--memory", "1g", "--webui-port", 0]
            work = ["--work-dir", self.folder / name]
            master = f"spark://127.0.0.1:{self.port('master')}"
            self._java(name, f"{_SPARK}.worker.Worker", *host, *size, *work, master)
        self._start_job_server("spark.SparkJobServerDriver", "--spark-master-url", "master")

    def _start_job_server(self, driver, flag, port):
        scheme = "spark://" if self.engine == "spark" else ""
        flags = [
            f"{flag}={scheme}127.0.0.1:{self.port(port)}",
            "--job-host=127.0.0.1",
            f"--job-port={self.port('jobs')}",
            "--artifact-port=0",
            "--expansion-port=0",
            f"--artifacts-dir={self.folder / 'artifacts'}",
        ]
        self._java("job-server", f"org.apache.beam.runners.{driver}", *flags)
        self._until_open("jobs")

    def _start_pool(self):
        pool = ["-m", "pipeline.beam.worker_pool", f"--service_port={self.port('pool')}"]
        self._start("pool", [sys.executable, *pool], PYTHONPATH=str(CHECKOUT))
        self._until_open("pool")

    def _java(self, name, entry, *arguments):
        options = [f"@{CONFIGURATION / 'java.options'}", f"-Djava.io.tmpdir={self.folder}"]
        if self.engine == "spark":
            options += [f"-D{name}={value}" for name, value in _SPARK_SETTINGS.items()]
        command = ["java", *options, "-cp", f"{self._jars}/*", entry, *arguments]
        home = {"SPARK_HOME": str(self._jars.parent), "SPARK_SCALA_VERSION": "2.12"}
        self._start(name, list(map(str, command)), **home)

    def _start(self, name, command, **variables):
        with open(self.folder / f"{name}.log", "w") as log:
            self.processes[name] = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env={**os.environ, **variables},
                start_new_session=True,
            )

    def _until_open(self, port):
        def is_open():
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port(port))).close()
                return True
            return False

        until(is_open)


def until(happens, seconds=180):
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end, f"{happens.__qualname__}: not in {seconds} s"
        time.sleep(0.1)
