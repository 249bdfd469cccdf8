"""Propagation over the train graph against products of dense matrices in NumPy."""

import numpy as np
import pytest
import tensorflow as tf

from towers.encoders.propagation import BipartiteGraph, LightGcn, Ngcf

Q, N, D = 7, 9, 5
KERNELS = pytest.mark.parametrize("segments", [True, False], ids=["segments", "rows"])


def make_edges(seed=0):
    """Pairs, one of them twice; the last query and the last two candidates have none."""
    rng = np.random.default_rng(seed)
    queries, candidates = rng.integers(0, Q - 1, 20), rng.integers(0, N - 2, 20)
    return np.append(queries, queries[0]), np.append(candidates, candidates[0])


def make_tables(seed=1):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(size, D)).astype(np.float32) for size in (Q, N)]


def adjacency(queries, candidates):
    """D^-1/2 A D^-1/2 of all nodes, queries first: float64 [Q + N, Q + N]."""
    matrix = np.zeros((Q + N, Q + N))
    for query, candidate in zip(queries, candidates, strict=True):
        matrix[query, Q + candidate] = matrix[Q + candidate, query] = 1
    degrees = matrix.sum(1)
    roots = np.array([degree**-0.5 if degree else 0.0 for degree in degrees])
    return roots[:, None] * matrix * roots[None, :]


def light_gcn(matrix, nodes, num_layers):
    layers = [nodes]
    for _ in range(num_layers):
        layers.append(matrix @ layers[-1])
    return np.mean(layers, axis=0)


def ngcf(matrix, nodes, weights):
    own, layers = nodes, [nodes]
    for by_sum, by_product in weights:
        message = (matrix + np.eye(len(matrix))) @ own @ by_sum + (matrix @ own * own) @ by_product
        own = np.where(message > 0, message, 0.2 * message)
        layers.append(own / np.linalg.norm(own, axis=1, keepdims=True))
    return np.concatenate(layers, axis=1)


def weights_of(layer):
    return [
        (getattr(layer, f"sum_kernel_{n}"), getattr(layer, f"product_kernel_{n}"))
        for n in range(layer.num_layers)
    ]


def graph_of(edges, segments):
    return BipartiteGraph(*edges, Q, N, segments=segments)


@KERNELS
def test_messages_are_products_with_the_normalised_adjacency_matrix(segments):
    edges = make_edges()
    matrix, tables = adjacency(*edges), make_tables()
    to_queries, to_candidates = graph_of(edges, segments).messages()
    expected = matrix @ np.concatenate(tables)
    np.testing.assert_allclose(to_queries(tf.constant(tables[1])), expected[:Q], atol=1e-6)
    np.testing.assert_allclose(to_candidates(tf.constant(tables[0])), expected[Q:], atol=1e-6)


@KERNELS
def test_a_message_by_hand(segments):
    """Query 0 chose both candidates, query 1 the second: degrees 2, 1 and 1, 2."""
    graph = BipartiteGraph(np.array([0, 0, 1]), np.array([0, 1, 1]), 2, 2, segments=segments)
    to_queries, _ = graph.messages()
    sums = to_queries(tf.constant([[10.0], [20.0]]))
    half = 0.5**0.5
    np.testing.assert_allclose(sums, [[10 * half + 20 / 2], [20 * half]], rtol=1e-6)


@KERNELS
@pytest.mark.parametrize("num_layers", [1, 3])
def test_light_gcn(segments, num_layers):
    edges, tables = make_edges(), make_tables()
    layer = LightGcn(graph_of(edges, segments), D, num_layers, jit_compile=segments)
    found = layer([tf.constant(table) for table in tables])
    expected = light_gcn(adjacency(*edges), np.concatenate(tables), num_layers)
    assert layer.dim == D
    assert [part.shape for part in found] == [(Q, D), (N, D)]
    np.testing.assert_allclose(np.concatenate(found), expected, atol=1e-6)
    np.testing.assert_allclose(found[0][-1], tables[0][-1] / (num_layers + 1))  # has no edges


@KERNELS
def test_ngcf(segments):
    edges, tables = make_edges(), make_tables()
    layer = Ngcf(graph_of(edges, segments), D, 3, jit_compile=segments)
    found = layer([tf.constant(table) for table in tables])
    weights = [[w.numpy().astype(np.float64) for w in pair] for pair in weights_of(layer)]
    expected = ngcf(adjacency(*edges), np.concatenate(tables), weights)
    assert layer.dim == 4 * D
    assert [part.shape for part in found] == [(Q, 4 * D), (N, 4 * D)]
    np.testing.assert_allclose(np.concatenate(found), expected, atol=1e-5)


@KERNELS
def test_the_gradient_of_light_gcn_is_the_transposed_matrix(segments):
    edges, tables = make_edges(), [tf.constant(table) for table in make_tables()]
    upstream = make_tables(seed=2)
    layer = LightGcn(graph_of(edges, segments), D, 3, jit_compile=segments)
    with tf.GradientTape() as tape:
        tape.watch(tables)
        found = layer(tables)
    gradients = tape.gradient(found, tables, output_gradients=list(map(tf.constant, upstream)))
    operator = light_gcn(adjacency(*edges), np.eye(Q + N), 3)
    np.testing.assert_allclose(
        np.concatenate(gradients), operator.T @ np.concatenate(upstream), atol=1e-6
    )


@KERNELS
def test_gradients_of_ngcf_are_finite_differences(segments):
    edges, tables = make_edges(), make_tables()
    layer = Ngcf(graph_of(edges, segments), D, 2, jit_compile=segments)
    upstream = np.random.default_rng(3).normal(size=(Q + N, 3 * D))
    matrix, step = adjacency(*edges), 1e-6
    watched = [tf.constant(table) for table in tables]
    with tf.GradientTape() as tape:
        tape.watch(watched)
        found = tf.concat(layer(watched), axis=0)
    sources = [*watched, layer.sum_kernel_0, layer.product_kernel_1]
    upstream_given = tf.constant(upstream, tf.float32)
    gradients = tape.gradient(found, sources, output_gradients=upstream_given)

    def total(nodes, weights):
        return float((ngcf(matrix, nodes, weights) * upstream).sum())

    nodes = np.concatenate(tables).astype(np.float64)
    weights = [[w.numpy().astype(np.float64) for w in pair] for pair in weights_of(layer)]
    places = {0: (nodes, (2, 1)), 1: (nodes, (Q + 3, 4)), 2: (weights[0][0], (1, 2))}
    places[3] = weights[1][1], (3, 0)
    for source, (array, place) in places.items():
        values = []
        for sign in (1, -1):
            array[place] += sign * step
            values.append(total(nodes, weights))
            array[place] -= sign * step
        row = place[0] - Q if source == 1 else place[0]
        expected = (values[0] - values[1]) / (2 * step)
        assert float(gradients[source][row, place[1]]) == pytest.approx(expected, rel=1e-3)


def test_both_kernels_and_a_resumed_trace_agree():
    """A second call in another trace makes its matrix anew."""
    edges, tables = make_edges(), [tf.constant(table) for table in make_tables()]
    layers = [LightGcn(graph_of(edges, s), D, 3, jit_compile=s) for s in (True, False)]
    inside = [tf.function(layer)(tables) for layer in layers]
    outside = [layer(tables) for layer in layers]
    for found in (*inside, *outside):
        np.testing.assert_allclose(np.concatenate(found), np.concatenate(inside[0]), atol=1e-6)
