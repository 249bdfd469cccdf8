"""SavedModels as another framework writes them, small enough to load many of them."""

from pathlib import Path

import tensorflow as tf
from tensorflow_serving.config import model_server_config_pb2

from serving.runtime.configuration import ModelConfig

PAIRS = tf.TensorSpec([None, 2], tf.float32, "x")


class Affine(tf.Module):
    """Signatures, all of x float32 [B, 2].

    serving_default: y = x + amount, [B, 2], and amount, [B].
    total: the sum of all x, a scalar: not by rows, and its shape says so.
    mean: the mean of the rows, [2], of which the graph does not know the shape.
    positive: y = x; a negative x is an error.
    """

    def __init__(self, amount: float) -> None:
        super().__init__()
        self.amount = tf.Variable(amount)

    @tf.function(input_signature=[PAIRS])
    def add(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"y": x + self.amount, "amount": tf.fill(tf.shape(x)[:1], self.amount)}

    @tf.function(input_signature=[PAIRS])
    def total(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"total": tf.reduce_sum(x)}

    @tf.function(input_signature=[PAIRS])
    def mean(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        mean = tf.reduce_mean(x, axis=0)
        return {"mean": tf.compat.v1.placeholder_with_default(mean, shape=None)}

    @tf.function(input_signature=[PAIRS])
    def positive(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        with tf.control_dependencies([tf.debugging.assert_non_negative(x)]):
            return {"y": tf.identity(x)}


def write_affine(path: Path, amount: float) -> Path:
    """Writes one; `amount` tells it from others."""
    model = Affine(amount)
    signatures = {
        "serving_default": model.add,
        "total": model.total,
        "mean": model.mean,
        "positive": model.positive,
    }
    tf.saved_model.save(model, str(path), signatures=signatures)
    return path


def write_config(path: Path, configs: list[ModelConfig]) -> Path:
    """Writes a `model_config_list` that names these models, as an operator does."""
    server = model_server_config_pb2.ModelServerConfig()
    for config in configs:
        model = server.model_config_list.config.add(name=config.name, base_path=config.base_path)
        policy = model.model_version_policy
        if config.specific:
            policy.specific.versions.extend(config.specific)
        elif config.latest:
            policy.latest.num_versions = config.latest
        else:
            policy.all.SetInParent()
        model.version_labels.update(config.labels)
    path.write_text(str(server), encoding="utf-8")
    return path
