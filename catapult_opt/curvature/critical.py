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
    (2+2 beta)/((1+2 beta) lambda); L2 weight decay adds itself to lambda. Infinite where lambda_max + weight_decay is not
    positive. With mini-batch noise the edge lies lower: an upper bound.

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
    return 2 * (1 + momentum) / ((1 - dampening) * curvature)
