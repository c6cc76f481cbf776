"""One measurement: the top curvature of the captured step."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .criterion import LossModule
from .curvature.eigensolver import EigenEstimate, top_eigenvalue
from .curvature.engines import FINITE_DIFFERENCE, Scale, StepSize
from .curvature.gram import LARGEST_BATCH, NotLayerwise, gram_lambda_max
from .curvature.operators import GGN, LossHessian, adjoint_error, other_masks, reproduces
from .curvature.output_hessian import OutputHessian
from .distributed import ALONE, Group, local
from .link import LossCall
from .replay import preserved
from .vectors import Vector, dot, norm, random_unit

GRAM = "layerwise-gram"
# Lengths of the gradient and of a random vector in a start vector, in that of the warm start.
_GRADIENT, _RANDOM = 1.0, 1.0
# A curvature below this part of the last one is believed once it was measured from a random vector too,
_STEEP_FALL = 0.7
# with at least so many products.
_COLD_MATVECS = 10
_OTHER_SEED = 1_000_003
# Products further from symmetry than this are wrong, not rounded.
_ASYMMETRY = 0.05
# Rounding to bfloat16 inside the model leaves about 1 %; differences of its outputs are then off by 100 % and more.
_MISMATCH = 0.05

# Squared only near zero.
_LINEAR_FAR_OUT = ("HuberLoss", "huber_loss", "SmoothL1Loss", "smooth_l1_loss")
# Linear in log-probabilities, which hide the curvature of the softmax from the criterion.
_OF_LOG_PROBABILITIES = ("NLLLoss", "nll_loss", "KLDivLoss", "kl_div")


class MeasurementWarning(UserWarning):
    """A measurement was not possible; the step went on with the last known value."""


class MeasurementError(RuntimeError):
    """A measurement was not possible; says why and what to do."""


@dataclass(frozen=True)
class CriticalLR:
    """The critical learning rate of a batch, and how it was found."""

    # 2 / lambda_max, or the critical rate of the base update; inf where the curvature is zero.
    eta_crit: float
    # The top eigenvalue of the curvature of the loss; the criterion's reduction is contained.
    lambda_max: float
    # The top eigenvalue of the NTK J J^T where the loss is a squared error, else None.
    ntk_lambda_max: float | None
    # The relative residual of the eigenpair.
    residual: float
    # The number of curvature products spent.
    matvecs: int
    # False where the cap on products was reached first.
    converged: bool
    # True where the loss is a multiple of a squared error, whose output Hessian does not depend on the fit.
    squared_error: bool = False


def measure(
    model: nn.Module,
    criterion: nn.Module | None,
    params: Sequence[Tensor],
    calls: Sequence[LossCall],
    *,
    start: Vector | None = None,
    gradient: Sequence[Tensor | None] | None = None,
    before: float | None = None,
    step: StepSize | None = None,
    outputs: Callable[[Any], Any] | None = None,
    scale: Scale = None,
    engine: str = FINITE_DIFFERENCE,
    tol: float = 0.02,
    max_matvecs: int = 5,
    group: Group = ALONE,
) -> tuple[CriticalLR, Vector | None]:
    """Top curvature of captured loss calls at the present weights, and the vector to start the next one from (if any).

    A warm start alone cannot leave an invariant subspace (the rows of an embedding that the last batch used, one member
    of an ensemble): the gradient, which has a part in all of them, and a random vector are added to it.

    Args:
        model, criterion, params: as captured; params are those the curvature is taken over.
        calls: from `Capture.take` of an armed step.
        start: warm-start vector, one tensor per parameter (None or all zeros: there is none); of the rank's own parts,
            as the vector returned, where parameters are sharded.
        gradient: of the loss, up to a factor; None: what `.grad` of the parameters holds, if anything, but
            for a first measurement.
        before: lambda_max of the last measurement. With less than 0.7 of it (or nothing) found from a warm start, the
            curvature is measured again from a random vector.
        step: finite-difference step, calibrated in place.
        outputs: with criterion None, picks the loss from the model's output.
        scale: relative rate of each parameter (over its preconditioner), see `operators`.
        engine: a matrix-free one, or "layerwise-gram" where it applies (else finite differences).
        tol, max_matvecs: see `top_eigenvalue`.
        group: the processes that train together, each with the calls of its part of the batch; see `distributed`.

    Raises:
        MeasurementError: nothing usable was captured, or the curvature is not finite.
    """
    _check(calls, params, group)
    with preserved(model, criterion, params):
        if engine == GRAM and criterion is not None:
            gram = _by_gram(model, params, calls, scale, group)
            if gram is not None:
                return gram, None
        operator: GGN | LossHessian
        if criterion is None:
            operator = LossHessian(model, params, calls, outputs, scale, engine, group)
        else:
            matrix_free = FINITE_DIFFERENCE if engine == GRAM else engine
            operator = GGN(model, params, calls, step or StepSize(), scale, matrix_free, group)
        if gradient is None:
            # Not in a first start: it may lie nearly along one eigenvector that is not the top one, and no residual
            # tells that the random part has still to grow.
            gradient = [None if before is None else p.grad for p in params]

        def solve(make_start: Callable[[], Vector], most: int) -> EigenEstimate:
            # Nobody else holds the start vector: its memory is free again once the solver has its own.
            return top_eigenvalue(
                operator.matvec,
                make_start(),
                tol=tol,
                max_matvecs=most,
                semidefinite=operator.semidefinite,
                total=group.total,
            )

        def random() -> Vector:
            return random_unit([local(p) for p in params], group.seed + _OTHER_SEED, group.total)

        try:
            estimate = solve(functools.partial(_start, params, start, gradient, scale, group), max_matvecs)
            if start is not None and estimate.value <= _STEEP_FALL * (before or 0.0):
                again = solve(random, max(max_matvecs, _COLD_MATVECS))
                spent = estimate.matvecs + again.matvecs
                estimate = dataclasses.replace(max(estimate, again, key=lambda e: e.value), matvecs=spent)
            if engine not in (FINITE_DIFFERENCE, GRAM) and estimate.asymmetry > _ASYMMETRY:
                raise MeasurementError(
                    f"products with the {engine} engine are not symmetric ({estimate.asymmetry:.0%}): an operation of "
                    "the model has a wrong second derivative, or is not deterministic; try another engine="
                )
        except FloatingPointError as error:
            raise MeasurementError(f"{error}: is there a NaN or inf in the batch or the weights?") from error
        hessians = operator.hessians if isinstance(operator, GGN) else None
        if hessians is not None:
            _refuse_linear(criterion, hessians, estimate.value, group)
        found = _result(
            estimate.value,
            hessians,
            scale,
            group,
            residual=estimate.residual,
            matvecs=estimate.matvecs,
            converged=estimate.converged,
        )
    return found, estimate.vector


def _start(
    params: Sequence[Tensor],
    warm: Vector | None,
    gradient: Sequence[Tensor | None],
    scale: Scale,
    group: Group,
) -> Vector:
    """The warm start, the gradient and a random vector in fixed proportions, as far as there are any."""
    start = random_unit([local(p) for p in params], group.seed, group.total)
    dense = [None if g is None or g.is_sparse else local(g) for g in gradient]
    if scale is not None:
        dense = [None if g is None else g * s**0.5 for g, s in zip(dense, scale, strict=True)]
    for vector, length in ((dense, _GRADIENT / _RANDOM), (warm or [], 1.0 / _RANDOM)):
        # Moved, where it was loaded from elsewhere.
        pairs = [(x, v.to(x)) for x, v in zip(start, vector, strict=bool(vector)) if v is not None]
        size = float(norm([v for _, v in pairs], group.total)) if pairs else 0.0
        if size > 0 and math.isfinite(size):
            overlap = dot([x for x, _ in pairs], [v for _, v in pairs])
            overlap = overlap if group.total is None else group.total(overlap)
            for x, v in pairs:  # with the sign that adds to what is there, so that a common part does not cancel
                x.add_(v, alpha=math.copysign(length / size, float(overlap)))
    return start


def _result(
    value: float,
    hessians: Sequence[OutputHessian] | None,
    scale: Scale,
    group: Group,
    *,
    residual: float = 0.0,
    matvecs: int = 1,
    converged: bool = True,
) -> CriticalLR:
    """Only inside `preserved`."""
    multiple = None if hessians is None else _squared_error(hessians, group)
    ntk = None if multiple is None or scale is not None else value * group.size / multiple
    return CriticalLR(_edge(value), value, ntk, residual, matvecs, converged, multiple is not None)


def _edge(lambda_max: float) -> float:
    return 2.0 / lambda_max if lambda_max > 0 else math.inf


def _by_gram(
    model: nn.Module, params: Sequence[Tensor], calls: Sequence[LossCall], scale: Scale, group: Group
) -> CriticalLR | None:
    """Exact, from one forward and one backward pass; None where the network or the batch is not of that kind."""
    if group.size > 1:  # the kernel also has entries between the samples of different processes
        return None
    if (calls[0].forwards[0].batch_size or 0) > LARGEST_BATCH:
        return None
    try:
        value, hessian = gram_lambda_max(model, params, calls, scale)
        _refuse_linear(calls[0].criterion, [hessian], value, group)
    except NotLayerwise:
        return None
    if not math.isfinite(value):
        raise MeasurementError("the kernel was not finite: is there a NaN or inf in the batch or the weights?")
    return _result(value, [hessian], scale, group)


def choose_engine(
    model: nn.Module,
    criterion: nn.Module | None,
    params: Sequence[Tensor],
    calls: Sequence[LossCall],
    scale: Scale,
    group: Group = ALONE,
) -> tuple[str, str]:
    """The engine for this kind of step, and why; decided on the first one measured."""
    _check(calls, params, group)
    if criterion is None:
        return "hessian", "the model returns the loss"
    with preserved(model, criterion, params):
        if group.any(other_masks(model, calls)):
            raise MeasurementError(
                "the loop calls torch.compile's version of the model, whose random numbers (dropout) differ from those "
                "of the uncompiled one: pass the compiled module as model="
            )
        if group.any(not reproduces(model, params, calls)):
            if group.sharded:
                raise MeasurementError(
                    "the model does not repeat its own outputs, and sharded weights allow only differences of them"
                )
            return "double-backward", "the model does not repeat its own outputs, which rules out differences of them"
        matrix_free, reason = _matrix_free(model, params, calls, group)
        gram = _by_gram(model, params, calls, scale, group)
    if gram is not None:
        found, _ = measure(model, criterion, params, calls, scale=scale, engine=matrix_free, tol=1e-3, max_matvecs=20)
        if abs(gram.lambda_max - found.lambda_max) <= 0.02 * gram.lambda_max:
            return GRAM, f"linear layers, one scalar output a sample, at most {LARGEST_BATCH} samples"
    return matrix_free, reason


def _matrix_free(
    model: nn.Module, params: Sequence[Tensor], calls: Sequence[LossCall], group: Group
) -> tuple[str, str]:
    """The first engine whose J v agrees with the backward pass; only inside `preserved`."""
    tried = []
    for engine in (FINITE_DIFFERENCE,) if group.sharded else (FINITE_DIFFERENCE, "forward", "double-backward"):
        error, why = 0.0, "it failed on another process"
        try:
            if calls:
                error = adjoint_error(model, params, calls[0], engine, group)
        except (RuntimeError, NotImplementedError) as failure:
            error, why = math.inf, str(failure)
        error = group.highest([error])[0]
        if math.isinf(error):
            tried.append(f"{engine}: {why}")
            continue
        if error <= _MISMATCH:
            works = "works on everything, one forward and backward pass a product"
            return engine, "; ".join(tried) or works
        tried.append(f"{engine}: {error:.0%} away from what the backward pass says")
    raise MeasurementError("no engine can measure this model. " + "; ".join(tried))


def _check(calls: Sequence[LossCall], params: Sequence[Tensor], group: Group) -> None:
    """On all processes alike: the others would wait for one that stops."""
    problem = _problem(calls, params) if calls or group.size == 1 else ""
    if group.any(bool(problem)):
        raise MeasurementError(problem or "another process cannot measure its part of the batch; its error says why")


def _problem(calls: Sequence[LossCall], params: Sequence[Tensor]) -> str:
    if not calls or any(not call.forwards for call in calls):
        return (
            "the criterion was called on something that does not come from the model: pass the model whose outputs "
            "reach the criterion (checkpointing the whole model needs use_reentrant=False)"
        )
    for problem in (call.problem for call in calls):
        if problem:
            return problem
    if any(f.inputs_depend_on(params) for call in calls for f in call.forwards):
        return (
            "the model's inputs were computed from its own parameters (by an earlier forward pass, for instance): "
            "detach them, or pass as model= a module that does all of it in one forward pass"
        )
    if any(f.inputs_changed() for call in calls for f in call.forwards):
        return "the batch was modified in place between the forward pass and step(): copy it instead"
    return ""


def _refuse_linear(criterion: nn.Module | None, hessians: Sequence[OutputHessian], value: float, group: Group) -> None:
    """No curvature at all: is it the criterion, which has none in what it is given?"""
    if value != 0 or group.any(any(h.curved() for h in hessians)):
        return
    name = type(criterion).__name__
    if isinstance(criterion, LossModule):
        name = getattr(criterion.function, "__name__", name)
    advice = "use a smooth criterion such as MSELoss, HuberLoss or SmoothL1Loss"
    if name in _LINEAR_FAR_OUT:
        advice = (
            "every residual lies in its linear part: scale the targets to unit variance, or raise its delta or beta"
        )
    if name in _OF_LOG_PROBABILITIES:
        advice = "where the model returns log-probabilities, let it return logits and use CrossEntropyLoss on them"
    raise MeasurementError(
        f"criterion {name} has no second derivative at what the model returned, so that no critical rate follows from "
        f"its curvature: {advice}; or let the model return the loss, with criterion=None"
    )


def _squared_error(hessians: Sequence[OutputHessian], group: Group) -> float | None:
    """h where every term of the loss, on all processes, is the same multiple h/2 of a squared error, else None."""
    multiples = [math.inf if m is None else m for m in (h.as_multiple_of_identity() for h in hessians)]
    lowest, highest = min(multiples, default=math.inf), max(multiples, default=-math.inf)
    highest, negated = group.highest([highest, -lowest])
    if not (math.isfinite(highest) and highest + negated <= 1e-5 * highest):
        return None
    return highest
