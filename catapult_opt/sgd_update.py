"""torch's own SGD update at a rate that is handed in, and the checks of its settings."""

from __future__ import annotations

import math
from collections.abc import Iterable, MutableMapping
from typing import Any

from torch import Tensor
from torch.optim.sgd import sgd

# Running sums of gradients in the state of a parameter: of SGD, and of Adam and its likes.
_VELOCITIES = ("momentum_buffer", "exp_avg")


def sgd_step(group: dict[str, Any], state: MutableMapping[Tensor, dict[str, Any]], lr: float | Tensor) -> None:
    """One update of a group's parameters that have gradients, with its settings but for the rate.

    Args:
        group: a parameter group of `torch.optim.SGD`.
        state: parameter -> dict with its "momentum_buffer", kept up to date.
        lr: the rate.
    """
    params: list[Tensor] = [p for p in group["params"] if p.grad is not None]
    momentum = group["momentum"]
    buffers = [state[p].get("momentum_buffer") if momentum else None for p in params]
    sgd(
        params,
        [p.grad for p in params],  # type: ignore[misc]
        buffers,
        weight_decay=group["weight_decay"],
        momentum=momentum,
        lr=lr,  # type: ignore[arg-type]
        dampening=group["dampening"],
        nesterov=group["nesterov"],
        maximize=group["maximize"],
        has_sparse_grad=False,
        foreach=group["foreach"],
    )
    if momentum:
        for p, buffer in zip(params, buffers, strict=True):
            state[p]["momentum_buffer"] = buffer


def bring_to_rest(states: Iterable[dict[str, Any]]) -> None:
    """Set the momentum in these parameters' states to zero."""
    for state in states:
        for name in _VELOCITIES:
            if isinstance(state.get(name), Tensor):
                state[name].zero_()


def refuse_sparse(groups: Iterable[dict[str, Any]]) -> None:
    """A RuntimeError if a gradient is sparse."""
    for group in groups:
        for p in group["params"]:
            if p.grad is not None and p.grad.is_sparse:
                raise RuntimeError(
                    f"CatapultSGD does not support sparse gradients (parameter of shape {tuple(p.shape)}): "
                    "use sparse=False in the embedding"
                )


def check_settings(settings: dict[str, Any]) -> None:
    """A ValueError or TypeError for settings that torch.optim.SGD could not use, by name and value."""
    lr = settings["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, got lr={lr!r}")
    for name in ("lr", "momentum", "dampening", "weight_decay"):
        value = settings[name]
        if not isinstance(value, (int, float, Tensor)) or isinstance(value, bool):
            raise TypeError(f"{name} must be a number, got {value!r}")
        number = float(value.detach() if isinstance(value, Tensor) else value)
        if not math.isfinite(number) or (number < 0 and name != "dampening"):
            raise ValueError(f"{name} must be a finite number{'' if name == 'dampening' else ' >= 0'}, got {value!r}")
    for name in ("nesterov", "maximize", "differentiable"):
        if not isinstance(settings[name], bool):
            raise TypeError(f"{name} must be True or False, got {settings[name]!r}")
    if settings["foreach"] not in (None, True, False):
        raise TypeError(f"foreach must be True, False or None, got {settings['foreach']!r}")
    if settings["nesterov"] and (settings["momentum"] <= 0 or settings["dampening"] != 0):
        raise ValueError(
            f"nesterov needs momentum > 0 and dampening = 0, got momentum={settings['momentum']!r}, "
            f"dampening={settings['dampening']!r}"
        )
