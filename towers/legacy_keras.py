"""The one place where Keras 2 and TensorFlow Recommenders are loaded.

TensorFlow Recommenders works with Keras 2 alone, which `tf.keras` is where TF_USE_LEGACY_KERAS=1
was set before its first use. Looking up `tfrs` here sets it; `tf_keras` does without. Keras 3 may
be in the same process, as `keras`.

>>> from towers.legacy_keras import tf_keras, tfrs
>>> issubclass(tfrs.Model, tf_keras.Model)
True
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

import tensorflow as tf
import tf_keras

if TYPE_CHECKING:
    import tensorflow_recommenders as tfrs

# What a GPU rounds the factors of products to by default; `--precision tf32` trains with it.
tf.config.experimental.enable_tensor_float_32_execution(False)

__all__ = ["tf_keras", "tfrs"]


def __getattr__(name: str) -> Any:
    if name != "tfrs":
        raise AttributeError(f"module 'towers.legacy_keras' has no attribute {name!r}")
    os.environ["TF_USE_LEGACY_KERAS"] = "1"  # read when tf.keras is first used
    if tf.keras.Model is not tf_keras.Model:
        raise ImportError(
            "tf.keras is Keras 3 in this process, and TensorFlow Recommenders needs Keras 2: "
            "write `import keras` for Keras 3, not tf.keras, or set TF_USE_LEGACY_KERAS=1 first."
        )
    return importlib.import_module("tensorflow_recommenders")
