"""Networks on graphs and sets: equal to loops over nodes and edges, in any order and with any padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnlearn.models.graph import Graphs, Sets, graph_network, set_model

NODES, EDGES, FEATURES, EDGE_FEATURES, HIDDEN, OUTPUTS = 6, 9, 3, 2, 8, 4


def drawn(seed=0, *lead):
    random = np.random.default_rng(seed)
    return Graphs(
        nodes=jnp.asarray(random.normal(size=(*lead, NODES, FEATURES)), jnp.float32),
        senders=jnp.asarray(random.integers(0, NODES, (*lead, EDGES))),
        receivers=jnp.asarray(random.integers(0, NODES, (*lead, EDGES))),
        node_where=jnp.ones((*lead, NODES), bool),
        edge_where=jnp.ones((*lead, EDGES), bool),
        edges=jnp.asarray(random.normal(size=(*lead, EDGES, EDGE_FEATURES)), jnp.float32),
    )


def made(**options):
    model = graph_network(FEATURES, HIDDEN, OUTPUTS, layers=2, edge_features=EDGE_FEATURES, **options)
    random = np.random.default_rng(1)  # no bias of 0 and no scale of 1, so that each has an effect
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return model, jax.tree.map(lambda leaf: random.normal(0.2, 0.4, leaf.shape).astype(np.float32), shapes)


def slow_graph_network(params, graph, aggregate, readout):
    """Loops over edges and nodes in float64."""
    params, graph = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (params, graph))

    def linear(part, x):
        return x @ part["kernel"] + part.get("bias", 0.0)

    def norm(part, x):
        centred = x - x.mean()
        return part["scale"] * centred / np.sqrt((centred**2).mean() + 1e-6) + part["bias"]

    def two_layers(part, x):
        return linear(part["output"], np.maximum(linear(part["hidden"][0], x), 0))

    h = [linear(params["input"], node) for node in graph.nodes]
    ends = list(zip(graph.senders.astype(int), graph.receivers.astype(int), strict=True))
    for layer in params["layers"]:
        n = [norm(layer["norm"], h_v) for h_v in h]
        heard = [[] for _ in h]
        for (s, r), edge, there in zip(ends, graph.edges, graph.edge_where, strict=True):
            if there and graph.node_where[s] and graph.node_where[r]:
                sum_of = linear(layer["sender"], n[s]) + linear(layer["receiver"], n[r]) + linear(layer["edge"], edge)
                heard[r].append(np.maximum(sum_of, 0))
        for v in range(len(h)):
            a = np.sum(heard[v], axis=0) if heard[v] else np.zeros(HIDDEN)
            a = a / max(1, len(heard[v])) if aggregate == "mean" else a
            h[v] = h[v] + two_layers(layer["update"], np.concatenate([n[v], a]))
    h = [norm(params["norm"], h_v) for h_v, there in zip(h, graph.node_where, strict=True) if there]
    if readout == "nodes":
        return np.stack([two_layers(params["output"], h_v) for h_v in h])
    return two_layers(params["output"], np.sum(h, axis=0) if readout == "sum" else np.mean(h, axis=0))


@pytest.mark.parametrize(("aggregate", "readout"), [("sum", "sum"), ("mean", "mean"), ("sum", "nodes")])
def test_the_network_equals_a_loop_over_edges(aggregate, readout):
    model, params = made(aggregate=aggregate, readout=readout)
    graph = drawn()
    got = jax.jit(model.apply)(params, graph)
    np.testing.assert_allclose(got, slow_graph_network(params, graph, aggregate, readout), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_padding_has_no_effect_and_no_gradient():
    model, params = made()
    apply = jax.jit(model.apply)
    graph = drawn()
    hidden = graph._replace(
        nodes=graph.nodes.at[4:].set(jnp.nan),
        node_where=jnp.arange(NODES) < 4,
        senders=graph.senders.at[7:].set(10**6),
        edges=graph.edges.at[7:].set(jnp.inf),
        edge_where=jnp.arange(EDGES) < 7,
    )
    want = slow_graph_network(params, hidden._replace(nodes=graph.nodes, edges=graph.edges), "sum", "sum")
    np.testing.assert_allclose(apply(params, hidden), want, rtol=1e-4, atol=1e-4)

    def loss(params, nodes, edges):
        return jnp.sum(model.apply(params, hidden._replace(nodes=nodes, edges=edges)))

    of_params, of_nodes, of_edges = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(params, hidden.nodes, hidden.edges)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(of_params))
    assert not of_nodes[4:].any() and of_nodes[:4].any()
    assert not of_edges[7:].any()


def test_the_order_of_nodes_and_edges_does_not_matter():
    model, params = made(aggregate="mean")
    graph, apply = drawn(), jax.jit(model.apply)
    order, edge_order = np.random.default_rng(2).permutation(NODES), np.random.default_rng(3).permutation(EDGES)
    place = np.argsort(order)
    shuffled = Graphs(
        nodes=graph.nodes[order],
        senders=jnp.asarray(place)[graph.senders][edge_order],
        receivers=jnp.asarray(place)[graph.receivers][edge_order],
        node_where=graph.node_where,
        edge_where=graph.edge_where,
        edges=graph.edges[edge_order],
    )
    np.testing.assert_allclose(apply(params, shuffled), apply(params, graph), rtol=1e-4, atol=1e-4)
    swapped = shuffled._replace(senders=shuffled.receivers, receivers=shuffled.senders)
    assert not np.allclose(apply(params, swapped), apply(params, graph), atol=1e-3)  # the direction has an effect


def test_a_batch_equals_its_graphs_and_their_disjoint_union():
    model, params = made(readout="nodes")
    batch = drawn(1, 2)
    apply = jax.jit(model.apply)
    got = apply(params, batch)
    for index in range(2):
        alone = apply(params, jax.tree.map(lambda leaf, index=index: leaf[index], batch))
        np.testing.assert_allclose(got[index], alone, rtol=1e-5, atol=1e-5)
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), batch)
    offset = jnp.repeat(jnp.array([0, NODES]), EDGES)
    joined = flat._replace(senders=flat.senders + offset, receivers=flat.receivers + offset)
    np.testing.assert_allclose(apply(params, joined), got.reshape(-1, OUTPUTS), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_dropout_needs_a_key_and_differs_between_the_graphs_of_a_batch():
    model, params = made(dropout=0.5)
    graph = drawn()
    twice = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), graph)
    got = jax.jit(model.apply)(params, twice, jax.random.key(0))
    assert not np.allclose(got[0], got[1])
    np.testing.assert_array_equal(*jax.jit(model.apply)(params, twice))


def test_a_set_equals_the_sum_over_its_members():
    model = set_model(FEATURES, HIDDEN, OUTPUTS, readout="mean")
    params, apply = jax.jit(model.init)(jax.random.key(0)), jax.jit(model.apply)
    members = np.random.default_rng(0).normal(size=(2, 5, FEATURES)).astype(np.float32)
    where = np.arange(5) < np.array([[5], [3]])
    members[1, 3:] = np.nan
    got, grads = jax.jit(jax.value_and_grad(lambda params: jnp.sum(model.apply(params, Sets(members, where)))))(params)
    double = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def network(part, x):
        hidden = np.maximum(x @ part["hidden"][0]["kernel"] + part["hidden"][0]["bias"], 0)
        return hidden @ part["output"]["kernel"] + part["output"]["bias"]

    means = [network(double["member"], x[there]).mean(0) for x, there in zip(members, where, strict=True)]
    want = [network(double["output"], mean) for mean in means]
    np.testing.assert_allclose(apply(params, Sets(members, where)), np.stack(want), rtol=1e-4, atol=1e-5)
    assert np.isclose(got, np.sum(want), rtol=1e-4)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads))
    nobody, of_none = apply(params, Sets(members, np.zeros((2, 5), bool))), network(double["output"], np.zeros(HIDDEN))
    np.testing.assert_allclose(nobody, np.stack([of_none, of_none]), rtol=1e-4, atol=1e-5)


def test_errors_name_the_cure():
    model, params = made()
    graph = drawn()
    with pytest.raises(TypeError, match="takes Graphs"):
        model.apply(params, graph.nodes)
    with pytest.raises(TypeError, match="node_where must be boolean"):
        model.apply(params, graph._replace(node_where=jnp.ones(NODES)))
    with pytest.raises(ValueError, match=r"edge_where must have shape \(9,\), got \(3,\)"):
        model.apply(params, graph._replace(edge_where=jnp.ones(3, bool)))
    with pytest.raises(TypeError, match="senders must hold integers"):
        model.apply(params, graph._replace(senders=jnp.ones(EDGES)))
    with pytest.raises(ValueError, match="senders and receivers must have one shape"):
        model.apply(params, graph._replace(senders=graph.senders[:3]))
    with pytest.raises(ValueError, match="needs Graphs.edges"):
        model.apply(params, graph._replace(edges=None))
    with pytest.raises(ValueError, match="aggregate must be one of sum, mean; got 'max'"):
        graph_network(1, 1, 1, aggregate="max")
    with pytest.raises(ValueError, match="last axis is 3"):
        set_model(3, 1, 1).apply({}, Sets(jnp.ones((2, 4))))
