"""What a training step would do on a GPU: which kernel each op takes, where its tensors lie.

There is no accelerator here, but TensorFlow lists the kernels of GPUs that it was built with, and
which of their arguments lie in the memory of the host. Only shapes, axes and single numbers may be
there: what has a row for each id or each pair of a batch would be copied in every step. A tensor
of int32 that enters a function is always on the host. Steps are traced and never run.
"""

import functools
from collections import Counter

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import tensorflow as tf
from tensorflow.python.framework import kernels, op_def_registry

import samplers
from pipeline.contract.schema import FeatureSpec
from samplers.methods.full_softmax import SoftTargets
from samplers.methods.method import Method
from towers.data.attributes import Features
from towers.data.dataframe import from_dataframe
from towers.model.optimizers import OPTIMIZERS, make_optimizer
from towers.model.two_tower import TwoTower

# The runtime takes calls and conditions apart; what they pass on is looked at.
STRUCTURAL = {"Placeholder", "NoOp", "PartitionedCall", "StatefulPartitionedCall", "Identity"}
STRUCTURAL |= {"If", "StatelessIf", "While", "StatelessWhile"}
# Shapes and axes whose number the trace does not know.
SHAPES = {("BroadcastGradientArgs", name) for name in ("s0", "s1", "r0", "r1")}
SHAPES |= {("Sum", "reduction_indices")}
MAX_ON_HOST = 16  # numbers of a tensor; the tables below have more rows
IDS = tf.TensorSpec([None], tf.int64)
FEATURES = {
    "tower": "features",
    "query_inputs": ("id", "history"),
    "candidate_inputs": ("id", "features"),
    "history_pooling": "attention",
}


@pytest.fixture(scope="module", autouse=True)
def _xla():
    """XLA registers a part of its kernels when it compiles for the first time."""
    tf.function(lambda x: x + 1, jit_compile=True)(1)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"u": rng.integers(0, 30, 400), "i": rng.integers(0, 40, 400)})
    found = from_dataframe(frame, user="u", item="i", train_ratio=1.0)
    attributes = {"query": Features(), "candidate": attributes_of(found.num_candidates)}
    found.features = attributes.get
    return found


def attributes_of(size):
    """One column of each kind."""
    table = pa.table(
        {
            "brand": pa.array(np.arange(size) % 5),
            "tags": pa.array([[1, 2]] * size),
            "title": pa.array(["green tea"] * size),
            "price": pa.array(np.ones(size)),
        }
    )
    specs = (
        FeatureSpec("brand", "categorical", size=5),
        FeatureSpec("tags", "multi", size=5, max_length=3),
        FeatureSpec("title", "text"),
        FeatureSpec("price", "numeric"),
    )
    cold = table.slice(0, 0).append_column("raw_id", pa.array([], pa.string()))
    return Features(specs, table, cold)


def taught(data):
    """Targets for every query."""
    ids = np.zeros((data.num_queries, 5), int)
    chosen = data.positives("train")
    return SoftTargets(ids, np.ones(ids.shape, "f"), chosen.candidate_ids, chosen.offsets)


def ops_of(concrete):
    """(operation, is compiled) of a concrete function and of all functions that it calls."""
    todo, done = [(concrete.graph, False)], set()
    while todo:
        graph, compiled = todo.pop()
        for op in graph.get_operations():
            yield op, compiled
            for attribute in op.node_def.attr.values():
                called = [attribute.func.name, *(f.name for f in attribute.list.func)]
                for name in filter(None, called):
                    function = graph._get_function(name)
                    inside = compiled or function.definition.attr["_XlaMustCompile"].b
                    if (name, inside) not in done:
                        done.add((name, inside))
                        todo.append((function.graph, inside))


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


@functools.cache
def kernels_of(op_type):
    return list(kernels.get_registered_kernels_for_op(op_type).kernel)


def kernel_of(op, devices):
    """The kernel that the op would run by, on the first of some devices that has one."""
    fitting = {k.device_type: k for k in kernels_of(op.type) if fits(k, op.node_def)}
    return next((fitting[device] for device in devices if device in fitting), None)


def arguments(op):
    """(name in the definition of the op, tensor) of all inputs and outputs."""
    definition = op_def_registry.get(op.type)
    for tensors, names in ((op.inputs, definition.input_arg), (op.outputs, definition.output_arg)):
        rest = list(tensors)
        for argument in names:
            count = 1
            if argument.number_attr:
                count = op.node_def.attr[argument.number_attr].i
            elif argument.type_list_attr:
                count = len(op.node_def.attr[argument.type_list_attr].list.type)
            yield from ((argument.name, tensor) for tensor in rest[:count])
            rest = rest[count:]


def is_large(tensor):
    if tensor.dtype in (tf.resource, tf.variant) or tensor.shape.rank == 0:
        return False
    size = tensor.shape.num_elements()
    return size is None or size > MAX_ON_HOST


def faults(concrete):
    """What would keep a step from staying on a GPU, counted."""
    given = [*concrete.captured_inputs, *concrete.variables]
    found = Counter(f"int32 table {x.shape}" for x in given if x.dtype == tf.int32 and is_large(x))
    for op, compiled in ops_of(concrete):
        types = [tensor.dtype.name for tensor in op.inputs]
        if op.type in STRUCTURAL:
            # The condition of a loop has one without a shape for what the body alone reads.
            unread = "redundant_placeholder" in op.name
            passed = [] if compiled or unread else [*op.inputs, *op.outputs]
            on_host = [("", tensor) for tensor in passed if tensor.dtype == tf.int32]
        elif compiled:
            on_host = []
            if kernel_of(op, ["XLA_GPU_JIT"]) is None:
                found[f"{op.type} {types} in XLA"] += 1
        else:
            kernel = kernel_of(op, ["GPU", "DEFAULT"])
            if kernel is None:
                found[f"{op.type} {types} has no kernel"] += 1
                continue
            host = set(kernel.host_memory_arg)
            on_host = [(name, tensor) for name, tensor in arguments(op) if name in host]
        found.update(
            f"{op.type} {op.name} waits for its seed"
            for name, tensor in on_host
            if name == "seed" and "CPU" not in tensor.op.device and tensor.op.type != "Placeholder"
        )
        found.update(
            f"{op.type} {op.name} has {name or 'int32'} {tensor.shape} on the host"
            for name, tensor in on_host
            if is_large(tensor) and (op.type, name) not in SHAPES
        )
    return found


def make_model(data, method, optimizer="adam", **options):
    model = TwoTower(data, dim=8, method=method, jit_compile=True, **options)
    model.compile(optimizer=make_optimizer(optimizer, 0.01, 1e-5))
    model.optimizer.build(model.trainable_variables)
    return model


def traced(step, batch=None):
    ids = tf.TensorSpec([batch], tf.int64)
    return tf.function(step).get_concrete_function({"query_id": ids, "candidate_id": ids})


LONG = pytest.mark.long
QUICK = ("ssl_pop", "xir", "dns_mn")  # negatives of the batch, of a cache, and drawn


@pytest.mark.parametrize(
    "method",
    [pytest.param(name, marks=() if name in QUICK else LONG) for name in sorted(samplers.METHODS)],
)
def test_a_step_of_every_method_stays_on_a_gpu(data, method):
    model = make_model(data, method)
    concrete = traced(model.train_step)
    compiled = {op.type for op, inside in ops_of(concrete) if inside}
    assert compiled & {"MatMul", "BatchMatMulV2", "Sum"}
    assert faults(concrete) == {}
    checked = [op.inputs[0] for op, _ in ops_of(concrete) if op.type == "CheckNumerics"]
    assert len(checked) == 2  # the host reads a number for the loss, one for all gradients
    assert all(tensor.shape.rank == 0 for tensor in checked)
    if type(model.method).end_epoch is not Method.end_epoch:
        assert faults(tf.function(model.end_epoch).get_concrete_function()) == {}


@LONG
def test_a_step_towards_a_teacher_stays_on_a_gpu(data):
    model = make_model(data, "full_softmax", targets=taught(data))
    assert faults(traced(model.train_step)) == {}


@pytest.mark.parametrize(
    "method", [pytest.param(n, marks=LONG) for n in ("ssl_pop", "mns", "adasir_w")]
)
def test_a_step_that_leaves_out_what_was_seen_stays_on_a_gpu(data, method):
    model = make_model(data, method, exclude_seen_negatives=True)
    assert faults(traced(model.train_step)) == {}


@pytest.mark.parametrize("optimizer", sorted(set(OPTIMIZERS) - {"adam"}))
def test_every_optimizer_stays_on_a_gpu(data, optimizer):
    assert faults(traced(make_model(data, "ssl_pop", optimizer).train_step)) == {}


@pytest.mark.parametrize(
    "settings",
    [
        {"tower": "fism"},
        *(pytest.param({"tower": n}, marks=LONG) for n in ("gmf", "light_gcn", "ngcf", "svdpp")),
        pytest.param(FEATURES, marks=LONG),
    ],
    ids=lambda settings: settings["tower"],
)
def test_every_tower_stays_on_a_gpu(data, settings):
    model = make_model(data, "dns", **settings)
    assert faults(traced(model.train_step)) == {}
    for embed in (model.query_embeddings, model.candidate_embeddings):
        assert faults(tf.function(embed).get_concrete_function(IDS)) == {}


@pytest.mark.parametrize(
    "method",
    [
        "ssl_pop",
        *(pytest.param(n, marks=LONG) for n in ("xir", "bmns", "bpr", "adasir_w", "softmax_v")),
    ],
)
def test_xla_lowers_every_loss_for_a_gpu(data, method):
    model, calls = make_model(data, method), []
    differentiate = model._differentiate
    model._differentiate = lambda *inputs: calls.append(inputs) or differentiate(*inputs)
    traced(model.train_step, batch=64)
    inputs = tf.nest.flatten(calls[0])
    places = [place for place, value in enumerate(inputs) if tf.is_tensor(value)]

    @tf.function(jit_compile=True)
    def loss(*tensors):
        given = dict(enumerate(inputs)) | dict(zip(places, tensors, strict=True))
        packed = tf.nest.pack_sequence_as(calls[0], list(given.values()))
        return [x for x in tf.nest.flatten(model._loss_and_gradients(*packed)) if x is not None]

    specs = [tf.TensorSpec(inputs[place].shape, inputs[place].dtype) for place in places]
    if any(x.dtype == tf.resource for x in loss.get_concrete_function(*specs).captured_inputs):
        pytest.skip("TensorFlow lowers a function of variables on the device alone")
    lowered = loss.experimental_get_compiler_ir(*specs)(stage="hlo", platform_name="GPU")
    products = [line for line in lowered.splitlines() if " dot(" in line]
    assert all("operand_precision={highest,highest}" in line for line in products)  # not TF32
    assert products or " reduce(" in lowered


def test_the_audit_finds_what_does_not_stay():
    table, small = tf.range(100), tf.range(4)

    @tf.function(jit_compile=True)
    def compiled(x):
        return tf.raw_ops.UniqueWithCounts(x=x).y

    @tf.function
    def step(text, ids):
        hashed = tf.strings.to_hash_bucket_fast(text, 7)
        return hashed, compiled(ids), tf.gather(table, ids), tf.gather(small, 0), ids[:, None] + 1

    found = faults(step.get_concrete_function(tf.TensorSpec([None], tf.string), IDS))
    words = " ".join(found)
    assert "int32 table (100,)" in words
    assert "StringToHashBucketFast" in words
    assert "UniqueWithCounts ['int64'] in XLA" in words
    assert "(4,)" not in words

    @tf.function
    def on_host(ids):
        return tf.cast(ids, tf.int32)[:, None]

    assert "StridedSlice" in " ".join(faults(on_host.get_concrete_function(IDS)))

    @tf.function
    def drawn(seed):
        return tf.random.stateless_uniform([3], seed + 1)

    found = faults(drawn.get_concrete_function(tf.TensorSpec([2], tf.int64)))
    assert "waits for its seed" in " ".join(found)
