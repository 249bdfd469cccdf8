"""A SavedModel that waits: it makes slow requests without any test depending on time."""

import threading
from pathlib import Path

import numpy as np
import tensorflow as tf


class GatedModel(tf.Module):
    """serving_default: x float32 [B] → y = x, once the gate is open.

    It answers in the process alone that made it. The graph is saved with a token of this Python
    object, so the object must live as long as the model is served.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()
        self.arrived = threading.Semaphore(0)  # one release for each batch that has come

    def pass_gate(self, x: np.ndarray) -> np.ndarray:
        self.arrived.release()
        assert self.gate.wait(60)
        return x

    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, "x")])
    def answer(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        y = tf.numpy_function(self.pass_gate, [x], tf.float32)
        return {"y": tf.ensure_shape(y, [None])}

    def save(self, path: Path) -> None:
        tf.saved_model.save(self, str(path), signatures={"serving_default": self.answer})

    def close_gate(self) -> None:
        """Forgets who came before, the warm-up among them."""
        self.gate.clear()
        while self.arrived.acquire(blocking=False):
            pass
