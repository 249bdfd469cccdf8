"""What all optimizers of the towers have in common."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import tensorflow as tf

from towers.legacy_keras import tf_keras


class CoupledOptimizer(tf_keras.optimizers.Optimizer):
    """A Keras optimizer with coupled L2: l2 · θ is added to the gradient before anything else.

    The `weight_decay` of Keras is another thing: it shrinks θ without passing through the moments.
    Its default is 0, for which Keras takes five passes over every table at every step; here it is
    None, for which it does nothing.

    Args:
      name: of the optimizer.
      learning_rate: a number or a schedule of `tf_keras.optimizers.schedules`.
      l2: the coefficient, at least 0.
    """

    def __init__(self, name: str, learning_rate: Any, l2: float, **kwargs: Any) -> None:
        if l2 < 0:
            raise ValueError(f"l2 must be at least 0, got {l2}.")
        # XLA would write a new table for every one that changes; the kernels work in place.
        super().__init__(name=name, **({"weight_decay": None, "jit_compile": False} | kwargs))
        self._learning_rate = self._build_learning_rate(learning_rate)
        self.l2 = l2

    def build(self, var_list: Iterable[tf.Variable]) -> None:
        """Makes the state of each variable, once."""
        super().build(var_list)
        if not getattr(self, "_built", False):
            self._built = True
            self.make_states(list(var_list))

    def make_states(self, variables: list[tf.Variable]) -> None:
        """Makes what the rule remembers of each variable."""
        raise NotImplementedError

    def get_config(self) -> dict[str, Any]:
        """The arguments, for `from_config`."""
        return super().get_config() | {
            "learning_rate": self._serialize_hyperparameter(self._learning_rate),
            "l2": self.l2,
        }


class AdamArguments(CoupledOptimizer):
    """An optimizer with the arguments of Adam.

    Args:
      learning_rate: a number or a schedule of `tf_keras.optimizers.schedules`.
      l2: the coefficient, at least 0.
      beta_1, beta_2, epsilon: β₁, β₂ and ε.
      name: of the optimizer; that of its class by default.
    """

    def __init__(
        self,
        learning_rate: Any = 0.01,
        l2: float = 0.0,
        *,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        name: str = "",
        **kwargs: Any,
    ) -> None:
        super().__init__(name or type(self).__name__, learning_rate, l2, **kwargs)
        self.beta_1, self.beta_2, self.epsilon = beta_1, beta_2, epsilon

    def get_config(self) -> dict[str, Any]:
        """The arguments, for `from_config`."""
        return super().get_config() | {
            "beta_1": self.beta_1,
            "beta_2": self.beta_2,
            "epsilon": self.epsilon,
        }
