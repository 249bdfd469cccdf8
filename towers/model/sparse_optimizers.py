"""Optimizers that touch the rows of a batch and no others, so that the corpus may be huge."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from towers.model.optimizer_base import AdamArguments, CoupledOptimizer


class SparseOptimizer(CoupledOptimizer):
    """Base: a rule for rows, applied to those that have a gradient.

    A row that is not in the batch keeps its value and its state to the last bit, and costs
    nothing. The coupled L2 is l2 · θ of the rows of the batch: a row feels it as often as it is
    trained on. A variable whose gradient is dense is updated as a whole by the same rule.
    """

    def make_states(self, variables: list[tf.Variable]) -> None:
        """The state of each variable."""
        self._states = [self.make_state(variable) for variable in variables]

    def make_state(self, variable: tf.Variable) -> list[tf.Variable]:
        """What is remembered of a variable: tables with its number of rows."""
        raise NotImplementedError

    def rule(self, gradient: tf.Tensor, *rows: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """The new rows of θ and of each table of its state.

        Args:
          gradient: [n, ...], with l2 · θ.
          *rows: of θ [n, ...], and of each table that `make_state` made.
        """
        raise NotImplementedError

    def update_step(self, gradient: Any, variable: tf.Variable) -> None:
        """One update of one variable and its state, in place."""
        tables = [variable, *self._states[self._index_dict[self._var_key(variable)]]]
        if not isinstance(gradient, tf.IndexedSlices):
            new = self.rule(gradient + self.l2 * variable, *tables)
            for table, value in zip(tables, new, strict=True):
                table.assign(value)
            return
        ids = gradient.indices  # each once: Keras has added up repeated ones
        rows = [
            tf.raw_ops.ResourceGather(resource=table.handle, indices=ids, dtype=table.dtype)
            for table in tables
        ]
        new = self.rule(gradient.values + self.l2 * rows[0], *rows)
        for table, value in zip(tables, new, strict=True):
            tf.raw_ops.ResourceScatterUpdate(resource=table.handle, indices=ids, updates=value)


class LazyAdam(SparseOptimizer, AdamArguments):
    """Adam of the rows of the batch, each with a step count of its own.

    Kingma and Ba, ICLR 2015, arXiv 1412.6980, Algorithm 1, where t is the number of batches that
    had the row: a row is updated as if the batches without it had not been. Its first update is
    one learning rate, as in Adam, also late in training; with one t for all rows, the correction
    of m and v would be over by then, and the first updates of a rare row up to
    (1 - β₁) / sqrt(1 - β₂) = 3.2 times as long. Of rows that are in every batch it is Adam.

    Args:
      learning_rate: a number or a schedule of `tf_keras.optimizers.schedules`.
      l2: the coefficient, at least 0; of the rows of the batch.
      beta_1, beta_2, epsilon: β₁, β₂ and ε.
    """

    def make_state(self, variable: tf.Variable) -> list[tf.Variable]:
        """m, v and t; the count of a row is a row of one number, to multiply rows with."""
        count = [*variable.shape[:1], *(1 for _ in variable.shape[1:])]
        return [
            self.add_variable_from_reference(variable, "m"),
            self.add_variable_from_reference(variable, "v"),
            self.add_variable_from_reference(variable, "t", shape=count),
        ]

    def rule(self, gradient: tf.Tensor, *rows: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """θ, m, v, t → the same after one step."""
        theta, m, v, t = rows
        t = t + 1
        m = self.beta_1 * m + (1 - self.beta_1) * gradient
        v = self.beta_2 * v + (1 - self.beta_2) * tf.square(gradient)
        unbiased_m = m / (1 - tf.pow(self.beta_1, t))
        unbiased_v = v / (1 - tf.pow(self.beta_2, t))
        rate = tf.cast(self.learning_rate, gradient.dtype)
        return theta - rate * unbiased_m / (tf.sqrt(unbiased_v) + self.epsilon), m, v, t


class SparseAdagrad(SparseOptimizer):
    """Adagrad: a = a + g², θ = θ - learning_rate · g / (sqrt(a) + ε), with g = gradient + l2 · θ.

    Duchi, Hazan and Singer, JMLR 12 (2011), 2121-2159, with diagonal matrices. A gradient of 0
    changes nothing, so that without L2 the sparse update is the dense one.

    Args:
      learning_rate: a number or a schedule of `tf_keras.optimizers.schedules`.
      l2: the coefficient, at least 0; of the rows of the batch.
      initial_accumulator: a at the start, at least 0.
      epsilon: ε.
    """

    def __init__(
        self,
        learning_rate: Any = 0.1,
        l2: float = 0.0,
        *,
        initial_accumulator: float = 0.1,
        epsilon: float = 1e-7,
        name: str = "SparseAdagrad",
        **kwargs: Any,
    ) -> None:
        if initial_accumulator < 0:
            raise ValueError(f"initial_accumulator must be at least 0, got {initial_accumulator}.")
        super().__init__(name, learning_rate, l2, **kwargs)
        self.initial_accumulator, self.epsilon = initial_accumulator, epsilon

    def make_state(self, variable: tf.Variable) -> list[tf.Variable]:
        """The sum of squares a."""
        start = tf.fill(variable.shape, tf.cast(self.initial_accumulator, variable.dtype))
        return [self.add_variable_from_reference(variable, "a", initial_value=start)]

    def rule(self, gradient: tf.Tensor, *rows: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """θ, a → the same after one step."""
        theta, a = rows
        a = a + tf.square(gradient)
        rate = tf.cast(self.learning_rate, gradient.dtype)
        return theta - rate * gradient / (tf.sqrt(a) + self.epsilon), a

    def get_config(self) -> dict[str, Any]:
        """The arguments, for `from_config`."""
        return super().get_config() | {
            "initial_accumulator": self.initial_accumulator,
            "epsilon": self.epsilon,
        }
