"""TensorFloat-32, to which a GPU rounds the factors of float32 products: 10 bits of mantissa.

TensorFlow has it on. Here it is off, so that scores are compared as they are, but for the steps
of a training run with `--precision tf32` or `bfloat16`. Embeddings of bfloat16 have 7 bits, so that
it rounds nothing of them, and their products are added up in float32.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from towers.legacy_keras import tf_keras


class TensorFloat32(tf_keras.callbacks.Callback):
    """On while the steps of an epoch run, off for the callbacks that follow it in the list."""

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """The steps of an epoch begin."""
        tf.config.experimental.enable_tensor_float_32_execution(True)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """The steps of an epoch are done."""
        tf.config.experimental.enable_tensor_float_32_execution(False)
