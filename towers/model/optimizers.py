"""The optimizers by name: Adam with coupled L2 on whole tables, others of the rows of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import tensorflow as tf

from pipeline.contract.settings import require
from towers.legacy_keras import tf_keras


class CoupledOptimizer(tf_keras.optimizers.Optimizer):
    """A Keras optimizer with coupled L2: l2 · θ is added to the gradient before anything else.

    The `weight_decay` of Keras is another thing: it shrinks θ without passing through the moments.
    Its default is 0, for which Keras takes five passes over every table at every step; here it is
    None, for which it does nothing.

    Args:
      learning_rate: a number or a schedule of `tf_keras.optimizers.schedules`.
      l2: the coefficient, at least 0.
      name: of the optimizer; that of its class by default.
    """

    arguments: tuple[str, ...] = ("l2",)  # that `get_config` takes from attributes
    copies: int  # of the weights that an update has in memory, at most: θ, its state, gradients

    def __init__(self, learning_rate: Any, l2: float, *, name: str = "", **kwargs: Any) -> None:
        if l2 < 0:
            raise ValueError(f"l2 must be at least 0, got {l2}.")
        # XLA would write a new table for every one that changes; the kernels work in place.
        settings = {"weight_decay": None, "jit_compile": False} | kwargs
        super().__init__(name=name or type(self).__name__, **settings)
        self._learning_rate = self._build_learning_rate(learning_rate)
        self.l2 = l2

    def build(self, var_list: Iterable[tf.Variable]) -> None:
        super().build(var_list)
        if not getattr(self, "_built", False):
            self._built = True
            self.make_states(list(var_list))

    def make_states(self, variables: list[tf.Variable]) -> None:
        """Makes what the rule remembers of each variable."""
        raise NotImplementedError

    def get_config(self) -> dict[str, Any]:
        rate = {"learning_rate": self._serialize_hyperparameter(self._learning_rate)}
        return super().get_config() | rate | {name: getattr(self, name) for name in self.arguments}


class _Adam(CoupledOptimizer):
    """An optimizer with the arguments of Adam."""

    arguments = ("l2", "beta_1", "beta_2", "epsilon")

    def __init__(
        self,
        learning_rate: Any = 0.01,
        l2: float = 0.0,
        *,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate, l2, **kwargs)
        self.beta_1, self.beta_2, self.epsilon = beta_1, beta_2, epsilon


class CoupledAdam(_Adam):
    """Adam whose gradient gets l2 · θ at every row of every table, in the batch or not.

    Kingma and Ba, ICLR 2015, arXiv 1412.6980, Algorithm 1, on g = gradient + l2 · θ:
        m = β₁ m + (1 - β₁) g        v = β₂ v + (1 - β₂) g²
        θ = θ - learning_rate · (m / (1 - β₁ᵗ)) / (sqrt(v / (1 - β₂ᵗ)) + ε)

    A sparse gradient becomes a table of its own, since all rows move: where l2 is 0 it is filled
    with zeros, else with l2 · θ, and the rows of the batch are added in place. One kernel then
    takes a pass over θ, m, v and that table; memory bandwidth is what limits it.

    Args: those of `CoupledOptimizer`, and beta_1, beta_2, epsilon: β₁, β₂ and ε.
    """

    copies = 5

    def make_states(self, variables: list[tf.Variable]) -> None:
        self._first = [self.add_variable_from_reference(var, "m") for var in variables]
        self._second = [self.add_variable_from_reference(var, "v") for var in variables]

    def update_step(self, gradient: Any, variable: tf.Variable) -> None:
        place = self._index_dict[self._var_key(variable)]
        step = tf.cast(self.iterations + 1, variable.dtype)
        beta_2_power = tf.pow(self.beta_2, step)
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=self._first[place].handle,
            v=self._second[place].handle,
            beta1_power=tf.pow(self.beta_1, step),
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
        if not isinstance(gradient, tf.IndexedSlices):
            return gradient + self.l2 * variable if self.l2 else gradient
        values, ids = gradient.values, gradient.indices
        if not self.l2:
            return tf.math.unsorted_segment_sum(values, ids, variable.shape[0])
        decay = self.l2 * variable  # a new tensor, which nothing else reads
        # On a CPU rows are added one after the other, so that a repeated one is added up.
        return tf.raw_ops.InplaceAdd(x=decay, i=tf.cast(ids, tf.int32), v=values)


class SparseOptimizer(CoupledOptimizer):
    """Base: a rule for rows, applied to those that have a gradient, so that a table may be huge.

    A row that is not in the batch keeps its value and its state to the last bit, and costs
    nothing. The coupled L2 is l2 · θ of the rows of the batch: a row feels it as often as it is
    trained on. A variable whose gradient is dense is updated as a whole by the same rule.
    """

    def make_states(self, variables: list[tf.Variable]) -> None:
        self._states = [self.make_state(variable) for variable in variables]

    def make_state(self, variable: tf.Variable) -> list[tf.Variable]:
        """What is remembered of a variable: tables with its number of rows."""
        raise NotImplementedError

    def rule(self, gradient: tf.Tensor, *rows: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """The new rows of θ and of each table of `make_state`; `gradient` [n, ...] has l2 · θ."""
        raise NotImplementedError

    def update_step(self, gradient: Any, variable: tf.Variable) -> None:
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


class LazyAdam(SparseOptimizer, _Adam):
    """Adam of the rows of the batch, each with a step count of its own.

    Kingma and Ba, ICLR 2015, arXiv 1412.6980, Algorithm 1, where t is the number of batches that
    had the row: a row is updated as if the batches without it had not been. Its first update is
    one learning rate, as in Adam, also late in training; with one t for all rows, the correction
    of m and v would be over by then, and the first updates of a rare row up to
    (1 - β₁) / sqrt(1 - β₂) = 3.2 times as long. Of rows that are in every batch it is Adam.

    Args: those of `CoupledAdam`.
    """

    copies = 4

    def make_state(self, variable: tf.Variable) -> list[tf.Variable]:
        """m, v and t, of which t has one number a row."""
        moments = [self.add_variable_from_reference(variable, name) for name in ("m", "v")]
        count = _number_by_row(variable)
        return [*moments, self.add_variable_from_reference(variable, "t", shape=count)]

    def rule(self, gradient: tf.Tensor, *rows: tf.Tensor) -> tuple[tf.Tensor, ...]:
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

    Args: those of `CoupledOptimizer`, initial_accumulator: a at the start, and epsilon: ε.
    """

    arguments = ("l2", "initial_accumulator", "epsilon")
    copies = 3
    by_row = False

    def __init__(
        self,
        learning_rate: Any = 0.1,
        l2: float = 0.0,
        *,
        initial_accumulator: float = 0.1,
        epsilon: float = 1e-7,
        **kwargs: Any,
    ) -> None:
        if initial_accumulator < 0:
            raise ValueError(f"initial_accumulator must be at least 0, got {initial_accumulator}.")
        super().__init__(learning_rate, l2, **kwargs)
        self.initial_accumulator, self.epsilon = initial_accumulator, epsilon

    def make_state(self, variable: tf.Variable) -> list[tf.Variable]:
        shape = _number_by_row(variable) if self.by_row else list(variable.shape)
        start = tf.fill(shape, tf.cast(self.initial_accumulator, variable.dtype))
        return [self.add_variable_from_reference(variable, "a", shape, start)]

    def rule(self, gradient: tf.Tensor, *rows: tf.Tensor) -> tuple[tf.Tensor, ...]:
        theta, a = rows
        added = tf.square(gradient)
        if self.by_row:
            added = tf.reduce_mean(added, list(range(1, len(added.shape))), keepdims=True)
        a = a + added
        rate = tf.cast(self.learning_rate, gradient.dtype)
        return theta - rate * gradient / (tf.sqrt(a) + self.epsilon), a


class RowwiseAdagrad(SparseAdagrad):
    """Adagrad with one number of state a row: a = a + mean(g²) over the numbers of the row.

    >>> import tensorflow as tf
    >>> table, optimizer = tf.Variable(tf.ones([1000, 64])), RowwiseAdagrad(0.1)
    >>> optimizer.build([table])
    >>> optimizer.variables[-1].shape
    TensorShape([1000, 1])

    FBGEMM calls it EXACT_ROWWISE_ADAGRAD. A table of V rows and D numbers takes 4 V (D + 1) bytes
    with its state. The numbers of a row share their rate.

    Args: those of `SparseAdagrad`.
    """

    copies = 2
    by_row = True


def _number_by_row(variable: tf.Variable) -> list[int]:
    """The shape of a state of one number for each row, to multiply rows with."""
    return [*variable.shape[:1], *(1 for _ in variable.shape[1:])]


OPTIMIZERS: dict[str, Callable[..., CoupledOptimizer]] = {
    "adam": CoupledAdam,
    "lazy_adam": LazyAdam,
    "adagrad": SparseAdagrad,
    "rowwise_adagrad": RowwiseAdagrad,
}


def make_optimizer(name: str, learning_rate: Any, l2: float) -> CoupledOptimizer:
    """The optimizer of a name in `OPTIMIZERS`; a ValueError for other names."""
    known = ", ".join(OPTIMIZERS)
    require(name in OPTIMIZERS, "optimizer", f"must be one of {known}", name)
    return OPTIMIZERS[name](learning_rate, l2)


def staircase_decay(
    learning_rate: float, decay: float, *, decay_epochs: int, steps_per_epoch: int
) -> Any:
    """learning_rate · decay^floor(epoch / decay_epochs), as a Keras schedule."""
    return tf_keras.optimizers.schedules.ExponentialDecay(
        learning_rate, decay_steps=decay_epochs * steps_per_epoch, decay_rate=decay, staircase=True
    )
