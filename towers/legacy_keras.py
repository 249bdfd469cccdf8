"""The one place where Keras and TensorFlow Recommenders are loaded.

TensorFlow Recommenders works with Keras 2 alone, which `tf.keras` is only where
TF_USE_LEGACY_KERAS=1 was set before its first use, as the package `towers` does. Other modules
import `tf_keras` and `tfrs` from here.
"""

from __future__ import annotations

import tensorflow as tf
import tf_keras

if tf.keras.Model is not tf_keras.Model:
    raise ImportError(
        "Keras 3 is already loaded as tf.keras, but TensorFlow Recommenders needs Keras 2: "
        "import towers before the first use of tf.keras, or set TF_USE_LEGACY_KERAS=1."
    )

import tensorflow_recommenders as tfrs

# What a GPU rounds the factors of products to by default; `--precision tf32` trains with it.
tf.config.experimental.enable_tensor_float_32_execution(False)

__all__ = ["tf_keras", "tfrs"]
