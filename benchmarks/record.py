"""What a benchmark leaves behind: its results, and the command that makes them again."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

from pipeline.contract.files import write_atomically


def command(benchmark: str) -> str:
    """The command that is running; of an absolute path, the last part: others have other places."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return " ".join([f"python -m benchmarks.{benchmark}", *map(shlex.quote, words)])


def processor() -> str:
    """What a benchmark ran on: the name of the processor and its widest vectors."""
    from towers.doctor import cpu_features

    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line for line in lines if line.startswith("model name")]
    name = names[0].partition(":")[2].strip() if names else platform.processor()
    wide = [part for part in ("avx512f", "avx2") if part in cpu_features()]
    return ", ".join([name, *wide[:1]])


def write(path: str | Path, results: Any) -> None:
    """Writes results as JSON, in one step, so that a killed benchmark leaves the earlier ones."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(path), json.dumps(results, indent=2) + "\n")
