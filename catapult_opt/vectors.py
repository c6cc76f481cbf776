"""Arithmetic on vectors in parameter space, kept as one tensor per parameter so that they shard with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Vector = list[Tensor]
Total = Callable[[Tensor], Tensor]  # sums inner products over the processes, where each holds a part of the vectors


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Inner product of two vectors, a 0-d tensor on the first tensor's device."""
    return dots([a], b)[0]


def dots(vectors: Sequence[Sequence[Tensor]], b: Sequence[Tensor]) -> Tensor:
    """Inner products of several vectors with one, a tensor on the first tensor's device."""
    flat = [y.reshape(-1) for y in b]
    parts = [torch.dot(x.reshape(-1), y) for a in vectors for x, y in zip(a, flat, strict=True)]  # no temporary
    return torch.stack([part.to(parts[0].device) for part in parts]).view(len(vectors), -1).sum(1)


def norm(a: Sequence[Tensor], total: Total | None = None) -> Tensor:
    """Euclidean norm, a 0-d tensor; `total` sums squares over the processes where each holds a part."""
    part = torch.nn.utils.get_total_norm(list(a))
    return part if total is None else total(part**2).sqrt()


def scaled(a: Sequence[Tensor], factor: float) -> Vector:
    """The vector times a number."""
    return [x * factor for x in a]


def add_(total: Vector, vectors: Sequence[Vector], coefficients: Sequence[float]) -> None:
    """total += sum_i coefficients[i] * vectors[i], in place."""
    for vector, coefficient in zip(vectors, coefficients, strict=True):
        for x, y in zip(total, vector, strict=True):
            x.add_(y, alpha=coefficient)


def combine(vectors: Sequence[Vector], coefficients: Sequence[float]) -> Vector:
    """The linear combination sum_i coefficients[i] * vectors[i]."""
    total = scaled(vectors[0], coefficients[0])
    add_(total, vectors[1:], coefficients[1:])
    return total


def random_unit(like: Sequence[Tensor], seed: int = 0, total: Total | None = None) -> Vector:
    """A unit vector of Gaussian direction from its own generator: the global random state is not touched."""
    generator = torch.Generator().manual_seed(seed)
    vector = [torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device) for x in like]
    return scaled(vector, 1.0 / float(norm(vector, total)))


class Layout:
    """A vector as one flat tensor for each dtype and device: few long operations in place of many short ones."""

    def __init__(self, like: Sequence[Tensor]) -> None:
        self._shapes = [x.shape for x in like]
        kinds = [(x.dtype, x.device) for x in like]
        self._places = [[i for i, other in enumerate(kinds) if other == kind] for kind in dict.fromkeys(kinds)]

    def flat(self, vector: Sequence[Tensor]) -> Vector:
        """In memory of its own."""
        return [torch.cat([vector[i].reshape(-1) for i in places]) for places in self._places]

    def parts(self, flat: Vector) -> Vector:
        """One tensor per parameter, sharing the memory of the flat ones."""
        found: dict[int, Tensor] = {}
        for tensor, places in zip(flat, self._places, strict=True):
            pieces = torch.split(tensor, [self._shapes[i].numel() for i in places])
            found |= {i: piece.view(self._shapes[i]) for i, piece in zip(places, pieces, strict=True)}
        return [found[i] for i in range(len(self._shapes))]
