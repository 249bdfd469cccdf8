"""The optimizers by name: Adam with coupled L2 on whole tables, and the sparse ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from towers.legacy_keras import tf_keras
from towers.model.gradients import dense_gradient
from towers.model.optimizer_base import AdamArguments, CoupledOptimizer
from towers.model.sparse_optimizers import LazyAdam, SparseAdagrad


class CoupledAdam(AdamArguments):
    """Adam whose gradient gets l2 · θ at every row of every table, in the batch or not.

    Kingma and Ba, ICLR 2015, arXiv 1412.6980, Algorithm 1, on g = gradient + l2 · θ:
        m = β₁ m + (1 - β₁) g        v = β₂ v + (1 - β₂) g²
        θ = θ - learning_rate · (m / (1 - β₁ᵗ)) / (sqrt(v / (1 - β₂ᵗ)) + ε)

    A sparse gradient becomes a table of its own, since all rows move: where l2 is 0 it is filled
    with zeros, else with l2 · θ, and the rows of the batch are added in place. One kernel then
    takes a pass over θ, m, v and that table; memory bandwidth is what limits it.

    Args:
      learning_rate: a number or a schedule of `tf_keras.optimizers.schedules`.
      l2: the coefficient, at least 0.
      beta_1, beta_2, epsilon: β₁, β₂ and ε.
    """

    def make_states(self, variables: list[tf.Variable]) -> None:
        """The moments of each variable."""
        self._first = [self.add_variable_from_reference(var, "m") for var in variables]
        self._second = [self.add_variable_from_reference(var, "v") for var in variables]

    def update_step(self, gradient: Any, variable: tf.Variable) -> None:
        """One update of one variable and its moments, in place."""
        place = self._index_dict[self._var_key(variable)]
        step = tf.cast(self.iterations + 1, variable.dtype)
        beta_1_power, beta_2_power = tf.pow(self.beta_1, step), tf.pow(self.beta_2, step)
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=self._first[place].handle,
            v=self._second[place].handle,
            beta1_power=beta_1_power,
            beta2_power=beta_2_power,
            lr=tf.cast(self.learning_rate, variable.dtype),
            beta1=self.beta_1,
            beta2=self.beta_2,
            # The kernel adds its epsilon to sqrt(v), Algorithm 1 to sqrt(v / (1 - β₂ᵗ)).
            epsilon=self.epsilon * tf.sqrt(1 - beta_2_power),
            grad=self._coupled(gradient, variable),
        )

    def _deduplicate_sparse_grad(self, grads: list[Any]) -> list[Any]:
        """Leaves repeated rows to `_coupled`, unless they would race with each other there."""
        races = self.l2 and tf.config.list_physical_devices("GPU")
        return super()._deduplicate_sparse_grad(grads) if races else grads

    def _coupled(self, gradient: Any, variable: tf.Variable) -> tf.Tensor:
        """gradient + l2 · θ as one tensor of the shape of θ."""
        if not self.l2:
            return dense_gradient(gradient)
        decay = self.l2 * variable  # a new tensor, which nothing else reads
        if not isinstance(gradient, tf.IndexedSlices):
            return gradient + decay
        # On a CPU rows are added one after the other, so that a repeated one is added up.
        ids = tf.cast(gradient.indices, tf.int32)
        return tf.raw_ops.InplaceAdd(x=decay, i=ids, v=gradient.values)


OPTIMIZERS: dict[str, Callable[[Any, float], CoupledOptimizer]] = {
    "adam": CoupledAdam,
    "lazy_adam": LazyAdam,
    "adagrad": SparseAdagrad,
}


def make_optimizer(name: str, learning_rate: Any, l2: float) -> CoupledOptimizer:
    """The optimizer of a name in `OPTIMIZERS`.

    Raises:
      ValueError: there is none of that name.
    """
    if name not in OPTIMIZERS:
        raise ValueError(
            f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {name!r}; change --optimizer."
        )
    return OPTIMIZERS[name](learning_rate, l2)


def staircase_decay(
    learning_rate: float, decay: float, *, decay_epochs: int, steps_per_epoch: int
) -> Any:
    """learning_rate · decay^floor(epoch / decay_epochs), as a Keras schedule."""
    return tf_keras.optimizers.schedules.ExponentialDecay(
        learning_rate, decay_steps=decay_epochs * steps_per_epoch, decay_rate=decay, staircase=True
    )
