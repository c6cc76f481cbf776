"""Critical learning rates of the base updates, from the top eigenvalue of the curvature."""

from __future__ import annotations

import math


def sgd_critical_lr(
    lambda_max: float,
    *,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
) -> float:
    """Rate above which `torch.optim.SGD` is unstable on a quadratic of top curvature lambda_max.

    Plain 2/lambda (thesis Def. 3.2.2); heavy ball 2(1+beta)/((1-dampening) lambda); Nesterov
    (2+2 beta)/((1+2 beta) lambda); L2 weight decay adds itself to lambda. Infinite where lambda_max + weight_decay is
    not positive. With mini-batch noise the edge lies lower: an upper bound.

    Example:
        >>> sgd_critical_lr(4.0), sgd_critical_lr(4.0, momentum=0.9)
        (0.5, 0.95)
    """
    curvature = lambda_max + weight_decay
    if not curvature > 0:
        return math.inf
    if momentum == 0.0:
        return 2.0 / curvature
    if nesterov:
        return (2 + 2 * momentum) / ((1 + 2 * momentum) * curvature)
    return 2 * (1 + momentum) / ((1 - dampening) * curvature) if dampening < 1 else math.inf


def adam_critical_lr(lambda_max: float, *, beta1: float = 0.9, decoupled_weight_decay: float = 0.0) -> float:
    """Rate above which Adam with a frozen preconditioner P is unstable; lambda_max is that of P^(-1/2) G P^(-1/2).

    (2 + 2 beta1) / ((1 - beta1) lambda), i.e. 38 / lambda at beta1 = 0.9; AdamW's decay of the weights, outside the
    momentum, adds itself: 2 / (decay + (1 - beta1) lambda / (1 + beta1)).

    Example:
        >>> round(adam_critical_lr(1.0, beta1=0.9), 6)
        38.0
    """
    curvature = decoupled_weight_decay + (1 - beta1) * lambda_max / (1 + beta1)
    return 2.0 / curvature if curvature > 0 else math.inf
