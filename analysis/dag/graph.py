"""Directed acyclic graphs that networks are built from (thesis Section 2.2)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

__all__ = ["DAG", "Ids", "Integers", "vertex_ids"]

Integers = npt.NDArray[np.int64]
Ids = Sequence[int] | npt.NDArray[Any]


class DAG:
    """A directed acyclic graph with vertices 0 to n - 1, organised into layers by its longest paths.

    Inputs are the vertices without incoming edges and outputs those without outgoing edges; layer l holds the vertices
    whose longest path from an input has l edges. Both may be named instead, in the order of the network's columns:
    where edges are dropped at random, a hidden neuron may lose its last outgoing edge without becoming an output.

    Args:
        adjacency: (n, n) scipy.sparse; a stored non-zero at [u, v] is the edge u -> v. Its value does not matter.
        inputs: the vertices without incoming edges, in another order than by number.
        outputs: vertices without outgoing edges, in any layer; all of them if not given.
        skips: (k, 2) pairs (u, v): the value of u is added to that of v, untrained (Eq. A.12). No edges: they take no
            part in degrees and layers. v is neither input nor output and has at most one; u is in an earlier layer.
        weight_ids: (edges,) in the order of `edges`: edges of one id share one weight (Eq. A.14), which is possible
            within a layer.
        fan_in: {vertex: m} where m in the scaling 1/sqrt(m) is above the in-degree, for sources that are always zero
            such as the zero padding of a convolution.

    Raises:
        TypeError: adjacency is not a sparse matrix.
        ValueError: the edges form a cycle (it is named), an output is not connected to an input, or an argument names
            vertices that cannot be what it says.

    Source: thesis Definitions 2.2.1, 2.2.5 and 2.2.7.

    >>> dag = DAG.from_edges([(0, 2), (1, 2), (2, 3), (0, 3)])
    >>> dag.layer.tolist(), dag.in_degree.tolist(), dag.width
    ([0, 0, 1, 2], [0, 0, 2, 2], 2)
    """

    def __init__(
        self,
        adjacency: Any,
        *,
        inputs: Ids | None = None,
        outputs: Ids | None = None,
        skips: Iterable[tuple[int, int]] = (),
        weight_ids: Ids | None = None,
        fan_in: Mapping[int, int] | None = None,
    ) -> None:
        self.adjacency = _canonical(adjacency)  # csc, read only: incoming edges of a vertex stand together
        self.layer: Integers = _layers(self.adjacency)  # (n,)
        self.inputs: Integers = self._roots(inputs)
        self.outputs: Integers = self._sinks(outputs)
        self.skips: Integers = self._checked_skips(skips)  # (k, 2)
        self.weight_ids = None if weight_ids is None else self._checked_weight_ids(weight_ids)
        self.fan_in: Integers = self._checked_fan_in(fan_in or {})  # (n,)

    @classmethod
    def from_edges(
        cls,
        edges: Iterable[tuple[int, int]] | npt.NDArray[Any],
        num_vertices: int | None = None,
        *,
        weight_ids: Ids | None = None,
        **named: Any,
    ) -> DAG:
        """A graph from pairs (u, v), each an edge u -> v; `weight_ids` follows the order of the pairs.

        `num_vertices` is one more than the largest number in the pairs if not given. The rest is as for `DAG`.

        >>> DAG.from_edges([(0, 1), (1, 2), (2, 0)])
        Traceback (most recent call last):
            ...
        ValueError: edges must not form a cycle, got 0 -> 1 -> 2 -> 0: remove one of these edges
        """
        pairs = _pairs("edges", edges)
        if not len(pairs):
            raise ValueError("edges must hold at least one pair (u, v), got none")
        n = int(pairs.max()) + 1 if num_vertices is None else num_vertices
        if pairs.max() >= n:
            raise ValueError(f"edges must join vertices below num_vertices = {n}, got vertex {pairs.max()}")
        order = np.lexsort((pairs[:, 0], pairs[:, 1]))
        pairs = pairs[order]
        twice = np.flatnonzero((pairs[1:] == pairs[:-1]).all(axis=1))
        if len(twice):
            u, v = pairs[twice[0]]
            raise ValueError(f"edges must be distinct, got {u} -> {v} more than once")
        if weight_ids is not None:
            weight_ids = _aligned(weight_ids, len(pairs))[order]
        ones = np.ones(len(pairs), dtype=bool)
        return cls(sp.csc_array((ones, (pairs[:, 0], pairs[:, 1])), shape=(n, n)), weight_ids=weight_ids, **named)

    @property
    def num_vertices(self) -> int:
        return int(self.adjacency.shape[0])

    @property
    def num_edges(self) -> int:
        return int(self.adjacency.nnz)

    @property
    def depth(self) -> int:
        """L: the number of layers beyond the input layer."""
        return int(self.layer.max())

    @cached_property
    def in_degree(self) -> Integers:
        """(n,) number of incoming edges."""
        degrees: Integers = np.diff(self.adjacency.indptr).astype(np.int64)
        return degrees

    @cached_property
    def out_degree(self) -> Integers:
        """(n,) number of outgoing edges."""
        return np.bincount(self.adjacency.indices, minlength=self.num_vertices).astype(np.int64)

    @cached_property
    def layers(self) -> list[Integers]:
        """The vertices of each layer by number, those of layer 0 in the order of `inputs`."""
        order = np.argsort(self.layer, kind="stable").astype(np.int64)
        later = np.split(order, np.cumsum(np.bincount(self.layer))[:-1])[1:]
        return [self.inputs, *later]

    @property
    def width(self) -> float:
        """m: the least in-degree of all neurons beyond the first layer (Def. 2.2.7); infinity where there are none."""
        beyond = self.fan_in[self.layer >= 2]
        return int(beyond.min()) if len(beyond) else math.inf

    @property
    def edges(self) -> Integers:
        """(num_edges, 2) pairs (u, v), ordered by v, then u."""
        targets = np.repeat(np.arange(self.num_vertices), self.in_degree)
        return np.stack([self.adjacency.indices.astype(np.int64), targets], axis=1)

    def sources(self, vertex: int) -> Integers:
        """The vertices with an edge into this one."""
        start, end = self.adjacency.indptr[vertex : vertex + 2]
        found: Integers = self.adjacency.indices[start:end].astype(np.int64)
        return found

    def __repr__(self) -> str:
        sizes = " + ".join(str(len(layer)) for layer in self.layers)
        return f"DAG({sizes} vertices, {self.num_edges} edges, width {self.width})"

    def _roots(self, inputs: Ids | None) -> Integers:
        roots = np.flatnonzero(self.layer == 0)
        if inputs is None:
            return roots
        named = vertex_ids("inputs", inputs, self.num_vertices)
        fed = named[self.layer[named] > 0]
        if len(fed):
            raise ValueError(f"inputs must have no incoming edges, got vertex {fed[0]} with {self.in_degree[fed[0]]}")
        missing = np.setdiff1d(roots, named)
        if len(missing):
            raise ValueError(f"inputs must name every vertex without incoming edges, vertex {missing[0]} is missing")
        return named

    def _sinks(self, outputs: Ids | None) -> Integers:
        sinks = np.flatnonzero(self.out_degree == 0)
        named = sinks if outputs is None else vertex_ids("outputs", outputs, self.num_vertices)
        used = named[self.out_degree[named] > 0]
        if len(used):
            raise ValueError(f"outputs must have no outgoing edges, got vertex {used[0]} with edges out of it")
        loose = named[self.layer[named] == 0]
        if len(loose):
            raise ValueError(
                f"outputs must be connected to an input, vertex {loose[0]} has no incoming edge: "
                "remove it, give it one, or name the outputs"
            )
        if not len(named):
            raise ValueError("outputs must name at least one vertex, got none")
        return named

    def _checked_skips(self, skips: Iterable[tuple[int, int]]) -> Integers:
        pairs = _pairs("skips", skips)
        if not len(pairs):
            return pairs
        if pairs.max() >= self.num_vertices:
            raise ValueError(f"skips must join vertices below {self.num_vertices}, got vertex {pairs.max()}")
        for u, v in pairs[(self.layer[pairs[:, 0]] >= self.layer[pairs[:, 1]]) | np.isin(pairs[:, 1], self.outputs)]:
            raise ValueError(
                f"skips must lead from an earlier layer to a hidden neuron, got ({u}, {v}) "
                f"from layer {self.layer[u]} to layer {self.layer[v]}{' (an output)' if v in self.outputs else ''}"
            )
        targets, count = np.unique(pairs[:, 1], return_counts=True)
        if count.max() > 1:
            raise ValueError(f"skips must lead to different vertices, got several to vertex {targets[count.argmax()]}")
        return pairs

    def _checked_weight_ids(self, weight_ids: Ids) -> Integers:
        ids = _aligned(weight_ids, self.num_edges)
        of_edge = np.repeat(self.layer, self.in_degree)
        _, compact = np.unique(ids, return_inverse=True)
        lowest = np.full(compact.max() + 1, self.depth + 1)
        np.minimum.at(lowest, compact, of_edge)
        apart = np.flatnonzero(of_edge > lowest[compact])
        if len(apart):
            raise ValueError(f"weight_ids must be shared within a layer only, id {ids[apart[0]]} is in several")
        return ids

    def _checked_fan_in(self, fan_in: Mapping[int, int]) -> Integers:
        full: Integers = self.in_degree.copy()
        for vertex, m in fan_in.items():
            if not 0 <= vertex < self.num_vertices or m < full[vertex]:
                raise ValueError(f"fan_in must be at least the in-degree of a vertex, got {{{vertex}: {m}}}")
            full[vertex] = m
        return full


def _canonical(adjacency: Any) -> Any:
    """A csc copy without stored zeros, sorted."""
    if not sp.issparse(adjacency):
        raise TypeError(f"adjacency must be a scipy.sparse array or matrix, got {type(adjacency).__name__}")
    if adjacency.ndim != 2 or adjacency.shape[0] != adjacency.shape[1] or adjacency.nnz == 0:
        raise ValueError(f"adjacency must be square with at least 1 edge, got {adjacency.shape}, {adjacency.nnz} edges")
    csc = sp.csc_array(adjacency.astype(bool))
    csc.sum_duplicates()
    csc.eliminate_zeros()
    return csc


def _layers(adjacency: Any) -> Integers:
    """Length of the longest path to each vertex: layer by layer, those whose sources have all been placed."""
    outgoing = sp.csr_array(adjacency)
    left = np.diff(adjacency.indptr)
    layer = np.zeros(len(left), dtype=np.int64)
    frontier, level = np.flatnonzero(left == 0), 0
    while len(frontier):
        layer[frontier] = level
        targets = outgoing[frontier].indices
        left -= np.bincount(targets, minlength=len(left)).astype(left.dtype)
        left[frontier] = -1  # placed
        frontier, level = np.flatnonzero(left == 0), level + 1
    if (left > 0).any():
        raise ValueError(f"edges must not form a cycle, got {_cycle(adjacency, left)}: remove one of these edges")
    return layer


def _cycle(adjacency: Any, left: npt.NDArray[Any]) -> str:
    """A cycle among the vertices not placed: each has a source that was not, so walk back until one repeats."""
    walk: dict[int, int] = {}  # vertex -> when it was met
    v = int(np.flatnonzero(left > 0)[0])
    while v not in walk:
        walk[v] = len(walk)
        sources = adjacency.indices[adjacency.indptr[v] : adjacency.indptr[v + 1]]
        v = int(sources[left[sources] > 0][0])
    loop = list(walk)[walk[v] :]
    return " -> ".join(map(str, [v, *reversed(loop)]))


def vertex_ids(name: str, vertices: Ids, n: int) -> Integers:
    ids = np.asarray(vertices, dtype=np.int64).reshape(-1)
    outside = ids[(ids < 0) | (ids >= n)]
    if len(outside):
        raise ValueError(f"{name} must be vertices from 0 to {n - 1}, got {outside[0]}")
    if len(np.unique(ids)) < len(ids):
        raise ValueError(f"{name} must be distinct, got {ids.tolist()}")
    return ids


def _pairs(name: str, pairs: Iterable[tuple[int, int]] | npt.NDArray[Any]) -> Integers:
    array = np.asarray(pairs if isinstance(pairs, np.ndarray) else list(pairs))
    if not array.size:
        return np.zeros((0, 2), dtype=np.int64)
    if array.ndim != 2 or array.shape[1] != 2 or not np.issubdtype(array.dtype, np.integer) or array.min() < 0:
        raise ValueError(
            f"{name} must be pairs of vertex numbers from 0 on, got an array {array.shape} of {array.dtype}"
        )
    return array.astype(np.int64)


def _aligned(weight_ids: Ids, num_edges: int) -> Integers:
    ids = np.asarray(weight_ids)
    if ids.shape != (num_edges,) or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"weight_ids must be {num_edges} integers, one for each edge, got {ids.shape} of {ids.dtype}")
    return ids.astype(np.int64)
