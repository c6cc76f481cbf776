"""Builders of the thesis' examples of directed acyclic graphs (Section 2.2, Appendix A)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import scipy.sparse as sp

from catapult_opt.checks import check_whole_number

from .graph import DAG, Ids, vertex_ids

__all__ = ["add_bottlenecks", "conv1d", "densenet", "drop_edges", "fcn", "with_skips"]


def fcn(sizes: Sequence[int]) -> DAG:
    """A fully connected network (Eq. A.4) of these layer sizes, from the input layer to the output layer.

    Vertices are numbered layer by layer.

    Raises:
        ValueError: fewer than two layers, or a size below 1.

    >>> fcn([3, 4, 4, 1])
    DAG(3 + 4 + 4 + 1 vertices, 32 edges, width 4)
    """
    return _from_ranges(sizes, _starts(sizes)[:-2])


def densenet(sizes: Sequence[int], *, dense_input: bool = True) -> DAG:
    """A DenseNet (Eq. A.5, A.6): every neuron takes all neurons of all earlier layers.

    With `dense_input=False` the inputs feed the first layer only, so that in-degrees grow in proportion to the hidden
    layers; as the equations have it, they count in every in-degree and a net with many inputs is wide from the start.

    Raises:
        ValueError: as for `fcn`.

    >>> densenet([3, 4, 4, 1])
    DAG(3 + 4 + 4 + 1 vertices, 51 edges, width 7)
    >>> densenet([3, 4, 4, 1], dense_input=False)
    DAG(3 + 4 + 4 + 1 vertices, 36 edges, width 4)
    """
    rest = 0 if dense_input else sizes[0]
    return _from_ranges(sizes, [0] + [rest] * (len(sizes) - 2))


def drop_edges(dag: DAG, p: float, seed: int = 0) -> DAG:
    """The same vertices with every edge removed independently with probability p (App. A.1).

    A neuron that would lose all its incoming edges keeps one, drawn at random: it would otherwise become an input. The
    inputs and outputs stay what they were, so an input may lose all its edges, and a hidden neuron all outgoing ones.

    Skips stay; weights that were shared stay shared; the scaling is by the new in-degrees. A longest path that is
    broken moves neurons to earlier layers.

    Raises:
        ValueError: p is not in [0, 1), or the graph has zero padding (`fan_in`), whose new size would not be known.

    >>> round(drop_edges(fcn([100, 1000, 1]), 0.5).num_edges / fcn([100, 1000, 1]).num_edges, 2)
    0.5
    """
    if not 0 <= p < 1:
        raise ValueError(f"p must be a probability in [0, 1), got {p}")
    if (dag.fan_in != dag.in_degree).any():
        raise ValueError("dag must have no zero padding (fan_in above the in-degree): build it after dropping edges")
    rng = np.random.default_rng(seed)
    kept = rng.random(dag.num_edges, dtype=np.float32) >= p
    starts, fed = dag.adjacency.indptr[:-1].astype(np.int64), np.flatnonzero(dag.in_degree > 0)
    bare = fed[np.add.reduceat(kept, starts[fed], dtype=np.int64) == 0]
    kept[starts[bare] + rng.integers(dag.in_degree[bare])] = True
    counts = np.concatenate([[0], np.cumsum(kept)])[dag.adjacency.indptr]
    indices = dag.adjacency.indices[kept]
    dropped = sp.csc_array((np.ones(len(indices), dtype=bool), indices, counts), shape=dag.adjacency.shape)
    ids = None if dag.weight_ids is None else dag.weight_ids[kept]
    return DAG(dropped, inputs=dag.inputs, outputs=dag.outputs, skips=dag.skips, weight_ids=ids)


def add_bottlenecks(dag: DAG, vertices: Ids, in_degree: int = 1, seed: int = 0) -> DAG:
    """The graph with these neurons turned into bottlenecks: each keeps `in_degree` incoming edges, drawn at random.

    Only edges from the layer before it are drawn from, so that every neuron stays in its layer.

    Raises:
        ValueError: a vertex is an input, or has fewer such edges than `in_degree`; shared weights or zero padding.

    Source: thesis Figure 2.3, Appendix A.6.

    >>> dag = add_bottlenecks(fcn([3, 8, 8, 1]), [11, 12])  # two neurons of the second hidden layer
    >>> dag.in_degree[11:14].tolist(), dag.width
    ([1, 1, 8], 1)
    """
    check_whole_number("in_degree", in_degree)
    if dag.weight_ids is not None or (dag.fan_in != dag.in_degree).any():
        raise ValueError("dag must have neither shared weights nor zero padding: add bottlenecks before them")
    rng = np.random.default_rng(seed)
    kept = np.ones(dag.num_edges, dtype=bool)
    for v in vertex_ids("vertices", vertices, dag.num_vertices):
        start, end = dag.adjacency.indptr[v : v + 2]
        near = start + np.flatnonzero(dag.layer[dag.sources(v)] == dag.layer[v] - 1)
        if len(near) < in_degree:
            raise ValueError(
                f"vertices must be neurons with at least {in_degree} edges from the layer before, "
                f"got vertex {v} with {len(near)}"
            )
        kept[start:end] = False
        kept[rng.choice(near, in_degree, replace=False)] = True
    return DAG.from_edges(dag.edges[kept], dag.num_vertices, inputs=dag.inputs, outputs=dag.outputs, skips=dag.skips)


def with_skips(dag: DAG, back: int = 1) -> DAG:
    """The graph with a skip connection into every hidden neuron, as far as there are partners for it (Eq. A.12).

    The i-th neuron of layer l is added the i-th of layer l - `back`, where both exist: a residual network whose layers
    are of one size. `DAG(..., skips=)` takes any other pairs.

    Raises:
        ValueError: `back` is not a whole number of at least 1, or no neuron has a partner.

    >>> with_skips(fcn([3, 2, 2, 1])).skips.tolist()
    [[0, 3], [1, 4], [3, 5], [4, 6]]
    """
    check_whole_number("back", back)
    hidden = [layer[~np.isin(layer, dag.outputs)] for layer in dag.layers]
    pairs = [pair for a, b in zip(hidden, hidden[back:], strict=False) for pair in zip(a, b, strict=False)]
    if not pairs:
        raise ValueError(f"back must leave neurons to connect, got {back} for a graph of {dag.depth} layers")
    fan_in = {int(v): int(dag.fan_in[v]) for v in np.flatnonzero(dag.fan_in != dag.in_degree)}
    return DAG(
        dag.adjacency, inputs=dag.inputs, outputs=dag.outputs, skips=pairs, weight_ids=dag.weight_ids, fan_in=fan_in
    )


def conv1d(length: int, channels: Sequence[int], window: int, d_out: int = 1) -> DAG:
    """A 1-D convolutional network (Eq. A.15): weights shared along `length` positions, stride 1, zero padding.

    `channels` are those of the input, then of each hidden layer; the outputs are fully connected to the last one.
    Vertices are numbered by layer, then channel, then position: an input sample (channels[0], length), flattened.

    Raises:
        ValueError: a number below 1, fewer than two entries in channels, or an even window (it has no middle).

    >>> dag = conv1d(8, [1, 4, 4], window=3)
    >>> dag, len(set(dag.weight_ids))  # 1*4*3 + 4*4*3 + 4*8 weights
    (DAG(8 + 32 + 32 + 1 vertices, 472 edges, width 12), 92)
    """
    for name, value in {"length": length, "window": window, "d_out": d_out}.items():
        check_whole_number(name, value)
    if window % 2 == 0:
        raise ValueError(f"window must be odd, to have a middle, got {window}")
    starts = _starts([length * c for c in channels])
    edges, ids, next_id = [], [], 0
    fan_in: dict[int, int] = {}
    for (c_in, start), (c_out, target) in pairwise(zip(channels, starts[:-1], strict=True)):
        o, i, k, j = np.meshgrid(*map(np.arange, (c_out, c_in, window, length)), indexing="ij")
        at = j + k - window // 2
        inside = (at >= 0) & (at < length)
        edges.append(np.stack([start + i * length + at, target + o * length + j], axis=-1)[inside])
        ids.append((next_id + (o * c_in + i) * window + k)[inside])
        next_id += c_out * c_in * window
        fan_in |= dict.fromkeys(range(target, target + c_out * length), c_in * window)
    last = np.arange(starts[-2], starts[-1])
    edges.append(np.stack(np.meshgrid(last, starts[-1] + np.arange(d_out)), axis=-1).reshape(-1, 2))
    ids.append(next_id + np.arange(len(last) * d_out))
    return DAG.from_edges(np.concatenate(edges), weight_ids=np.concatenate(ids), fan_in=fan_in)


def _starts(sizes: Sequence[int]) -> list[int]:
    """Number of the first vertex of every layer, and of all vertices."""
    if len(sizes) < 2:
        raise ValueError(f"sizes must have at least an input and an output layer, got {list(sizes)}")
    for size in sizes:
        check_whole_number("sizes", size)
    return [0, *np.cumsum(sizes).tolist()]


def _from_ranges(sizes: Sequence[int], first: Sequence[int]) -> DAG:
    """Every vertex of layer l + 1 takes all vertices from first[l] to the end of layer l."""
    starts = _starts(sizes)
    ranges = [np.arange(a, b, dtype=np.int32) for a, b in zip(first, starts[1:-1], strict=True)]
    degrees = np.repeat([0, *map(len, ranges)], sizes)
    indices = np.concatenate([np.tile(r, size) for r, size in zip(ranges, sizes[1:], strict=True)])
    indptr = np.concatenate([[0], np.cumsum(degrees)])
    n = starts[-1]
    return DAG(sp.csc_array((np.ones(len(indices), dtype=bool), indices, indptr), shape=(n, n)))
