"""The Hessian of a criterion with respect to its inputs: in closed form where it is known, else through autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..link import LossCall
from ..replay import precise
from ..trees import map_tensors
from .closed_forms import closed_form


class OutputHessian(Protocol):
    """Products with weight * d^2 loss / dz^2 at the criterion inputs z of one loss call.

    The reduction (mean or sum) is the criterion's own and is contained.
    """

    def __call__(self, tangents: Sequence[Tensor]) -> list[Tensor]:
        """H t, one tensor per criterion input."""

    def curved(self) -> bool:
        """Is there any second derivative at these inputs?"""

    def as_multiple_of_identity(self) -> float | None:
        """h if H = h I (a squared error; h = 2/N for a mean over N elements), else None."""


def output_hessian(call: LossCall) -> OutputHessian:
    """Of one loss call, at the outputs of the step. Only inside `preserved`."""
    return closed_form(call) or AutogradHessian(call)


class AutogradHessian:
    """Exact for any twice differentiable criterion, by differentiating its gradient. Keeps the criterion's graph."""

    def __init__(self, call: LossCall) -> None:
        assert call.criterion is not None and call.weight is not None
        self._weight = call.weight
        self._z = [precise(z.detach().clone()) for z in call.inputs]
        for z in self._z:
            z.requires_grad_()
        copies = {id(old): new for old, new in zip(call.inputs, self._z, strict=True)}
        args, kwargs = map_tensors((call.args, call.kwargs), lambda t: copies.get(id(t), precise(t.detach())))
        loss = call.criterion.forward(*args, **kwargs)
        gradients = torch.autograd.grad(loss, self._z, create_graph=True, allow_unused=True)
        # A gradient without a graph is constant: the criterion is linear in that input.
        self._curved = [(i, g) for i, g in enumerate(gradients) if g is not None and g.requires_grad]

    def __call__(self, tangents: Sequence[Tensor]) -> list[Tensor]:
        """H t, one tensor per criterion input."""
        zeros = [torch.zeros_like(z) for z in self._z]
        if not self._curved:
            return zeros
        got = torch.autograd.grad(
            [g for _, g in self._curved],
            self._z,
            [tangents[i].to(g.dtype) for i, g in self._curved],
            retain_graph=True,
            allow_unused=True,
        )
        return [z if h is None else h * self._weight for h, z in zip(got, zeros, strict=True)]

    def curved(self) -> bool:
        """Is there any second derivative at these inputs? A random product decides."""
        generator = torch.Generator().manual_seed(0)
        t = [torch.randn(z.shape, generator=generator, dtype=torch.float64).to(z) for z in self._z]
        return any(bool(h.any()) for h in self(t))

    def as_multiple_of_identity(self) -> float | None:
        """h if H = h I (a squared error; h = 2/N for a mean over N elements), else None. Two random products decide."""
        generator = torch.Generator().manual_seed(0)
        ratio: float | None = None
        for _ in range(2):
            t = [torch.randn(z.shape, generator=generator, dtype=torch.float64).to(z) for z in self._z]
            flat_t = torch.cat([x.flatten().double() for x in t])
            flat_h = torch.cat([x.flatten().double() for x in self(t)])
            h = float(flat_t @ flat_h / (flat_t @ flat_t))
            if not h > 0 or float((flat_h - h * flat_t).norm()) > 1e-5 * float(flat_h.norm()):
                return None
            if ratio is not None and abs(h - ratio) > 1e-5 * ratio:
                return None
            ratio = h
        return ratio
