"""The public `critical_lr`: one number on demand, outside of any training step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .checks import check_whole_number
from .criterion import as_module, loss_of, scalar_loss
from .curvature.engines import ENGINES, FINITE_DIFFERENCE
from .link import LossCall, connect
from .measure import CriticalLR, measure
from .parameters import trainable
from .replay import precise, preserved, record_forward, replay
from .trees import map_tensors


def critical_lr(
    model: nn.Module,
    criterion: Any,
    inputs: Any,
    targets: Any = None,
    *,
    curvature: str = "ggn",
    engine: str = "auto",
    outputs: Callable[[Any], Any] | None = None,
    tol: float = 5e-4,
    max_matvecs: int = 50,
) -> CriticalLR:
    """The critical learning rate 2 / lambda_max of one batch at the model's present weights.

    Curvature is that of `criterion(outputs(model(*inputs)), targets)` with the criterion's own reduction, over all
    parameters that require gradients, in the model's present train/eval mode and at the present random state (dropout);
    nothing of the model, its gradients or the random state is changed.

    Args:
        model: any module.
        criterion: module or function (outputs, targets) -> scalar loss; None where the model returns the loss.
        inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments of the model.
        targets: second argument of the criterion.
        curvature: "ggn" (generalized Gauss-Newton; for a squared error a multiple of the NTK) or "hessian".
        engine: how products with the GGN are found: "double-backward" or "forward" (exact, where every operation has
            the rules), "finite-difference" (works on everything); "auto" is the first with the last to fall back on.
        outputs: picks what the criterion gets from what the model returns.
        tol: relative accuracy asked of lambda_max.
        max_matvecs: cap on the curvature products; `converged` is False when it was reached.

    Raises:
        ValueError, TypeError: an argument is not usable; says which and why.
        MeasurementError: the curvature is not finite.

    Source: thesis Def. 3.2.2 and App. C.1. For nn.MSELoss() over N elements lambda_max = (2/N) lambda_max(NTK).

    Example:
        >>> model = torch.nn.Linear(3, 1, bias=False)
        >>> x = torch.eye(3)
        >>> result = critical_lr(model, torch.nn.MSELoss(reduction="sum"), x, torch.zeros(3, 1), tol=1e-4)
        >>> round(result.lambda_max, 3), round(result.ntk_lambda_max, 3), round(result.eta_crit, 3)
        (2.0, 1.0, 1.0)
    """
    if curvature not in ("ggn", "hessian"):
        raise ValueError(f"curvature must be 'ggn' or 'hessian', got {curvature!r}")
    if engine not in ("auto", *ENGINES):
        raise ValueError(f"engine must be one of auto, {', '.join(ENGINES)}, got {engine!r}")
    if not isinstance(tol, (int, float)):
        raise TypeError(f"tol must be a number, got {tol!r}")
    if not 0 <= tol < math.inf:
        raise ValueError(f"tol must be a finite number >= 0, got {tol!r}")
    check_whole_number("max_matvecs", max_matvecs)
    if outputs is not None and not callable(outputs):
        raise TypeError(f"outputs must be a function of the model's output, got {outputs!r}")
    params = trainable(model)
    loss_module = None if criterion is None else as_module(criterion)
    if curvature == "hessian" and loss_module is not None:
        model, loss_module, outputs = _LossModel(model, loss_module, outputs, targets), None, None
    args, kwargs = _arguments(inputs)
    with preserved(model, loss_module, params):
        call = _call_once(model, loss_module, params, args, kwargs, targets, outputs)
    settings: dict[str, Any] = {
        "gradient": [None] * len(params),
        "outputs": outputs,
        "tol": tol,
        "max_matvecs": max_matvecs,
    }
    if engine == "auto":
        try:
            return measure(model, loss_module, params, [call], engine="double-backward", **settings)[0]
        except (RuntimeError, NotImplementedError):
            engine = FINITE_DIFFERENCE  # an operation without a second derivative (fused attention), or a wrong one
    return measure(model, loss_module, params, [call], engine=engine, **settings)[0]


def _call_once(
    model: nn.Module,
    criterion: nn.Module | None,
    params: list[Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    targets: Any,
    outputs: Callable[[Any], Any] | None,
) -> LossCall:
    """One forward pass and criterion call as a captured step leaves them. Only inside `preserved`."""
    forward = record_forward(model, params, args, kwargs)
    output = replay(model, forward)
    forward.finish(output)
    if criterion is None:
        loss = loss_of(output, outputs)
        call = LossCall(loss.detach(), forwards=[forward])
    else:
        picked = outputs(output) if outputs is not None else output
        loss = scalar_loss(criterion.forward(picked, map_tensors(targets, precise)))
        call = LossCall(loss.detach(), criterion=criterion)
        connect(call, [forward], (picked, map_tensors(targets, precise)), {})
    if not loss.requires_grad or not call.forwards:
        raise ValueError("criterion(model(inputs), targets) does not depend on the model's trainable parameters")
    call.weight = torch.ones_like(call.value)
    return call


class _LossModel(nn.Module):
    """A model and its criterion as one module that returns the loss."""

    def __init__(self, model: nn.Module, criterion: nn.Module, outputs: Callable[[Any], Any] | None, targets: Any):
        super().__init__()
        self.model, self.criterion, self.outputs, self.targets = model, criterion, outputs, targets

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        output = self.model(*args, **kwargs)
        loss: Tensor = self.criterion(self.outputs(output) if self.outputs is not None else output, self.targets)
        return loss


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, dict):
        return (), inputs
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    return (inputs,), {}
