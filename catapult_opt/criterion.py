"""The criterion as a module, and the scalar loss it (or the model) returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class LossModule(nn.Module):
    """A plain loss function (outputs, targets) -> scalar as a module, so that its calls can be observed.

    Hooks exist on modules only: a loop that uses a function or a lambda calls `LossModule(function)` in its place.

    Example:
        >>> import torch
        >>> criterion = LossModule(torch.nn.functional.mse_loss)
        >>> criterion(torch.ones(3), torch.zeros(3))
        tensor(1.)
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        if not callable(function):
            raise TypeError(f"function must be a callable (outputs, targets) -> loss, got {function!r}")
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.function(*args, **kwargs)

    def extra_repr(self) -> str:
        return getattr(self.function, "__qualname__", repr(self.function))


def as_module(criterion: Any) -> nn.Module:
    """The criterion itself if it is a module, else wrapped as one."""
    if isinstance(criterion, nn.Module):
        return criterion
    if callable(criterion):
        return LossModule(criterion)
    raise TypeError(f"criterion must be an nn.Module or a callable (outputs, targets) -> loss, got {criterion!r}")


def loss_of(output: Any, outputs: Callable[[Any], Any] | None) -> Tensor:
    """The scalar loss in a model's output: picked by `outputs`, or the output itself, or its `.loss` / ["loss"]."""
    loss = outputs(output) if outputs is not None else output
    if not isinstance(loss, Tensor):
        loss = loss.get("loss") if hasattr(loss, "get") else getattr(loss, "loss", None)
    if not (isinstance(loss, Tensor) and loss.dim() == 0):
        raise ValueError(
            "criterion=None needs a model that returns a scalar loss (or an output with a scalar .loss); "
            f"got {type(output).__name__}: pass outputs=lambda out: ... that picks it, or pass the criterion"
        )
    return loss


def scalar_loss(loss: Any) -> Tensor:
    """The criterion's value, a ValueError if it is not a 0-d tensor."""
    if isinstance(loss, Tensor) and loss.dim() == 0:
        return loss
    got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
    raise ValueError(
        f"criterion must return a scalar (0-d) tensor, got {got}: use reduction='mean' or 'sum', or reduce inside it"
    )
