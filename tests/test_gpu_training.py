"""The benchmark for a GPU, at a size for a CPU: all of it runs before there is a card."""

import json

import pytest
import tensorflow as tf
from tensorflow.tsl.profiler.protobuf import xplane_pb2

from benchmarks import gpu_training
from towers.model.optimizers import OPTIMIZERS
from towers.model.step import TrainedPair

PS = 10**6  # in a microsecond


def test_without_a_gpu_it_says_what_to_do(capsys):
    assert gpu_training.main([]) == 2
    assert "--toy" in capsys.readouterr().out


@pytest.mark.long
def test_all_of_it_runs_at_toy_size(tmp_path):
    assert gpu_training.main(["--toy", "--json", str(tmp_path / "gpu.json")]) == 0
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["profile"] is None  # there is no card
    same = results["correctness"]
    assert {f"optimizer {name}" for name in OPTIMIZERS} < same.keys()
    assert 0 < max(same.values()) <= gpu_training.SAME  # XLA adds up in another order
    rates = results["examples_per_second"]
    assert rates.keys() == {
        *("ssl_pop 256", "stock_tfrs 256", "ssl_pop 512", "bpr 2048"),
    }
    for name in ("adam_update_ms", "ranking_seconds", "copy_gb_per_second"):
        assert results[name] > 0
    assert results["large_table"]["examples_per_second"] > 0
    assert all(rate > 0 for rate in rates.values())


@pytest.mark.long
def test_a_device_that_learns_something_else_is_noticed(monkeypatch):
    data, case = gpu_training._small(), {"method": "ssl_pop"}
    differentiate = TrainedPair._loss_and_gradients

    def wrong(self, *inputs):
        loss, by_rows, *rest = differentiate(self, *inputs)
        if self.compiled:
            by_rows = [None if g is None else g * 1.001 for g in by_rows]
        return loss, by_rows, *rest

    assert gpu_training.difference(data, "CPU:0", case) <= gpu_training.SAME
    monkeypatch.setattr(TrainedPair, "_loss_and_gradients", wrong)
    assert gpu_training.difference(data, "CPU:0", case) > gpu_training.SAME


def test_a_full_memory_is_told():
    def part():
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor\nmore")

    assert (
        gpu_training.unless_full(part) == "left out, the memory is full: OOM when allocating tensor"
    )


def test_traffic_and_idle_share_of_a_profile():
    """Two streams over 10 µs: busy in 0-4 and 3-6 and 9-10, which is 7 of 10."""
    space = xplane_pb2.XSpace()
    space.planes.add(name="/host:CPU")
    plane = space.planes.add(name="/device:GPU:0")
    plane.stat_metadata[1].name = "memcpy_details"
    details = {
        2: "kind_src:pageable kind_dst:device size:400 dest:0 async:1",
        3: "kind_src:device kind_dst:pinned size:64 dest:0 async:1",
        4: "kind_src:device kind_dst:device size:9999 dest:0 async:1",
    }
    for number, text in details.items():
        plane.stat_metadata[number].name = text
    first = plane.lines.add(name="Stream #1(Compute)", timestamp_ns=1000)
    second = plane.lines.add(name="Stream #2(MemcpyH2D)", timestamp_ns=4000)
    other = plane.lines.add(name="XLA Ops", timestamp_ns=1000)
    other.events.add(offset_ps=0, duration_ps=10 * PS)
    first.events.add(offset_ps=0, duration_ps=4 * PS)
    for start, length, text in ((0, 3, 2), (0, 1, 3), (6, 1, 4)):
        event = second.events.add(offset_ps=start * PS, duration_ps=length * PS)
        event.stats.add(metadata_id=1, ref_value=text)
    result = gpu_training.of_profile(space.SerializeToString(), steps=2)
    assert result == {
        **{"host_to_device_bytes": 200.0, "device_to_host_bytes": 32.0},
        **{"idle_share": pytest.approx(0.3), "ms": 0.005},
    }
    del space.planes[1]
    assert gpu_training.of_profile(space.SerializeToString(), steps=2) is None
