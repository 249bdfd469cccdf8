import numpy as np
import pytest
import tensorflow as tf

from towers.model.optimizers import (
    OPTIMIZERS,
    CoupledAdam,
    LazyAdam,
    RowwiseAdagrad,
    SparseAdagrad,
    make_optimizer,
    staircase_decay,
)

ROWS, DIM = 11, 3
SPARSE = ["lazy_adam", "adagrad", "rowwise_adagrad"]


def sparse_steps(seed, steps=25):
    """A table and gradients of a few rows a step, some twice; the last two rows never."""
    rng = np.random.default_rng(seed)
    theta = rng.normal(size=(ROWS, DIM)).astype(np.float32)
    ids = rng.integers(0, ROWS - 2, (steps, 5))
    return theta, ids, rng.normal(size=(steps, 5, DIM)).astype(np.float32)


def slices(ids, values):
    return tf.IndexedSlices(tf.constant(values), tf.constant(ids), [ROWS, DIM])


def lazy_adam_of_a_row(theta, state, g, rate):
    """Algorithm 1 of the paper, by a state of this row alone."""
    m, v, t = state or (0.0, 0.0, 0)
    m, v, t = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g, t + 1
    step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return theta - rate * step, (m, v, t)


def adagrad_of_a_row(theta, state, g, rate):
    a = (0.1 if state is None else state) + g * g
    return theta - rate * g / (np.sqrt(a) + 1e-7), a


def rowwise_adagrad_of_a_row(theta, state, g, rate):
    a = (0.1 if state is None else state) + sum(x * x for x in g) / len(g)
    return theta - rate * g / (np.sqrt(a) + 1e-7), a


def reference(theta, ids, values, rule, rate, l2):
    """Row by row in float64: what repeats is summed, what is not in the batch is left alone."""
    theta, states = theta.astype(np.float64), {}
    for step, (batch, gradients) in enumerate(zip(ids, values, strict=True)):
        for row in set(batch.tolist()):
            g = gradients[batch == row].astype(np.float64).sum(axis=0) + l2 * theta[row]
            theta[row], states[row] = rule(theta[row], states.get(row), g, rate(step))
    return theta


RULES = {
    "lazy_adam": lazy_adam_of_a_row,
    "adagrad": adagrad_of_a_row,
    "rowwise_adagrad": rowwise_adagrad_of_a_row,
}


@pytest.mark.parametrize("l2", [0.0, 0.3])
@pytest.mark.parametrize("name", SPARSE)
def test_equals_the_rule_row_by_row(name, l2):
    theta, ids, values = sparse_steps(0)
    variable, optimizer = tf.Variable(theta), make_optimizer(name, 0.05, l2)
    for batch, gradients in zip(ids, values, strict=True):
        optimizer.apply_gradients([(slices(batch, gradients), variable)])
    expected = reference(theta, ids, values, RULES[name], lambda step: 0.05, l2)
    np.testing.assert_allclose(variable.numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SPARSE)
def test_equals_the_rule_inside_a_function_with_a_schedule(name):
    theta, ids, values = sparse_steps(1)
    schedule = staircase_decay(0.05, 0.5, decay_epochs=2, steps_per_epoch=4)
    variable, optimizer = tf.Variable(theta), make_optimizer(name, schedule, 0.01)
    optimizer.build([variable])

    @tf.function
    def step(batch, gradients):
        optimizer.apply_gradients([(tf.IndexedSlices(gradients, batch, [ROWS, DIM]), variable)])

    for batch, gradients in zip(ids, values, strict=True):
        step(tf.constant(batch), tf.constant(gradients))
    expected = reference(
        theta, ids, values, RULES[name], lambda step: 0.05 * 0.5 ** (step // 8), 0.01
    )
    np.testing.assert_allclose(variable.numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SPARSE)
def test_rows_outside_the_batch_keep_every_bit(name):
    theta, ids, values = sparse_steps(2, steps=6)
    variable, optimizer = tf.Variable(theta), make_optimizer(name, 0.05, 0.3)
    for batch, gradients in zip(ids[:5], values[:5], strict=True):
        optimizer.apply_gradients([(slices(batch, gradients), variable)])
    before = [variable.numpy(), *(state.numpy() for state in optimizer._states[0])]
    optimizer.apply_gradients([(slices(ids[5], values[5]), variable)])
    after = [variable.numpy(), *(state.numpy() for state in optimizer._states[0])]
    outside = np.setdiff1d(np.arange(ROWS), ids[5])
    assert set(ids[:5].ravel()) & set(outside)  # some of them have a state
    for old, new in zip(before, after, strict=True):
        assert old[outside].tobytes() == new[outside].tobytes()
        assert (old[ids[5]] != new[ids[5]]).all()


@pytest.mark.parametrize("shape", [(ROWS, DIM), (DIM,), ()])
def test_of_dense_gradients_lazy_adam_is_adam(shape):
    rng = np.random.default_rng(3)
    theta = rng.normal(size=shape).astype(np.float32)
    ours, theirs = tf.Variable(theta), tf.Variable(theta)
    one, two = LazyAdam(0.05, 0.1), CoupledAdam(0.05, 0.1)
    for _ in range(20):
        gradient = tf.constant(rng.normal(size=shape), tf.float32)
        one.apply_gradients([(gradient, ours)])
        two.apply_gradients([(gradient, theirs)])
    np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(ROWS, DIM), (DIM,), ()])
def test_rowwise_adagrad_of_dense_gradients(shape):
    """A layer's kernel has a number for each of its inputs, a bias one for each number."""
    rng = np.random.default_rng(7)
    expected = rng.normal(size=shape)
    variable, optimizer = tf.Variable(expected, dtype=tf.float32), RowwiseAdagrad(0.05, 0.1)
    state = np.full([*shape[:1], *(1 for _ in shape[1:])], 0.1)
    for _ in range(20):
        gradient = rng.normal(size=shape)
        optimizer.apply_gradients([(tf.constant(gradient, tf.float32), variable)])
        g = gradient + 0.1 * expected
        state = state + (np.mean(g**2, axis=1, keepdims=True) if len(shape) == 2 else g**2)
        expected = expected - 0.05 * g / (np.sqrt(state) + 1e-7)
    np.testing.assert_allclose(variable.numpy(), expected, rtol=1e-5, atol=1e-5)
    assert [state.shape for state in optimizer._states[0]] == [state.shape]


def test_the_first_update_of_a_row_is_one_learning_rate_however_late():
    theta, ids, values = sparse_steps(4)
    variable, optimizer = tf.Variable(theta), LazyAdam(0.01)
    for batch, gradients in zip(ids, values, strict=True):
        optimizer.apply_gradients([(slices(batch, gradients), variable)])
    late = np.array([[2.0, -3.0, 0.1]], np.float32)
    optimizer.apply_gradients([(slices([ROWS - 1], late), variable)])
    moved = variable.numpy()[-1] - theta[-1]
    np.testing.assert_allclose(moved, [-0.01, 0.01, -0.01], rtol=1e-3)


def sizes_in_the_step(optimizer, rows=977):
    """The first dimensions of all that a sparse update computes."""
    variable = tf.Variable(tf.zeros([rows, DIM]))
    optimizer.build([variable])

    @tf.function
    def step(batch, gradients):
        optimizer.apply_gradients([(tf.IndexedSlices(gradients, batch, [rows, DIM]), variable)])

    graph = step.get_concrete_function(
        tf.TensorSpec([None], tf.int64), tf.TensorSpec([None, DIM], tf.float32)
    ).graph
    outputs = [output for node in graph.get_operations() for output in node.outputs]
    return {output.shape[0] for output in outputs if output.shape.rank}


@pytest.mark.parametrize("name", SPARSE)
def test_no_tensor_of_a_step_is_as_large_as_the_table(name):
    assert 977 not in sizes_in_the_step(make_optimizer(name, 0.01, 0.1))
    assert 977 in sizes_in_the_step(CoupledAdam(0.01, 0.1))  # the check can fail


def test_keras_takes_no_pass_for_its_weight_decay():
    for name in OPTIMIZERS:
        optimizer = make_optimizer(name, 0.01, 0.1)
        assert (optimizer.weight_decay, optimizer.jit_compile) == (None, False)
        again = type(optimizer).from_config(optimizer.get_config())
        assert again.get_config() == optimizer.get_config()


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_goes_on_from_a_checkpoint(name, tmp_path):
    theta, ids, values = sparse_steps(5)
    gradients = [slices(batch, value) for batch, value in zip(ids, values, strict=True)]
    whole, optimizer = tf.Variable(theta), make_optimizer(name, 0.05, 0.1)
    for gradient in gradients[:10]:
        optimizer.apply_gradients([(gradient, whole)])
    path = tf.train.Checkpoint(table=whole, optimizer=optimizer).write(str(tmp_path / "c"))
    for gradient in gradients[10:]:
        optimizer.apply_gradients([(gradient, whole)])
    rest, again = tf.Variable(tf.zeros_like(whole)), make_optimizer(name, 0.05, 0.1)
    again.build([rest])
    tf.train.Checkpoint(table=rest, optimizer=again).read(path).assert_consumed()
    for gradient in gradients[10:]:
        again.apply_gradients([(gradient, rest)])
    assert whole.numpy().tobytes() == rest.numpy().tobytes()


def test_wrong_settings_are_errors():
    with pytest.raises(ValueError, match=r"one of adam, .*, rowwise_adagrad, got 'sgd'"):
        make_optimizer("sgd", 0.1, 0.0)
    with pytest.raises(ValueError, match="l2 must be at least 0"):
        LazyAdam(0.1, -1.0)
    with pytest.raises(ValueError, match="initial_accumulator must be at least 0"):
        SparseAdagrad(initial_accumulator=-1.0)
