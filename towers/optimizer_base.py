"""What all optimizers of the towers have in common."""

from __future__ import annotations

from typing import Any

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

    def get_config(self) -> dict[str, Any]:
        """The arguments, for `from_config`."""
        return super().get_config() | {
            "learning_rate": self._serialize_hyperparameter(self._learning_rate),
            "l2": self.l2,
        }
