import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_settling_leaves_what_is_imported_out_of_collections():
    script = """
import gc, sys
import json
from serving.runtime.process import settle
before = len(gc.get_objects())
settle()
print(before > 1000, len(gc.get_objects()) < before / 2, gc.isenabled(), sys.getswitchinterval())
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.split() == ["True", "True", "True", "0.001"]
