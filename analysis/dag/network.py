"""The feedforward neural network of a directed acyclic graph (thesis Definition 2.2.2), an ordinary torch module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from .graph import DAG, Integers

__all__ = ["DAGNetwork"]

Activation = Callable[[Tensor], Tensor]

# Above this share of possible edges a layer is faster as a matrix with holes than as a list of edges.
_DENSE = 0.1


class DAGNetwork(nn.Module):
    """The network ``f_v = sigma_v(in(v)^(-1/2) sum_u w_(u,v) f_u)`` over the edges u -> v of a graph, (n, d) -> (n, c).

    Every weight is drawn from N(0, 1); there are no biases. The outputs are linear (Remark 2.2.4) unless
    `neuron_activations` says otherwise. A layer is one matrix product where it is dense, and a gather and a scatter
    over its edges where it is sparse or shares weights. A dense layer keeps the matrix with zeros where there is no
    edge: these zeros are parameters without effect, always with gradient zero; `num_weights` counts the true ones.

    Args:
        dag: the graph. Columns of the input follow `dag.inputs`, columns of the output `dag.outputs`.
        activation: element-wise function of all hidden neurons.
        neuron_activations: {vertex: function} for single neurons, outputs too. Neurons with the same function object
            are computed together.
        generator: source of the weights; the global generator without one.

    Raises:
        TypeError: dag is not a `DAG`, or an activation cannot be called.
        ValueError: `neuron_activations` names an input or no vertex; in `forward`, another number of input columns.

    Source: thesis Definition 2.2.2, Eq. 2.5; skip connections Eq. A.12; shared weights Eq. A.14.

    >>> from catapult_opt.analysis.dag import fcn
    >>> net = DAGNetwork(fcn([3, 16, 1]), torch.relu)
    >>> net(torch.ones(5, 3)).shape, net.num_weights
    (torch.Size([5, 1]), 64)
    """

    def __init__(
        self,
        dag: DAG,
        activation: Activation = torch.tanh,
        *,
        neuron_activations: Mapping[int, Activation] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(dag, DAG):
            raise TypeError(f"dag must be a DAG, got {type(dag).__name__}: DAG(adjacency) or DAG.from_edges(edges)")
        own = dict(neuron_activations or {})
        for function in [activation, *own.values()]:
            if not callable(function):
                raise TypeError(f"activations must be functions of a tensor, got {function!r}")
        for v in own:
            if not 0 <= v < dag.num_vertices or dag.layer[v] == 0:
                raise ValueError(f"neuron_activations must name neurons, got {v}: not a vertex, or an input")
        self.dag = dag
        self._column = _column_of_vertex(dag)
        self.layers = nn.ModuleList(_layer(dag, self._column, i, generator) for i in range(1, dag.depth + 1))
        self._functions = [_functions(layer, dag, activation, own) for layer in dag.layers[1:]]

    @property
    def num_weights(self) -> int:
        """Number of weights: edges, or distinct weights where some are shared."""
        return sum(layer.num_weights for layer in self.weight_layers)

    @property
    def weight_layers(self) -> list[_DenseLayer | _EdgeLayer]:
        """The layers, from the first beyond the inputs."""
        return list(self.layers)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """(n, d) -> (n, c); samples with more dimensions are flattened."""
        return self.trace(x).outputs

    def trace(self, x: Tensor, depth: int | None = None) -> Trace:
        """All neurons and pre-activations up to layer `depth` (the last), with their autograd graph."""
        x = x.flatten(1)
        if x.shape[1] != len(self.dag.inputs):
            raise ValueError(f"x must have {len(self.dag.inputs)} columns, one for each input, got {tuple(x.shape)}")
        values, pre = [x], []
        steps = list(zip(self.weight_layers, self._functions, strict=True))
        for layer, functions in steps[: self.dag.depth if depth is None else depth]:
            pre.append(layer(layer.gather(values)))
            values.append(layer.add_skips(_activate(pre[-1], functions), values))
        return Trace(values, pre, self)

    def pre_activation(self, x: Tensor, vertex: int) -> Tensor:
        """The pre-activation (n,) of one neuron (Eq. 2.2), as a function of the weights before it.

        Raises:
            ValueError: the vertex is an input or not in the graph.
        """
        if not 0 <= vertex < self.dag.num_vertices or self.dag.layer[vertex] == 0:
            raise ValueError(f"vertex must be a neuron, got {vertex}: not a vertex, or an input")
        depth = int(self.dag.layer[vertex])
        return self.trace(x, depth).pre[depth - 1][:, self._column[vertex]]

    def extra_repr(self) -> str:
        return repr(self.dag)


@dataclass
class Trace:
    """What one forward pass computed."""

    values: list[Tensor]  # per layer from 0 on: (n, neurons)
    pre: list[Tensor]  # per layer from 1 on: (n, neurons)
    network: DAGNetwork

    @property
    def outputs(self) -> Tensor:
        """(n, c), in the order of `dag.outputs`."""
        dag, column = self.network.dag, self.network._column
        depths = dag.layer[dag.outputs]
        if (depths == depths[0]).all():
            return _columns(self.values[depths[0]], column[dag.outputs])
        return torch.stack([self.values[d][:, column[v]] for d, v in zip(depths, dag.outputs, strict=True)], dim=1)


def _column_of_vertex(dag: DAG) -> Integers:
    """Where each vertex stands among the columns of its layer."""
    column = np.zeros(dag.num_vertices, dtype=np.int64)
    for layer in dag.layers:
        column[layer] = np.arange(len(layer))
    return column


class _Layer(nn.Module):
    """What both layouts of a layer share: which earlier layers it reads, its scaling, its skip connections."""

    scale: Tensor
    skip_from: Tensor
    skip_to: Tensor

    def __init__(self, read: list[int], scale: Tensor, skips: tuple[list[int], Tensor, Tensor]) -> None:
        super().__init__()
        self.read = read  # the layers whose neurons are the columns of x
        self.register_buffer("scale", scale, persistent=False)  # (neurons,) 1/sqrt(fan_in)
        self.skip_read, skip_from, skip_to = skips
        self.register_buffer("skip_from", skip_from, persistent=False)
        self.register_buffer("skip_to", skip_to, persistent=False)

    def gather(self, values: Sequence[Tensor]) -> Tensor:
        """The columns that the layer reads."""
        return torch.cat([values[i] for i in self.read], dim=1) if len(self.read) > 1 else values[self.read[0]]

    def add_skips(self, neurons: Tensor, values: Sequence[Tensor]) -> Tensor:
        if not self.skip_read:
            return neurons
        source = torch.cat([values[i] for i in self.skip_read], dim=1)
        return neurons.index_add(1, self.skip_to, source[:, self.skip_from])


class _DenseLayer(_Layer):
    """One matrix (neurons, columns), with a mask where edges are missing."""

    mask: Tensor | None

    def __init__(self, weight: Tensor, mask: Tensor, *shared: object) -> None:
        super().__init__(*shared)  # type: ignore[arg-type]
        self.num_weights = int(mask.count_nonzero())
        self.weight = nn.Parameter(weight)
        full = self.num_weights == mask.numel()
        self.register_buffer("mask", None if full else mask.to(weight.dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.mask is None else self.weight * self.mask
        return (x @ weight.T) * self.scale

    def gram(self, x: Tensor, delta: Tensor) -> Tensor:
        """Inner products of gradients (c n, c n), from x (n, columns) and d output / d pre (c, n, neurons)."""
        c, n, _ = delta.shape
        scaled = delta * self.scale
        if self.mask is None:
            return (torch.einsum("kiv,ljv->kilj", scaled, scaled) * (x @ x.T)[:, None]).reshape(c * n, c * n)
        gram = x.new_empty(c, n, c, n)
        for i in range(n):
            common = (x * x[i]) @ self.mask.T  # (n, neurons): sum over the sources of each neuron
            gram[:, i] = torch.einsum("kv,ljv,jv->klj", scaled[:, i], scaled, common)
        return gram.reshape(c * n, c * n)

    def direction(self, generator: torch.Generator) -> Tensor:
        """A Gaussian change of the weights that exist."""
        change = torch.randn(self.weight.shape, generator=generator, dtype=self.weight.dtype).to(self.weight.device)
        return change if self.mask is None else change * self.mask


class _EdgeLayer(_Layer):
    """A list of edges, each with a column it reads, a neuron it feeds, and the number of its weight."""

    source: Tensor
    target: Tensor
    weight_id: Tensor

    def __init__(self, weight: Tensor, source: Tensor, target: Tensor, weight_id: Tensor, *shared: object) -> None:
        super().__init__(*shared)  # type: ignore[arg-type]
        self.num_weights = len(weight)
        self.weight = nn.Parameter(weight)
        self.register_buffer("source", source, persistent=False)
        self.register_buffer("target", target, persistent=False)
        self.register_buffer("weight_id", weight_id, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        products = x[:, self.source] * self.weight[self.weight_id]
        return x.new_zeros(len(x), len(self.scale)).index_add(1, self.target, products) * self.scale

    def gram(self, x: Tensor, delta: Tensor) -> Tensor:
        """As `_DenseLayer.gram`, through the Jacobian (c n, weights)."""
        per_edge = (delta * self.scale)[:, :, self.target] * x[:, self.source]
        jacobian = x.new_zeros(*delta.shape[:2], self.num_weights).index_add(2, self.weight_id, per_edge).flatten(0, 1)
        return jacobian @ jacobian.T

    def direction(self, generator: torch.Generator) -> Tensor:
        """A Gaussian change of the weights."""
        return torch.randn(self.weight.shape, generator=generator, dtype=self.weight.dtype).to(self.weight.device)


def _layer(dag: DAG, column_of: Integers, depth: int, generator: torch.Generator | None) -> _DenseLayer | _EdgeLayer:
    neurons = dag.layers[depth]
    degrees = dag.in_degree[neurons]
    edges = np.concatenate([np.arange(*dag.adjacency.indptr[v : v + 2]) for v in neurons])
    source = dag.adjacency.indices[edges]
    read, column = _reading(dag, column_of, source)
    target = np.repeat(np.arange(len(neurons)), degrees)
    scale = torch.from_numpy(dag.fan_in[neurons] ** -0.5).to(torch.get_default_dtype())
    shared = (read, scale, _skips(dag, column_of, neurons))
    if dag.weight_ids is None:
        weight, ids = torch.randn(len(edges), generator=generator), np.arange(len(edges))
    else:
        distinct, ids = np.unique(dag.weight_ids[edges], return_inverse=True)
        weight = torch.randn(len(distinct), generator=generator)
    columns = sum(len(dag.layers[i]) for i in read)
    if dag.weight_ids is None and len(edges) >= _DENSE * len(neurons) * columns:
        at = torch.from_numpy(target * columns + column)
        matrix, mask = torch.zeros(len(neurons) * columns), torch.zeros(len(neurons) * columns, dtype=torch.bool)
        matrix[at], mask[at] = weight, True
        return _DenseLayer(matrix.view(-1, columns), mask.view(-1, columns), *shared)
    return _EdgeLayer(weight, *map(torch.from_numpy, (column, target, ids)), *shared)


def _reading(dag: DAG, column_of: Integers, vertices: Integers) -> tuple[list[int], Integers]:
    """The layers that hold these vertices, and the vertices' columns when those layers stand side by side."""
    depths = dag.layer[vertices]
    read = np.flatnonzero(np.bincount(depths, minlength=1)).tolist() if len(vertices) else []
    offset = np.zeros(dag.depth + 1, dtype=np.int64)
    offset[read] = np.cumsum([0, *(len(dag.layers[i]) for i in read)])[:-1] if read else 0
    return read, column_of[vertices] + offset[depths]


def _skips(dag: DAG, column_of: Integers, neurons: Integers) -> tuple[list[int], Tensor, Tensor]:
    pairs = dag.skips[np.isin(dag.skips[:, 1], neurons)]
    read, column = _reading(dag, column_of, pairs[:, 0])
    return read, torch.from_numpy(column), torch.from_numpy(column_of[pairs[:, 1]])


# An activation and the columns it applies to; None for all.
_Functions = list[tuple[Activation | None, Tensor | None]]


def _functions(neurons: Integers, dag: DAG, activation: Activation, own: Mapping[int, Activation]) -> _Functions:
    """Neurons of a layer by their activation (None: identity)."""
    linear = set(dag.outputs.tolist())
    groups: dict[Activation | None, list[int]] = {}
    for i, v in enumerate(neurons.tolist()):
        groups.setdefault(own.get(v, None if v in linear else activation), []).append(i)
    if len(groups) == 1:
        return [(next(iter(groups)), None)]
    return [(function, torch.tensor(columns)) for function, columns in groups.items()]


def _activate(pre: Tensor, functions: _Functions) -> Tensor:
    if functions[0][1] is None:
        function = functions[0][0]
        return pre if function is None else function(pre)
    neurons = pre
    for function, columns in functions:
        if function is not None and columns is not None:
            at = columns.to(pre.device)
            neurons = neurons.index_copy(1, at, function(pre[:, at]))
    return neurons


def _columns(x: Tensor, columns: Integers) -> Tensor:
    if np.array_equal(columns, np.arange(x.shape[1])):
        return x
    return x[:, torch.from_numpy(columns).to(x.device)]
