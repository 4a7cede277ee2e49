"""Networks on graphs and sets, invariant to the order of nodes, edges and members."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from nnlearn.checks import check_count
from nnlearn.models.factory import model_factory
from nnlearn.models.inputs import check_features, to_floating, where_or_all
from nnlearn.models.layers import dense, layer_norm
from nnlearn.models.mlp import mlp
from nnlearn.models.named import activation_function
from nnlearn.sharding.axes import automatic_axes
from nnlearn.tree import safe_divide, widest
from nnlearn.types import DTypeLike, Key, Model, Params, Scalar

POOLINGS = ("sum", "mean")


class Graphs(NamedTuple):
    """One graph, or a batch of graphs padded to one size; all arrays share the leading axes ``...``.

    Attributes:
      nodes: features of the nodes, shape (..., nodes, node_features).
      senders, receivers: integers of shape (..., edges): edge ``e`` leads from node ``senders[e]`` to node
        ``receivers[e]``. An undirected edge is two directed ones.
      node_where: booleans of shape (..., nodes), False for padding; None for no padding.
      edge_where: booleans of shape (..., edges), False for padding; None for no padding. An edge with a padding node at
        an end is ignored.
      edges: features of the edges, shape (..., edges, edge_features), or None.
    """

    nodes: jax.Array
    senders: jax.Array
    receivers: jax.Array
    node_where: jax.Array | None = None
    edge_where: jax.Array | None = None
    edges: jax.Array | None = None


class Sets(NamedTuple):
    """One set, or a batch of sets padded to one size.

    Attributes:
      members: features of the members, shape (..., members, features).
      where: booleans of shape (..., members), False for padding; None for no padding.
    """

    members: jax.Array
    where: jax.Array | None = None


@model_factory
def graph_network(
    node_features: int,
    hidden: int,
    outputs: int,
    *,
    layers: int = 3,
    edge_features: int = 0,
    aggregate: Literal["sum", "mean"] = "sum",
    readout: Literal["sum", "mean", "nodes"] = "sum",
    activation: str | Callable[[jax.Array], jax.Array] = "relu",
    dropout: Scalar = 0.0,
    dtype: DTypeLike = jnp.float32,
) -> Model:
    """A message-passing network: nodes are updated by messages from their neighbours and pooled for the output.

    With ``n = norm(h)``, for every edge ``e`` from ``s`` to ``r`` and every node ``v``, each layer is::

        m_e  = activation(n_s @ sender + n_r @ receiver + edge_e @ edge + bias)
        a_v  = sum or mean of m_e over the edges e that lead to v
        h_v <- h_v + mlp([n_v, a_v])

    starting from ``h_v = dense(node_v)``. The output is ``mlp(sum or mean of norm(h_v) over the nodes)``. Nodes are
    multiplied by ``sender`` and ``receiver`` before they are gathered to the edges, which are more numerous.

    Args:
      node_features: length of the last axis of ``Graphs.nodes``.
      hidden: features of the nodes between layers, and of the messages.
      outputs: length of the last axis of the result.
      layers: number of rounds of messages, and so the distance in edges over which nodes affect each other.
      edge_features: length of the last axis of ``Graphs.edges``; 0 for edges without features.
      aggregate: how the messages to a node are combined; the mean of none is 0.
      readout: how the nodes are combined; ``"nodes"`` gives an output for every node instead of one for the graph.
      activation: a function of one array or its name; see ``activation_function``.
      dropout: the fraction of the activations in the nodes' mlp dropped in training, in [0, 1); may be traced.
      dtype: the dtype of the parameters.

    Returns:
      A model from ``Graphs`` to (..., outputs), or to (..., nodes, outputs) with ``readout="nodes"`` (zeros for padding
      nodes). The values of padding nodes and edges have no effect. Its params are ``{"input": layer, "layers": (layer,
      ...), "norm": layer, "output": mlp}``.

    Raises:
      ValueError: if a size is below 1, or a name is unknown; in ``apply``, if an array has the wrong shape.
      TypeError: in ``apply``, if the inputs are not ``Graphs``, or a mask is not boolean.

    Source: Gilmer et al. 2017, arXiv:1704.01212; Battaglia et al. 2018, arXiv:1806.01261.

    >>> model = graph_network(2, 16, 3)
    >>> params = jax.jit(model.init)(jax.random.key(0))
    >>> path = Graphs(jnp.ones((3, 2)), senders=jnp.array([0, 1]), receivers=jnp.array([1, 2]))
    >>> jax.eval_shape(model.apply, params, path).shape
    (3,)
    >>> batch = jax.tree.map(lambda leaf: jnp.stack([leaf] * 5), path)
    >>> jax.eval_shape(model.apply, params, batch).shape
    (5, 3)
    """
    layers, hidden = check_count("layers", layers), check_count("hidden", hidden)
    if edge_features != 0:
        edge_features = check_count("edge_features", edge_features)
    _check_name("aggregate", aggregate, POOLINGS)
    _check_name("readout", readout, (*POOLINGS, "nodes"))
    function = activation_function(activation)
    first = dense(node_features, hidden, dtype=dtype)
    norm = layer_norm(hidden, dtype=dtype)
    parts = {
        "norm": norm,
        "sender": dense(hidden, hidden, kernel_init="he", dtype=dtype),
        "receiver": dense(hidden, hidden, bias=False, kernel_init="he", dtype=dtype),
        "update": mlp((2 * hidden, hidden, hidden), activation=activation, dropout=dropout, dtype=dtype),
    }
    if edge_features:
        parts["edge"] = dense(edge_features, hidden, bias=False, kernel_init="he", dtype=dtype)
    output = mlp((hidden, hidden, outputs), activation=activation, dtype=dtype)
    name = f"graph_network({node_features}, {hidden}, {outputs})"

    def init_layer(key):
        keys = jax.random.split(key, len(parts))
        return {part: layer.init(part_key) for (part, layer), part_key in zip(parts.items(), keys, strict=True)}

    def init(key):
        first_key, output_key, *keys = jax.random.split(key, layers + 2)
        return {
            "input": first.init(first_key),
            "layers": tuple(init_layer(layer_key) for layer_key in keys),
            "norm": norm.init(first_key),
            "output": output.init(output_key),
        }

    def send(params, normed_nh, graph):
        sent_eh = jnp.take(parts["sender"].apply(params["sender"], normed_nh), graph.senders, axis=0)
        sent_eh += jnp.take(parts["receiver"].apply(params["receiver"], normed_nh), graph.receivers, axis=0)
        if edge_features:
            sent_eh += parts["edge"].apply(params["edge"], graph.edges)
        message_eh = jnp.where(graph.edge_where[:, None], function(sent_eh), 0)
        heard_nh = jax.ops.segment_sum(message_eh, graph.receivers, num_segments=len(normed_nh))
        if aggregate == "sum":
            return heard_nh
        count_e = graph.edge_where.astype(heard_nh.dtype)
        count_n = jax.ops.segment_sum(count_e, graph.receivers, num_segments=len(normed_nh))
        return safe_divide(heard_nh, count_n[:, None])

    def on_one(params, graph, key):
        graph = _cleared(graph)
        if len(params["layers"]) != layers:
            raise ValueError(f"{name} has {layers} layers, got the params of {len(params['layers'])}")
        keys = [None] * layers if key is None else jax.random.split(key, layers)
        h_nh = first.apply(params["input"], graph.nodes)
        for layer, layer_key in zip(params["layers"], keys, strict=True):
            normed_nh = norm.apply(layer["norm"], h_nh)
            both = jnp.concatenate([normed_nh, send(layer, normed_nh, graph)], axis=-1)
            h_nh = h_nh + parts["update"].apply(layer["update"], both, layer_key)
        h_nh = norm.apply(params["norm"], h_nh)
        if readout == "nodes":
            return jnp.where(graph.node_where[:, None], output.apply(params["output"], h_nh), 0)
        return output.apply(params["output"], _pooled(h_nh, graph.node_where, readout))

    @automatic_axes(like="graphs")
    def apply(params, graphs, key=None):
        if not isinstance(graphs, Graphs):
            raise TypeError(f"{name} takes Graphs(nodes, senders, receivers, ...), got {type(graphs).__name__}")
        checked = _checked(graphs)
        check_features(name, node_features, checked.nodes)
        if edge_features:
            if checked.edges is None:
                raise ValueError(f"{name} needs Graphs.edges of shape (..., edges, {edge_features}), got None")
            check_features(f"{name}, edges,", edge_features, checked.edges)
        return _over_leading_axes(on_one, params, checked, key, checked.nodes.ndim - 2)

    return Model(init, apply)


@model_factory
def set_model(
    features: int,
    hidden: int,
    outputs: int,
    *,
    member_layers: int = 2,
    output_layers: int = 2,
    readout: Literal["sum", "mean"] = "sum",
    activation: str | Callable[[jax.Array], jax.Array] = "relu",
    dropout: Scalar = 0.0,
    dtype: DTypeLike = jnp.float32,
) -> Model:
    """Deep sets: a network applied to every member, a sum or mean, and a network applied to that.

    ::

        y = rho(sum or mean of phi(x_i) over the members i)

    Args:
      features: length of the last axis of ``Sets.members``.
      hidden: features of the hidden layers.
      outputs: length of the last axis of the result.
      member_layers, output_layers: number of dense layers of ``phi`` and of ``rho``.
      readout: how the members are combined; the mean of none is 0.
      activation: a function of one array or its name; see ``activation_function``.
      dropout: the fraction of the activations dropped in training, in [0, 1); may be traced.
      dtype: the dtype of the parameters.

    Returns:
      A model from ``Sets`` to (..., outputs) with params ``{"member": mlp, "output": mlp}``. The values of padding
      members have no effect.

    Raises:
      ValueError: if a size is below 1, or a name is unknown; in ``apply``, if an array has the wrong shape.
      TypeError: in ``apply``, if the inputs are not ``Sets``, or the mask is not boolean.

    Source: Zaheer et al. 2017, arXiv:1703.06114.

    >>> model = set_model(2, 16, 3)
    >>> params = model.init(jax.random.key(0))
    >>> members = jax.random.normal(jax.random.key(1), (4, 7, 2))
    >>> forth, back = model.apply(params, Sets(members)), model.apply(params, Sets(members[:, ::-1]))
    >>> forth.shape, bool(jnp.allclose(forth, back, atol=1e-5))
    ((4, 3), True)
    """
    _check_name("readout", readout, POOLINGS)
    depth = check_count("member_layers", member_layers), check_count("output_layers", output_layers)
    options = {"activation": activation, "dropout": dropout, "dtype": dtype}
    member = mlp((features, *(depth[0] * [hidden])), **options)
    output = mlp((hidden, *((depth[1] - 1) * [hidden]), outputs), **options)
    name = f"set_model({features}, {hidden}, {outputs})"

    def init(key):
        member_key, output_key = jax.random.split(key)
        return {"member": member.init(member_key), "output": output.init(output_key)}

    def apply(params, sets, key=None):
        if not isinstance(sets, Sets):
            raise TypeError(f"{name} takes Sets(members, where), got {type(sets).__name__}")
        x = to_floating(sets.members)
        check_features(name, features, x)
        where = where_or_all(sets.where, x.shape[:-1])
        member_key, output_key = (None, None) if key is None else jax.random.split(key)
        encoded = member.apply(params["member"], jnp.where(where[..., None], x, 0), member_key)
        return output.apply(params["output"], _pooled(encoded, where, readout), output_key)

    return Model(init, apply)


def _check_name(argument: str, name: str, names: Sequence[str]) -> None:
    if name not in names:
        raise ValueError(f"{argument} must be one of {', '.join(names)}; got {name!r}")


class _CheckedGraphs(NamedTuple):
    """``Graphs`` of checked shapes, with both masks."""

    nodes: jax.Array
    senders: jax.Array
    receivers: jax.Array
    node_where: jax.Array
    edge_where: jax.Array
    edges: jax.Array | None


def _checked(graphs: Graphs) -> _CheckedGraphs:
    nodes = to_floating(graphs.nodes)
    senders, receivers = jnp.asarray(graphs.senders), jnp.asarray(graphs.receivers)
    if nodes.ndim < 2:
        raise ValueError(f"nodes must have shape (..., nodes, node_features), got {nodes.shape}")
    for name, ends in (("senders", senders), ("receivers", receivers)):
        if not jnp.issubdtype(ends.dtype, jnp.integer):
            raise TypeError(f"{name} must hold integers, got {ends.dtype.name} of shape {ends.shape}")
        if ends.shape != senders.shape or ends.shape[:-1] != nodes.shape[:-2] or ends.ndim != nodes.ndim - 1:
            raise ValueError(
                f"senders and receivers must have one shape (..., edges), with the leading axes of the nodes' "
                f"{nodes.shape}, got {senders.shape} and {receivers.shape}"
            )
    # Widened first, as a small integer type may not hold the number of nodes.
    senders, receivers = (ends.astype(widest(ends.dtype, jnp.int32)) for ends in (senders, receivers))
    edges = None if graphs.edges is None else to_floating(graphs.edges)
    if edges is not None and edges.shape[:-1] != senders.shape:
        raise ValueError(f"edges must have one row for each of the senders {senders.shape}, got {edges.shape}")
    node_where = where_or_all(graphs.node_where, nodes.shape[:-1], "node_where")
    edge_where = where_or_all(graphs.edge_where, senders.shape, "edge_where")
    return _CheckedGraphs(nodes, senders, receivers, node_where, edge_where, edges)


def _cleared(graph: _CheckedGraphs) -> _CheckedGraphs:
    """One graph whose masked nodes and edges have features of zeros, and masked edges both ends at the first node."""
    count = len(graph.nodes)

    def is_node(ends):
        return (ends >= 0) & (ends < count) & jnp.take(graph.node_where, ends, mode="clip")

    edge_where = graph.edge_where & is_node(graph.senders) & is_node(graph.receivers)
    return _CheckedGraphs(
        jnp.where(graph.node_where[:, None], graph.nodes, 0),
        jnp.where(edge_where, graph.senders, 0),
        jnp.where(edge_where, graph.receivers, 0),
        graph.node_where,
        edge_where,
        None if graph.edges is None else jnp.where(edge_where[:, None], graph.edges, 0),
    )


def _pooled(features: jax.Array, where: jax.Array, readout: str) -> jax.Array:
    """Sum or mean of the entries that ``where`` keeps, over the second axis from the end."""
    total = jnp.sum(jnp.where(where[..., None], features, 0), axis=-2)
    if readout == "sum":
        return total
    return safe_divide(total, jnp.sum(where, axis=-1, keepdims=True).astype(total.dtype))


def _over_leading_axes(
    function: Callable[..., jax.Array], params: Params, inputs: _CheckedGraphs, key: Key | None, axes: int
) -> jax.Array:
    """Map ``function(params, inputs, key)`` over the leading axes of the inputs, with a key for each graph."""
    if axes == 0:
        return function(params, inputs, key)
    size = len(inputs.nodes)
    keys = None if key is None else jax.random.split(key, size)
    inner = lambda inputs, key: _over_leading_axes(function, params, inputs, key, axes - 1)  # noqa: E731
    return jax.vmap(inner, in_axes=(0, None if key is None else 0))(inputs, keys)
