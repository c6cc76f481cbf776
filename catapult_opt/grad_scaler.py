"""Losses scaled up before backward and gradients scaled down before the step: torch.amp.GradScaler and its likes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from .trees import read_numbers

# Smaller weights are no loss scaling but an author's choice.
_SUSPICIOUS = 128.0


class LossScaler(Protocol):
    """What is needed of a torch.amp.GradScaler: the loss to call backward on."""

    def scale(self, outputs: Tensor) -> Tensor: ...


def check_scaler(scaler: object) -> None:
    if scaler is not None and not callable(getattr(scaler, "scale", None)):
        raise TypeError(f"grad_scaler must be a torch.amp.GradScaler (an object with a scale method), got {scaler!r}")


def scale_of(scaler: LossScaler, like: Tensor) -> Tensor:
    """The factor in force, on the loss' device: get_scale() would wait for it."""
    return scaler.scale(torch.ones_like(like))


class UnannouncedScaler:
    """Finds an undeclared loss scaling: gradients smaller at the step than backward left them, by its factor.

    The weight of the loss alone does not tell: its author may want it large.
    """

    def __init__(self) -> None:
        self._weight = 0.0
        self._left: dict[Tensor, Tensor] = {}  # norm of each gradient as backward left it
        self._handles: list[RemovableHandle] = []

    def watch(self, weight: Tensor, params: Sequence[Tensor]) -> None:
        """At the start of a backward pass. Reads the weight from the device."""
        self.stop()
        self._weight = abs(read_numbers([weight])[0])
        if self._weight >= _SUSPICIOUS and math.isfinite(self._weight):
            self._handles = [
                p.register_post_accumulate_grad_hook(self._note)  # type: ignore[no-untyped-call]
                for p in params
                if p.is_leaf
            ]

    def stop(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._left = {}

    def problem(self) -> str | None:
        """At the step."""
        pairs = [(norm, p.grad.norm()) for p, norm in self._left.items() if p.grad is not None]
        if not pairs:
            return None
        columns = [torch.stack([x.float() for x in column]).norm() for column in zip(*pairs, strict=True)]
        before, now = read_numbers(columns)
        if not (now > 0 and math.isfinite(before)) or before < 0.99 * self._weight * now:
            return None
        if not (_power_of_two(self._weight) or _power_of_two(before / now)):
            return None
        return (
            f"the loss was multiplied by {self._weight:g} before backward and the gradients were divided by as much "
            "before step(), as torch.amp.GradScaler does: critical rates would come out too small by that factor; "
            "pass grad_scaler=scaler (or an object whose scale(loss) does what your own loss scaling does)"
        )

    def _note(self, p: Tensor) -> None:
        if p.grad is not None:
            self._left[p] = p.grad.norm()


def _power_of_two(x: float) -> bool:
    exponent = math.log2(x)
    return abs(exponent - round(exponent)) < 1e-3
