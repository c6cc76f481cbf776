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
    """A unit vector of Gaussian direction from generators of its own: the global random state is not touched."""
    generators = {device: torch.Generator(device).manual_seed(seed) for device in {x.device for x in like}}
    vector = [torch.empty_like(x, requires_grad=False).normal_(generator=generators[x.device]) for x in like]
    factor = 1.0 / float(norm(vector, total))
    for x in vector:
        x.mul_(factor)
    return vector


class Layout:
    """A vector as one flat tensor for each dtype and device: few long operations in place of many short ones."""

    def __init__(self, like: Sequence[Tensor]) -> None:
        self._shapes = [x.shape for x in like]
        kinds = [(x.dtype, x.device) for x in like]
        self._places = [[i for i, other in enumerate(kinds) if other == kind] for kind in dict.fromkeys(kinds)]

    def flat(self, vector: Sequence[Tensor]) -> Vector:
        """In memory of its own."""
        return [torch.cat([vector[i].reshape(-1) for i in places]) for places in self._places]

    def taken(self, vector: Vector) -> Vector:
        """In memory of its own, where the list is emptied on the way, so that no second copy is held."""
        parts = dict(enumerate(vector))
        vector.clear()
        found = []
        for places in self._places:
            first = parts[places[0]]
            found.append(torch.empty(sum(parts[i].numel() for i in places), dtype=first.dtype, device=first.device))
            del first
            for i, piece in zip(places, torch.split(found[-1], [parts[i].numel() for i in places]), strict=True):
                piece.copy_(parts.pop(i).reshape(-1))
        return found

    def parts(self, flat: Vector) -> Vector:
        """One tensor per parameter, sharing the memory of the flat ones."""
        found: dict[int, Tensor] = {}
        for tensor, places in zip(flat, self._places, strict=True):
            pieces = torch.split(tensor, [self._shapes[i].numel() for i in places])
            found |= {i: piece.view(self._shapes[i]) for i, piece in zip(places, pieces, strict=True)}
        return [found[i] for i in range(len(self._shapes))]
