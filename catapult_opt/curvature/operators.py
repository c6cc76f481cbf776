"""Curvature operators on parameter space, matrix-free.

All act on D^(1/2) A D^(1/2), where A is the GGN or the Hessian of the step's loss and D the diagonal of relative rates
(1 where all parameters have the same): its top eigenvalue bounds the common rate of an update with step rate * D.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..criterion import loss_of
from ..distributed import ALONE, Group
from ..link import LossCall
from ..replay import precise, replay
from ..vectors import Vector, dot, norm, random_unit, scaled
from .engines import (
    ENGINES,
    FINITE_DIFFERENCE,
    STEP_RETRIES,
    Linearizer,
    Mover,
    Pulled,
    Scale,
    StepSize,
    add_pulled,
    outputs_of,
    pull_back,
    relative_move,
    selected,
    step_target,
    with_zeros,
)
from .output_hessian import OutputHessian, output_hessian

# Compiled code rounds differently (in bfloat16 by 1 %); another dropout mask moves the outputs by more.
_OTHER_MASK = 0.03
# Central differences under a preconditioner: change of the gradient by a step, relative to its size; lowest, target and
# highest, in single precision and in double.
_CHANGE = ((1e-3, 1e-2, 5e-2), (1e-6, 1e-4, 1e-2))


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
        engine: str = FINITE_DIFFERENCE,
        group: Group = ALONE,
    ) -> None:
        self._model, self._params, self._calls, self._group = model, list(params), calls, group
        self._mover = Mover(self._params, scale, group)
        self._linearize: Linearizer = ENGINES[engine](model, self._mover, calls, step)

    def _product(self, total: Pulled) -> Vector:
        """D^(1/2) times the mean over the ranks of J^T s; the weights back in place, as those moved take memory."""
        self._mover.back()
        return self._mover.scaled(self._group.averaged(with_zeros(total, self._params)))


class GGN(_JacobianOperator):
    """Generalized Gauss-Newton matrix of the step's loss: sum over its terms of J^T H_out J (weights contained).

    Only inside `preserved`.
    """

    @functools.cached_property
    def hessians(self) -> list[OutputHessian]:
        """H_out of every loss call; built once, at the weights of the step."""
        return [output_hessian(call) for call in self._calls]

    def matvec(self, v: Vector) -> Vector:
        """G v."""
        total: Pulled = []
        for call, hessian, (outputs, tangents) in zip(self._calls, self.hessians, self._linearize(v), strict=True):
            cotangents = _through_loss(call, hessian, tangents)
            total = add_pulled(total, pull_back(outputs, cotangents, self._params, self._group))
        return self._product(total)


class NTK(_JacobianOperator):
    """Tangent kernel K = J J^T of the captured outputs: a vector has one tensor per model output, shaped like it.

    Its non-zero eigenvalues are those of the GGN of (1/2) sum (f - y)^2. A product is a backward pass and a
    linearization. Only inside `preserved`.
    """

    def matvec(self, u: Vector) -> Vector:
        """K u."""
        self._mover.back()
        outputs = [t for call in self._calls for t in outputs_of(self._model, call)]
        pulled = with_zeros(pull_back(outputs, u, self._params), self._params)
        size = float(norm(pulled))
        if size == 0:
            return [torch.zeros_like(x) for x in u]
        direction = [x / size for x in self._mover.scaled(pulled)]
        return [t * size for _, tangents in self._linearize(direction) for t in tangents]


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
        engine: str = FINITE_DIFFERENCE,
        group: Group = ALONE,
    ) -> None:
        self._model, self._params, self._calls, self._outputs = model, list(params), calls, outputs
        self._engine, self._group, self._relative = engine, group, 0.0
        self._mover = Mover(self._params, scale, group)

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
                total = add_pulled(total, pull_back([g for g, _ in used], [d for _, d in used], self._params))
        return with_zeros(total, self._params)

    def _difference(self, v: Vector) -> Vector:
        """(grad L(w + eps v) - grad L(w - eps v)) / (2 eps).

        Under a preconditioner D^(1/2) v may be a million times longer than v, along directions that matter or not: the
        step is then one that changes the gradient by about the target.
        """
        double = v[0].dtype == torch.float64
        self._relative = self._relative or (1e-6 if double else 1e-4)
        lowest, target, highest = _CHANGE[double]
        for retries in range(STEP_RETRIES, -1, -1):
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
            total = add_pulled(total, pull_back([loss], [torch.ones_like(loss)], self._params, self._group))
        return with_zeros(total, self._params)

    def _losses(self) -> Iterator[Tensor]:
        for call in self._calls:
            assert call.weight is not None
            for forward in call.forwards:
                yield loss_of(replay(self._model, forward), self._outputs) * call.weight


def reproduces(model: nn.Module, params: Sequence[Tensor], calls: Sequence[LossCall]) -> bool:
    """Does the model, run again at the same weights and random state, give the same outputs twice?

    Differences of outputs mean nothing where it does not (noise from a generator of its own). Only inside `preserved`.
    """
    if not calls:
        return True
    with torch.no_grad():
        runs = [[t.clone() for call in calls for t in outputs_of(model, call)] for _ in range(2)]
    return relative_move(runs[0], runs[1]) < step_target(params[0].dtype) / 10


def other_masks(model: nn.Module, calls: Sequence[LossCall]) -> bool:
    """Does the loop call a compiled version of the model whose dropout masks are others? Only inside `preserved`."""
    with torch.no_grad():
        for f in (f for call in calls for f in call.forwards if f.compiled and f.random and f.base is not None):
            again = selected(replay(model, f), f)
            if relative_move([precise(t) for t in f.base or []], again) > _OTHER_MASK:
                return True
    return False


def adjoint_error(
    model: nn.Module, params: Sequence[Tensor], call: LossCall, engine: str, group: Group = ALONE
) -> float:
    """|u.(J v) / (J^T u).v - 1| for a random u and v = J^T u: how far the engine's J v is from the backward pass.

    Of this process' own J, or, where weights are sharded, of all of them. Only inside `preserved`.
    """
    mover = Mover(params, None, group)
    mover.back()
    outputs = outputs_of(model, call)
    u = random_unit(outputs)
    pulled = with_zeros(pull_back(outputs, u, params, group), params)
    length = float(norm(pulled, group.total))
    if length == 0:
        return 0.0
    linearize = ENGINES[engine](model, mover, [call], StepSize())
    direction, pulled = scaled(pulled, 1.0 / length), []
    for _, tangents in linearize(direction):
        pushed = group.common(float(dot(u, tangents)))
    return abs(pushed / length - 1.0)


def _through_loss(call: LossCall, hessian: OutputHessian, tangents: list[Tensor]) -> list[Tensor | None]:
    """H_out t at the model's outputs: through the user's code, the criterion, and back."""
    outputs = [o for f in call.forwards for o in f.outputs]
    if call.link is not None:
        return list(call.link.vjp(hessian(call.link.jvp(tangents))))
    at = {id(o): t for o, t in zip(outputs, tangents, strict=True)}
    products = hessian([at[id(z)] for z in call.inputs])
    back = {id(z): s for z, s in zip(call.inputs, products, strict=True)}
    return [back.get(id(o)) for o in outputs]
