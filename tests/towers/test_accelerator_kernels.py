"""Every op of every method's training step has a kernel on an accelerator, for its types.

There is no accelerator here; TensorFlow lists the kernels it was built with all the same. What
XLA compiles needs XLA_GPU_JIT, the rest GPU (or DEFAULT, which every device has).
"""

import collections

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from tensorflow.python.framework import kernels

import samplers
from towers.dataframe import from_dataframe
from towers.optimizers import OPTIMIZERS, make_optimizer
from towers.two_tower import TwoTower

# Of the graph itself: the runtime handles them on every device.
STRUCTURAL = {"Placeholder", "NoOp", "_Arg", "_Retval"}


@pytest.fixture(scope="module", autouse=True)
def _xla():
    """XLA registers a part of its kernels when it compiles for the first time."""
    tf.function(lambda x: x + 1, jit_compile=True)(1)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"u": rng.integers(0, 30, 400), "i": rng.integers(0, 40, 400)})
    return from_dataframe(frame, user="u", item="i", train_ratio=1.0)


def nodes_of(concrete):
    """(node, is compiled) of a concrete function and of all functions that it calls."""
    graph = concrete.graph.as_graph_def()
    library = {function.signature.name: function for function in graph.library.function}
    todo, done = [(graph.node, False)], set()
    while todo:
        nodes, compiled = todo.pop()
        for node in nodes:
            yield node, compiled
            for attribute in node.attr.values():
                called = [attribute.func.name, *(f.name for f in attribute.list.func)]
                for name in filter(None, called):
                    function = library[name]
                    inside = compiled or function.attr["_XlaMustCompile"].b
                    if (name, inside) not in done:
                        done.add((name, inside))
                        todo.append((function.node_def, inside))


def types_in(attribute):
    """The data types that an attribute holds: one, or a list."""
    return list(attribute.list.type) or [attribute.type][: int(attribute.type != 0)]


def fits(kernel, node):
    """Whether a kernel takes the types of a node."""
    for constraint in kernel.constraint:
        allowed = set(constraint.allowed_values.list.type)
        if allowed and not set(types_in(node.attr[constraint.name])) <= allowed:
            return False
    return True


def missing(concrete):
    """op → types, for the nodes without a kernel on an accelerator."""
    lacking = collections.defaultdict(set)
    for node, compiled in nodes_of(concrete):
        if node.op in STRUCTURAL:
            continue
        devices = {"XLA_GPU_JIT"} if compiled else {"GPU", "DEFAULT"}
        found = kernels.get_registered_kernels_for_op(node.op).kernel
        if not any(k.device_type in devices and fits(k, node) for k in found):
            types = {tf.as_dtype(t).name for a in node.attr.values() for t in types_in(a)}
            lacking[f"{node.op}{' in XLA' if compiled else ''}"] |= types
    return dict(lacking)


def step_of(data, method, optimizer="adam", **options):
    model = TwoTower(data, dim=8, method=method, jit_compile=True, **options)
    model.compile(optimizer=make_optimizer(optimizer, 0.01, 1e-5))
    model.optimizer.build(model.trainable_variables)
    spec = tf.TensorSpec([None], tf.int64)
    return tf.function(model.train_step).get_concrete_function(
        {"query_id": spec, "candidate_id": spec}
    )


@pytest.mark.parametrize("method", sorted(samplers.METHODS))
def test_every_op_has_a_kernel_on_an_accelerator(data, method):
    concrete = step_of(data, method)
    compiled = {node.op for node, inside in nodes_of(concrete) if inside}
    assert "MatMul" in compiled or "BatchMatMulV2" in compiled or "Sum" in compiled
    assert missing(concrete) == {}


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_every_op_of_an_optimizer_has_one(data, optimizer):
    assert missing(step_of(data, "ssl_pop", optimizer)) == {}


@pytest.mark.parametrize(
    "settings",
    [
        {"tower": "gmf"},
        {"tower": "light_gcn"},
        {"tower": "ngcf"},
        {
            "tower": "features",
            "query_inputs": ("id", "history"),
            "candidate_inputs": ("id",),
            "history_pooling": "attention",
        },
    ],
    ids=["gmf", "light_gcn", "ngcf", "features"],
)
def test_every_op_of_every_tower_has_a_kernel_on_an_accelerator(data, settings):
    assert missing(step_of(data, "dns", **settings)) == {}


def test_the_audit_finds_an_op_that_has_none():
    @tf.function(jit_compile=True)
    def compiled(x):
        return tf.raw_ops.UniqueWithCounts(x=x).y

    @tf.function
    def step(text, numbers):
        return tf.strings.to_hash_bucket_fast(text, 7), compiled(numbers)

    concrete = step.get_concrete_function(
        tf.TensorSpec([None], tf.string), tf.TensorSpec([None], tf.int64)
    )
    assert set(missing(concrete)) >= {"StringToHashBucketFast", "UniqueWithCounts in XLA"}
