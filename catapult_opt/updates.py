"""What the next update of a base optimizer does to a quadratic: its preconditioner and its critical rate."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adagrad, Adam, AdamW, Optimizer, RMSprop

from .curvature.critical import adam_critical_lr, sgd_critical_lr
from .curvature.operators import Scale
from .distributed import local

Group = dict[str, Any]


@dataclass(frozen=True)
class BaseUpdate:
    """One update w <- w - rate * scale * (momentum of the gradient), seen as a linear map."""

    rate: float  # the largest among the groups
    scale: Scale  # per parameter: relative rate, over the preconditioner where there is one; None: all ones
    critical: Callable[[float], float]  # lambda_max of scale^(1/2) G scale^(1/2) -> critical rate
    minibatch_factor: float = 1.0  # of the critical rate, what mini-batch noise leaves where momentum helps no more


def next_update(optimizer: Optimizer, *, scale: bool = True) -> BaseUpdate:
    """The update the optimizer is about to make with the gradients present.

    The preconditioner P of Adam, AdamW, RMSprop and Adagrad is the one this very step will use (the running averages
    with the present gradient in), taken as frozen; their critical rates are those of `curvature.critical` for the
    preconditioned curvature P^(-1/2) G P^(-1/2).

    Args:
        optimizer: whose step is about to be made.
        scale: False where the scale is not needed, on a step that is not measured: finding P takes about as long as
            the update.

    Raises:
        TypeError: not one of torch's SGD, Adam, AdamW, RMSprop, Adagrad.
    """
    groups = [g for g in optimizer.param_groups if any(p.requires_grad for p in g["params"])]
    largest = max(float(g["lr"]) for g in groups)
    factor = _minibatch_factor(groups)
    if _is_sgd(optimizer):
        rated = _relative(groups, largest) if scale else []
        plain = all(r == 1.0 for r in rated)
        return BaseUpdate(largest, None if plain else rated, lambda lam: min(_sgd(g, lam) for g in groups), factor)
    inverse, critical = _ADAPTIVE[_adaptive_kind(optimizer)]
    tensors: Scale = None
    if scale:
        rated = _relative(groups, largest)
        members = ((g, p) for g in groups for p in g["params"] if p.requires_grad)
        scales = (r * inverse(g, p, optimizer.state.get(p, {})) for r, (g, p) in zip(rated, members, strict=True))
        tensors = [local(x) for x in scales]
    return BaseUpdate(largest, tensors, lambda lam: min(critical(g, lam) for g in groups), factor)


def _relative(groups: Iterable[Group], largest: float) -> list[float]:
    """The rate of each trainable parameter over the largest."""
    rates = [float(g["lr"]) for g in groups for p in g["params"] if p.requires_grad]
    return [r / largest if largest else 1.0 for r in rates]


def _minibatch_factor(groups: Iterable[Group]) -> float:
    """(1 - beta) / (1 + beta): from the heavy ball's 2 (1 + beta) / lambda to 2 (1 - beta) / lambda.

    With mini-batches, the curvature that SGD with momentum beta settles at is the one whose plain critical rate is the
    effective rate, eta / (1 - beta).
    """
    beta = max(float(g["betas"][0] if "betas" in g else g.get("momentum", 0.0)) for g in groups)
    return (1 - beta) / (1 + beta)


def check_supported(optimizer: Optimizer) -> None:
    """A TypeError if the critical rate of this optimizer's update is not known, or there is none (Muon)."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if not _is_sgd(optimizer):
        _adaptive_kind(optimizer)


def _is_sgd(optimizer: Optimizer) -> bool:
    """torch's SGD, or an optimizer with the same settings (CatapultSGD)."""
    return {"momentum", "dampening", "nesterov", "weight_decay"} <= optimizer.defaults.keys()


def _adaptive_kind(optimizer: Optimizer) -> type[Optimizer]:
    for kind in _ADAPTIVE:
        if isinstance(optimizer, kind):
            return kind
    if type(optimizer).__name__ == "Muon":
        raise TypeError(
            "optimizer: Muon's update has no critical rate. It is orthogonalised, so that its size is lr whatever the "
            "gradient's: on a quadratic it comes to hover at a distance of about lr, at any lr and any curvature. "
            "Drive the optimizer of the other parameters (AdamW), and leave Muon at its own rate"
        )
    raise TypeError(
        f"optimizer must be one of SGD, Adam, AdamW, RMSprop, Adagrad or CatapultSGD, whose critical rates are known; "
        f"got {type(optimizer).__name__}"
    )


def _sgd(g: Group, lambda_max: float) -> float:
    return sgd_critical_lr(
        lambda_max,
        momentum=g["momentum"],
        dampening=g["dampening"],
        nesterov=g["nesterov"],
        weight_decay=g["weight_decay"],
    )


def _gradient(p: Tensor) -> Tensor:
    return torch.zeros_like(p) if p.grad is None else p.grad


def _average(state: dict[str, Any], key: str, p: Tensor) -> Tensor:
    """A running average of the optimizer's; zeros before the first step."""
    average: Tensor = state[key] if key in state else torch.zeros_like(p)
    return average


def _inverse_adam(g: Group, p: Tensor, state: dict[str, Any]) -> Tensor:
    """1 / (sqrt(v_hat) + eps) with the bias-corrected second moment of the coming step."""
    beta2, step = g["betas"][1], float(state.get("step", 0)) + 1
    v = _average(state, "exp_avg_sq", p) * beta2 + (1 - beta2) * _gradient(p) ** 2
    if g["amsgrad"]:
        v = torch.maximum(v, state.get("max_exp_avg_sq", v))
    inverse: Tensor = 1.0 / ((v / (1 - beta2**step)).sqrt() + g["eps"])
    return inverse


def _inverse_rmsprop(g: Group, p: Tensor, state: dict[str, Any]) -> Tensor:
    alpha, grad = g["alpha"], _gradient(p)
    v = _average(state, "square_avg", p) * alpha + (1 - alpha) * grad**2
    if g["centered"]:
        mean = _average(state, "grad_avg", p) * alpha + (1 - alpha) * grad
        v = (v - mean**2).clamp_min(0)
    inverse: Tensor = 1.0 / (v.sqrt() + g["eps"])
    return inverse


def _inverse_adagrad(g: Group, p: Tensor, state: dict[str, Any]) -> Tensor:
    total = _average(state, "sum", p) + _gradient(p) ** 2
    decay = 1 + float(state.get("step", 0)) * g["lr_decay"]
    inverse: Tensor = 1.0 / ((total.sqrt() + g["eps"]) * decay)
    return inverse


def _critical_adam(g: Group, lambda_max: float) -> float:
    decoupled = g["weight_decay"] if g.get("decoupled_weight_decay") else 0.0
    return adam_critical_lr(lambda_max, beta1=g["betas"][0], decoupled_weight_decay=decoupled)


def _critical_adamw(g: Group, lambda_max: float) -> float:
    return adam_critical_lr(lambda_max, beta1=g["betas"][0], decoupled_weight_decay=g["weight_decay"])


def _critical_rmsprop(g: Group, lambda_max: float) -> float:
    return sgd_critical_lr(lambda_max, momentum=g["momentum"])


def _critical_adagrad(g: Group, lambda_max: float) -> float:
    return sgd_critical_lr(lambda_max)


_Inverse = Callable[[Group, Tensor, dict[str, Any]], Tensor]
_ADAPTIVE: dict[type[Optimizer], tuple[_Inverse, Callable[[Group, float], float]]] = {
    AdamW: (_inverse_adam, _critical_adamw),
    Adam: (_inverse_adam, _critical_adam),
    RMSprop: (_inverse_rmsprop, _critical_rmsprop),
    Adagrad: (_inverse_adagrad, _critical_adagrad),
}
