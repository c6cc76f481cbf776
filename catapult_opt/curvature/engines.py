"""Engines: ways to find J v, the change of the model's outputs along a direction v in parameter space.

Also what they share with the operators: moving the weights, running the model again, and pulling cotangents back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..distributed import ALONE, Group, local
from ..link import LossCall
from ..replay import ForwardCall, replay
from ..trees import tensors_in
from ..vectors import Vector, norm

Scale = Sequence[float | Tensor] | None

# A vector in the making; None: zeros. What autograd returns may be memory of others: not to be changed.
Pulled = list[Tensor | None]

# Size of the step's effect on the outputs, relative to their spread: large against rounding, small against curvature.
# In float32, 1e-4 to 1e-3 leave errors of lambda below 1e-3 on calm networks; in the middle of a spike, where the
# network is most curved, 2e-4 leaves about 1 %, 5e-4 up to 10 % and 2e-3 up to 26 % (benchmarks/models.py).
_TARGET = {torch.float64: 1e-6}
_TARGET_DEFAULT = 2e-4
# First relative size of the step in parameter space, and how far the calibration may move it.
_STEP = {torch.float64: 1e-8}
_STEP_DEFAULT = 1e-5
_STEP_RANGE = 100.0
STEP_RETRIES = 2


def step_target(dtype: torch.dtype) -> float:
    """Relative change of the outputs that a finite-difference step in this precision aims at."""
    return _TARGET.get(dtype, _TARGET_DEFAULT)


@dataclass
class StepSize:
    """Finite-difference step relative to the norm of the parameters, calibrated from use to use (0: not yet)."""

    relative: float = 0.0


class Mover:
    """Puts the parameters at w + eps D^(1/2) v."""

    def __init__(self, params: Sequence[Tensor], scale: Scale, group: Group = ALONE) -> None:
        self.params, self.group = list(params), group
        self._origin = group.weights(self.params)
        self._roots = None if scale is None else [s**0.5 for s in scale]
        self.norm = float(norm(self._origin, group.total)) or 1.0

    def move(self, v: Vector, eps: float) -> None:
        # One by one, so that those of the last move are let go on the way.
        roots = self._roots or [None] * len(v)
        moves = zip(self._origin, v, roots, strict=True)
        self.group.put(self.params, (torch.add(w, x if r is None else x * r, alpha=eps) for w, x, r in moves))

    def back(self) -> None:
        """To w itself."""
        self.group.put(self.params, self._origin)

    @property
    def uniform(self) -> bool:
        """Is D one number per parameter, as group rates are?"""
        return self._roots is None or not any(isinstance(root, Tensor) for root in self._roots)

    def scaled(self, v: Vector) -> Vector:
        if self._roots is None:
            return v
        return [x * root for x, root in zip(v, self._roots, strict=True)]


# For each loss call the model's outputs, with a graph to pull cotangents back through, and their change along v.
Linearized = Iterator[tuple[list[Tensor], list[Tensor]]]


class Linearizer(Protocol):
    """J v for every loss call; v -> pairs (outputs, J v)."""

    def __init__(self, model: nn.Module, mover: Mover, calls: Sequence[LossCall], step: StepSize) -> None: ...

    def __call__(self, v: Vector) -> Linearized: ...


class FiniteDifference:
    """J v = (f(w + eps v) - f(w)) / eps: one plain forward pass, whose graph then serves the backward pass.

    Works on whatever runs: no operation needs a forward-mode rule or a second derivative. f(w) is the training step's
    own output where the weights are still the same.
    """

    def __init__(self, model: nn.Module, mover: Mover, calls: Sequence[LossCall], step: StepSize) -> None:
        self._model, self._mover, self._calls, self._step = model, mover, calls, step
        self._bases = [[t for f in call.forwards for t in self._base(f)] for call in calls]
        self._spread = _spread(self._bases[0]) if calls else 0.0

    def __call__(self, v: Vector) -> Linearized:
        if not self._calls:  # a process without data
            return
        eps, outputs = self._moved(v)
        for i, (call, bases) in enumerate(zip(self._calls, self._bases, strict=True)):
            if i > 0:
                outputs = outputs_of(self._model, call)
            yield outputs, [(o.detach() - b).div_(eps) for o, b in zip(outputs, bases, strict=True)]

    def _moved(self, v: Vector) -> tuple[float, list[Tensor]]:
        """A step eps, and the first loss call's outputs at w + eps v, such that they move by about the target.

        Checked for every direction: a random one moves the outputs up to a hundred times less than the top eigenvector,
        along which its step is far from linear. A step that fits, as the last measurement's does when started from its
        vector, costs nothing; another costs one more forward pass.
        """
        first, target = _STEP.get(v[0].dtype, _STEP_DEFAULT), step_target(v[0].dtype)
        self._step.relative = self._step.relative or first
        for retries in range(STEP_RETRIES, -1, -1):
            eps = self._step.relative * self._mover.norm
            self._mover.move(v, eps)
            outputs = outputs_of(self._model, self._calls[0])
            move = _rms([o.detach() - b for o, b in zip(outputs, self._bases[0], strict=True)])
            moved = self._mover.group.common(move / (self._spread or math.inf))
            fits = target / 100 <= moved <= target * 3 or moved == 0 or not math.isfinite(moved)
            better = min(max(self._step.relative * target / (moved or 1.0), first / _STEP_RANGE), first * _STEP_RANGE)
            if fits or retries == 0 or better == self._step.relative:
                break
            self._step.relative = better
            outputs = []  # frees the graph before the next one is built
        return eps, outputs

    def _base(self, forward: ForwardCall) -> list[Tensor]:
        if forward.base is not None and forward.base_is_current():
            return forward.base
        with torch.no_grad():
            return [t.clone() for t in selected(replay(self._model, forward), forward)]


class ForwardMode:
    """J v by forward-mode differentiation (dual numbers): exact where every operation has a rule, at twice the cost."""

    def __init__(self, model: nn.Module, mover: Mover, calls: Sequence[LossCall], step: StepSize) -> None:
        self._model, self._mover, self._calls = model, mover, calls
        ids = {id(p): i for i, p in enumerate(mover.params)}
        self._names = {name: ids[id(p)] for name, p in model.named_parameters() if id(p) in ids}

    def __call__(self, v: Vector) -> Linearized:
        directions = self._mover.scaled(v)
        params = self._mover.params
        for call in self._calls:
            with forward_ad.dual_level():
                duals = {
                    n: forward_ad.make_dual(params[i], directions[i])  # type: ignore[no-untyped-call]
                    for n, i in self._names.items()
                }
                pairs = [
                    forward_ad.unpack_dual(t)  # type: ignore[no-untyped-call]
                    for f in call.forwards
                    for t in selected(replay(self._model, f, duals), f)
                ]
                tangents = [torch.zeros_like(p) if t is None else t.detach() for p, t in pairs]
                yield [p for p, _ in pairs], tangents


class DoubleBackward:
    """J v as the derivative of u -> J^T u, which is linear in u: exact, where every backward pass is differentiable."""

    def __init__(self, model: nn.Module, mover: Mover, calls: Sequence[LossCall], step: StepSize) -> None:
        self._model, self._mover, self._calls = model, mover, calls

    def __call__(self, v: Vector) -> Linearized:
        directions = self._mover.scaled(v)
        for call in self._calls:
            outputs = outputs_of(self._model, call)
            u = [torch.zeros_like(o, requires_grad=True) for o in outputs]
            pulled = torch.autograd.grad(outputs, self._mover.params, u, create_graph=True, allow_unused=True)
            used = [(g, d) for g, d in zip(pulled, directions, strict=True) if g is not None and g.requires_grad]
            got = torch.autograd.grad(
                [g for g, _ in used], u, [d for _, d in used], retain_graph=True, allow_unused=True
            )
            yield outputs, [torch.zeros_like(o) if t is None else t for t, o in zip(got, outputs, strict=True)]


FINITE_DIFFERENCE = "finite-difference"
ENGINES: dict[str, type[Linearizer]] = {
    FINITE_DIFFERENCE: FiniteDifference,
    "forward": ForwardMode,
    "double-backward": DoubleBackward,
}


def outputs_of(model: nn.Module, call: LossCall) -> list[Tensor]:
    return [t for f in call.forwards for t in selected(replay(model, f), f)]


def selected(output: Any, forward: ForwardCall) -> list[Tensor]:
    every = tensors_in(output)
    return [every[i] for i in forward.places]


def pull_back(
    outputs: Sequence[Tensor], cotangents: Sequence[Tensor | None], params: Sequence[Tensor], group: Group = ALONE
) -> Pulled:
    """J^T s, without touching .grad."""
    pairs = [(o, s.to(o.dtype)) for o, s in zip(outputs, cotangents, strict=True) if s is not None and o.requires_grad]
    if not pairs:
        return []
    got = group.gradients([o for o, _ in pairs], [s for _, s in pairs], params)
    return [g.to_dense() if g is not None and g.is_sparse else g for g in got]


def add_pulled(a: Pulled, b: Pulled) -> Pulled:
    if not (a and b):
        return a or b
    return [y if x is None else x if y is None else x + y for x, y in zip(a, b, strict=True)]


def with_zeros(pulled: Pulled, params: Sequence[Tensor]) -> Vector:
    found = pulled or [None] * len(params)
    return [torch.zeros_like(local(p)) if x is None else x for x, p in zip(found, params, strict=True)]


def relative_move(outputs: Sequence[Tensor], bases: Sequence[Tensor]) -> float:
    """rms change of the outputs over their spread (their size where they have none)."""
    return _rms([o - b for o, b in zip(outputs, bases, strict=True)]) / (_spread(bases) or math.inf)


def _spread(bases: Sequence[Tensor]) -> float:
    """Standard deviation, at least 30 % of the rms: where outputs are alike, a smaller change drowns in their rounding.

    0 for outputs of zero: differences have no rounding error then.
    """
    base = torch.cat([b.flatten().double() for b in bases])
    return max(float(base.std(correction=0)), 0.3 * float(base.square().mean().sqrt()))


def _rms(tensors: Sequence[Tensor]) -> float:
    return float(norm(tensors)) / math.sqrt(sum(t.numel() for t in tensors))
