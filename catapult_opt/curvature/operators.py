"""Curvature operators on parameter space, matrix-free.

All act on D^(1/2) A D^(1/2), where A is the GGN or the Hessian of the step's loss and D the diagonal of relative rates
(1 where all parameters have the same): its top eigenvalue bounds the common rate of an update with step rate * D.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..capture import LossCall, loss_of
from ..distributed import ALONE, Group, local
from ..replay import ForwardCall, precise, replay
from ..trees import tensors_in
from .output_hessian import OutputHessian
from .vectors import Vector, dot, norm, random_unit, scaled

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
# Compiled code rounds differently (in bfloat16 by 1 %); another dropout mask moves the outputs by more.
_OTHER_MASK = 0.03
_STEP_RETRIES = 2
# Central differences under a preconditioner: change of the gradient by a step, relative to its size; lowest, target and
# highest, in single precision and in double.
_CHANGE = ((1e-3, 1e-2, 5e-2), (1e-6, 1e-4, 1e-2))


@dataclass
class StepSize:
    """Finite-difference step relative to the norm of the parameters, calibrated from use to use (0: not yet)."""

    relative: float = 0.0


class _JacobianOperator:
    """What the operators built on J share.

    Args:
        model, params, calls: what was captured.
        step: finite-difference step, calibrated in place.
        scale: relative rate of each parameter.
        engine: how J v is found, see `ENGINES`.
        group: the processes that train together; products are those with the curvature of their common loss.
    """

    semidefinite = True

    def __init__(
        self,
        model: nn.Module,
        params: Sequence[Tensor],
        calls: Sequence[LossCall],
        step: StepSize,
        scale: Scale = None,
        engine: str = "finite-difference",
        group: Group = ALONE,
    ) -> None:
        self._model, self._params, self._calls, self._group = model, list(params), calls, group
        self._mover = _Mover(self._params, scale, group)
        self._linearize: Linearizer = ENGINES[engine](model, self._mover, calls, step)

    def _product(self, total: Pulled) -> Vector:
        """D^(1/2) times the mean over the ranks of J^T s; the weights back in place, as those moved take memory."""
        self._mover.back()
        return self._mover.scaled(self._group.averaged(_whole(total, self._params)))


class GGN(_JacobianOperator):
    """Generalized Gauss-Newton matrix of the step's loss: sum over its terms of J^T H_out J (weights contained).

    Only inside `preserved`.
    """

    _begun: tuple[Vector, list[Tensor], Pulled] | None = None  # a product of which only v.G v was asked so far

    @functools.cached_property
    def hessians(self) -> list[OutputHessian]:
        """H_out of every loss call; built once, at the weights of the step."""
        return [OutputHessian(call) for call in self._calls]

    def quadratic(self, v: Vector) -> float:
        """v.G v = sum of t.H_out t with t = J v: the forward pass of a product.

        `matvec` of the very same v then goes on from there; not where there are several loss calls, whose graphs would
        all have to be kept.
        """
        value = 0.0
        for outputs, cotangents, tangents in self._terms(v):
            self._begun = (v, outputs, cotangents) if len(self._calls) == 1 else None
            pairs = [(s.double(), t.double()) for s, t in zip(cotangents, tangents, strict=True) if s is not None]
            value += float(dot(*zip(*pairs, strict=True))) if pairs else 0.0
        return self._group.sum(value) / self._group.size

    def matvec(self, v: Vector) -> Vector:
        """G v."""
        begun, self._begun = self._begun, None
        if begun is not None and begun[0] is v:
            return self._product(_pull(*begun[1:], self._params, self._group))
        total: Pulled = []
        for outputs, cotangents, _ in self._terms(v):
            total = _sum(total, _pull(outputs, cotangents, self._params, self._group))
        return self._product(total)

    def _terms(self, v: Vector) -> Iterator[tuple[list[Tensor], Pulled, list[Tensor]]]:
        """For every loss call the outputs with their graph, H_out J v there, and J v."""
        for call, hessian, (outputs, tangents) in zip(self._calls, self.hessians, self._linearize(v), strict=True):
            yield outputs, _through_loss(call, hessian, tangents), tangents


class NTK(_JacobianOperator):
    """Tangent kernel K = J J^T of the captured outputs: a vector has one tensor per model output, shaped like it.

    Its non-zero eigenvalues are those of the GGN of (1/2) sum (f - y)^2. A product is a backward pass and a
    linearization. Only inside `preserved`.
    """

    def matvec(self, u: Vector) -> Vector:
        """K u."""
        self._mover.back()
        outputs = [t for call in self._calls for t in _outputs(self._model, call)]
        pulled = _whole(_pull(outputs, u, self._params), self._params)
        size = float(norm(pulled))
        if size == 0:
            return [torch.zeros_like(x) for x in u]
        direction = [x / size for x in self._mover.scaled(pulled)]
        return [t * size for _, tangents in self._linearize(direction) for t in tangents]


# For each loss call the model's outputs, with a graph to pull cotangents back through, and their change along v.
Linearized = Iterator[tuple[list[Tensor], list[Tensor]]]


class Linearizer(Protocol):
    """J v for every loss call; v -> pairs (outputs, J v)."""

    def __init__(self, model: nn.Module, mover: _Mover, calls: Sequence[LossCall], step: StepSize) -> None: ...

    def __call__(self, v: Vector) -> Linearized: ...


class FiniteDifference:
    """J v = (f(w + eps v) - f(w)) / eps: one plain forward pass, whose graph then serves the backward pass.

    Works on whatever runs: no operation needs a forward-mode rule or a second derivative. f(w) is the training step's
    own output where that still stands.
    """

    def __init__(self, model: nn.Module, mover: _Mover, calls: Sequence[LossCall], step: StepSize) -> None:
        self._model, self._mover, self._calls, self._step = model, mover, calls, step
        self._bases = [[t for f in call.forwards for t in self._base(f)] for call in calls]
        self._spread = _spread(self._bases[0]) if calls else 0.0

    def __call__(self, v: Vector) -> Linearized:
        if not self._calls:  # a process without data
            return
        eps, outputs = self._moved(v)
        for i, (call, bases) in enumerate(zip(self._calls, self._bases, strict=True)):
            if i > 0:
                outputs = _outputs(self._model, call)
            yield outputs, [(o.detach() - b) / eps for o, b in zip(outputs, bases, strict=True)]

    def _moved(self, v: Vector) -> tuple[float, list[Tensor]]:
        """A step eps, and the first loss call's outputs at w + eps v, such that they move by about the target.

        Checked for every direction: a random one moves the outputs up to a hundred times less than the top eigenvector,
        along which its step is far from linear. A step that fits, as the last measurement's does when started from its
        vector, costs nothing; another costs one more forward pass.
        """
        first, target = _STEP.get(v[0].dtype, _STEP_DEFAULT), _TARGET.get(v[0].dtype, _TARGET_DEFAULT)
        self._step.relative = self._step.relative or first
        for retries in range(_STEP_RETRIES, -1, -1):
            eps = self._step.relative * self._mover.norm
            self._mover.move(v, eps)
            outputs = _outputs(self._model, self._calls[0])
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

    def __init__(self, model: nn.Module, mover: _Mover, calls: Sequence[LossCall], step: StepSize) -> None:
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

    def __init__(self, model: nn.Module, mover: _Mover, calls: Sequence[LossCall], step: StepSize) -> None:
        self._model, self._mover, self._calls = model, mover, calls

    def __call__(self, v: Vector) -> Linearized:
        directions = self._mover.scaled(v)
        for call in self._calls:
            outputs = _outputs(self._model, call)
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


class LossHessian:
    """Hessian of the loss that the model itself returns. Only inside `preserved`.

    By central differences of its gradient, which works on everything at two gradients a product; or, with
    engine="double-backward", by differentiating the gradient: exact, where every operation has a second derivative.
    """

    semidefinite = False

    def __init__(
        self,
        model: nn.Module,
        params: Sequence[Tensor],
        calls: Sequence[LossCall],
        outputs: Any = None,
        scale: Scale = None,
        engine: str = "finite-difference",
        group: Group = ALONE,
    ) -> None:
        self._model, self._params, self._calls, self._outputs = model, list(params), calls, outputs
        self._engine, self._group, self._relative = engine, group, 0.0
        self._mover = _Mover(self._params, scale, group)

    def matvec(self, v: Vector) -> Vector:
        """H v."""
        product = self._exact(v) if self._engine == "double-backward" else self._difference(v)
        return self._mover.scaled(self._group.averaged(product))

    def _exact(self, v: Vector) -> Vector:
        directions = self._mover.scaled(v)
        total: Pulled = []
        for loss in self._losses():
            gradient = torch.autograd.grad(loss, self._params, create_graph=True, allow_unused=True)
            used = [(g, d) for g, d in zip(gradient, directions, strict=True) if g is not None and g.requires_grad]
            if used:
                total = _sum(total, _pull([g for g, _ in used], [d for _, d in used], self._params))
        return _whole(total, self._params)

    def _difference(self, v: Vector) -> Vector:
        """(grad L(w + eps v) - grad L(w - eps v)) / (2 eps).

        Under a preconditioner D^(1/2) v may be a million times longer than v, along directions that matter or not: the
        step is then one that changes the gradient by about the target.
        """
        double = v[0].dtype == torch.float64
        self._relative = self._relative or (1e-6 if double else 1e-4)
        lowest, target, highest = _CHANGE[double]
        for retries in range(_STEP_RETRIES, -1, -1):
            eps = self._mover.norm * self._relative
            plus, minus = self._gradient(v, eps), self._gradient(v, -eps)
            if self._mover.uniform or retries == 0:
                break
            change = self._change(plus, minus)
            if not change > 0 or lowest <= change <= highest:
                break
            self._relative *= target / change
        return [(a - b) / (2 * eps) for a, b in zip(plus, minus, strict=True)]

    def _change(self, plus: Vector, minus: Vector) -> float:
        """Of the gradient, relative to its size, as the preconditioned problem sees it."""
        pairs = list(zip(plus, minus, strict=True))
        moved = norm(self._mover.scaled([a - b for a, b in pairs]), self._group.total)
        return 2 * float(moved) / (float(norm(self._mover.scaled([a + b for a, b in pairs]), self._group.total)) or 1.0)

    def _gradient(self, v: Vector, eps: float) -> Vector:
        self._mover.move(v, eps)
        total: Pulled = []
        for loss in self._losses():
            total = _sum(total, _pull([loss], [torch.ones_like(loss)], self._params, self._group))
        return _whole(total, self._params)

    def _losses(self) -> Iterator[Tensor]:
        for call in self._calls:
            assert call.weight is not None
            for forward in call.forwards:
                yield loss_of(replay(self._model, forward), self._outputs) * call.weight


class _Mover:
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


def reproduces(model: nn.Module, params: Sequence[Tensor], calls: Sequence[LossCall]) -> bool:
    """Does the model, run again at the same weights and random state, give the same outputs twice?

    Differences of outputs mean nothing where it does not (noise from a generator of its own). Only inside `preserved`.
    """
    if not calls:
        return True
    with torch.no_grad():
        runs = [[t.clone() for call in calls for t in _outputs(model, call)] for _ in range(2)]
    return _relative_move(runs[0], runs[1]) < _TARGET.get(params[0].dtype, _TARGET_DEFAULT) / 10


def other_masks(model: nn.Module, calls: Sequence[LossCall]) -> bool:
    """Does the loop call a compiled version of the model whose dropout masks are others? Only inside `preserved`."""
    with torch.no_grad():
        for f in (f for call in calls for f in call.forwards if f.compiled and f.random and f.base is not None):
            again = selected(replay(model, f), f)
            if _relative_move([precise(t) for t in f.base or []], again) > _OTHER_MASK:
                return True
    return False


def adjoint_error(
    model: nn.Module, params: Sequence[Tensor], call: LossCall, engine: str, group: Group = ALONE
) -> float:
    """|u.(J v) / (J^T u).v - 1| for a random u and v = J^T u: how far the engine's J v is from the backward pass.

    Of this process' own J, or, where weights are sharded, of all of them. Only inside `preserved`.
    """
    mover = _Mover(params, None, group)
    mover.back()
    outputs = _outputs(model, call)
    u = random_unit(outputs)
    pulled = _whole(_pull(outputs, u, params, group), params)
    length = float(norm(pulled, group.total))
    if length == 0:
        return 0.0
    linearize = ENGINES[engine](model, mover, [call], StepSize())
    for _, tangents in linearize(scaled(pulled, 1.0 / length)):
        pushed = group.common(float(dot(u, tangents)))
    return abs(pushed / length - 1.0)


def _outputs(model: nn.Module, call: LossCall) -> list[Tensor]:
    return [t for f in call.forwards for t in selected(replay(model, f), f)]


def selected(output: Any, forward: ForwardCall) -> list[Tensor]:
    every = tensors_in(output)
    return [every[i] for i in forward.places]


def _through_loss(call: LossCall, hessian: OutputHessian, tangents: list[Tensor]) -> list[Tensor | None]:
    """H_out t at the model's outputs: through the user's code, the criterion, and back."""
    outputs = [o for f in call.forwards for o in f.outputs]
    if call.link is not None:
        return list(call.link.vjp(hessian(call.link.jvp(tangents))))
    at = {id(o): t for o, t in zip(outputs, tangents, strict=True)}
    products = hessian([at[id(z)] for z in call.inputs])
    back = {id(z): s for z, s in zip(call.inputs, products, strict=True)}
    return [back.get(id(o)) for o in outputs]


def _pull(
    outputs: Sequence[Tensor], cotangents: Sequence[Tensor | None], params: Sequence[Tensor], group: Group = ALONE
) -> Pulled:
    """J^T s, without touching .grad."""
    pairs = [(o, s.to(o.dtype)) for o, s in zip(outputs, cotangents, strict=True) if s is not None and o.requires_grad]
    if not pairs:
        return []
    got = group.gradients([o for o, _ in pairs], [s for _, s in pairs], params)
    return [g.to_dense() if g is not None and g.is_sparse else g for g in got]


def _sum(a: Pulled, b: Pulled) -> Pulled:
    if not (a and b):
        return a or b
    return [y if x is None else x if y is None else x + y for x, y in zip(a, b, strict=True)]


def _whole(pulled: Pulled, params: Sequence[Tensor]) -> Vector:
    found = pulled or [None] * len(params)
    return [torch.zeros_like(local(p)) if x is None else x for x, p in zip(found, params, strict=True)]


def _relative_move(outputs: Sequence[Tensor], bases: Sequence[Tensor]) -> float:
    """rms change of the outputs over their spread (their size where they have none)."""
    return _rms([o - b for o, b in zip(outputs, bases, strict=True)]) / (_spread(bases) or math.inf)


def _spread(bases: Sequence[Tensor]) -> float:
    """Standard deviation, at least 3 % of the rms; 0 for outputs of zero: differences have no rounding error then."""
    base = torch.cat([b.flatten().double() for b in bases])
    return max(float(base.std(correction=0)), 0.03 * float(base.square().mean().sqrt()))


def _rms(tensors: Sequence[Tensor]) -> float:
    return float(norm(tensors)) / math.sqrt(sum(t.numel() for t in tensors))
