"""What the faces show of a training, and the hook of the two that work beside somebody's optimizer."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .measure import CriticalLR
from .observer import Observer
from .recorder import Recorder

# The optimizers that a face drives or watches at present.
_attended: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def attend(optimizer: Optimizer, on: bool = True) -> None:
    """Note that a face drives or watches this optimizer, or no longer does."""
    (_attended.add if on else _attended.discard)(optimizer)


class Face:
    """What every face shows of the training it watches; of a CatapultSGD without a model, nothing."""

    _observer: Observer | None
    _recorder: Recorder | None

    @property
    def criterion(self) -> nn.Module | None:
        """The criterion whose calls are observed: a plain function given as criterion must be called through this."""
        return None if self._observer is None else self._observer.criterion

    @property
    def engine(self) -> str:
        """How curvature is measured; "" until the first measured step has decided it."""
        return "" if self._observer is None else self._observer.engine

    @property
    def last(self) -> CriticalLR | None:
        """The last measurement: of that step's batch, at the weights before its update."""
        return None if self._observer is None else self._observer.last

    @property
    def super_critical_steps(self) -> int:
        """Measured steps with eta - eta_crit > 1e-8: the thesis' count of catapults in SGD."""
        return 0 if self._recorder is None else self._recorder.counter.super_critical_steps

    @property
    def catapults(self) -> int:
        """Episodes completed: rise from a super-critical start, peak, return with a lower lambda_max."""
        return 0 if self._recorder is None else self._recorder.counter.catapults

    @property
    def collapses(self) -> int:
        """Times the curvature vanished (dead units)."""
        return 0 if self._recorder is None else self._recorder.counter.collapses

    @property
    def measured_steps(self) -> int:
        """Steps whose critical rate was measured."""
        return 0 if self._recorder is None else self._recorder.counter.measured_steps

    def log_metrics(self, **values: float) -> None:
        """Log metrics at the present step, e.g. val_loss=0.3; names that start with `val` rank runs in the report.

        Raises:
            TypeError: a value is not a number; names it.
        """
        if self._observer is not None and self._recorder is not None:
            self._recorder.log_metrics(self._observer.step, values)


class StepHook(Face):
    """A face beside somebody's optimizer: observes before every step, and lives as long as the optimizer does.

    The optimizer holds the hook and the hook its face, so that a face needs no name of its own; the face holds the
    optimizer weakly, so that dropping the optimizer frees both, and all hooks on the model with them.

    Args:
        optimizer: whose steps are observed.

    Raises:
        ValueError: another face works beside this optimizer already.
    """

    _observer: Observer
    _recorder: Recorder

    def __init__(self, optimizer: Optimizer) -> None:
        if optimizer in _attended:
            raise ValueError(
                f"optimizer: this {type(optimizer).__name__} is driven or watched already, by a CatapultLR, a "
                "CatapultMonitor or (a CatapultSGD with a model) itself: each of them counts, logs and takes every=; "
                "use that one, or call its detach() first"
            )
        self._optimizer = weakref.ref(optimizer)
        self._handles: list[RemovableHandle] = []

    def _attach(self, optimizer: Optimizer, *more: RemovableHandle) -> None:
        """Register the hooks, once nothing can fail any more."""
        self._handles = [optimizer.register_step_pre_hook(self._before_step), *more]
        attend(optimizer)

    def detach(self) -> None:
        """Leave the optimizer to itself: remove the hooks, close the log. The counts can still be read."""
        while self._handles:
            self._handles.pop().remove()
        optimizer = self._optimizer()
        if optimizer is not None:
            attend(optimizer, False)
        self._observer.detach()
        self._recorder.close()

    def __getstate__(self) -> dict[str, Any]:
        name = type(self).__name__
        raise TypeError(
            f"{name} cannot be copied or pickled, as its hooks are on one model and one optimizer: copy or save those, "
            f"and make another {name} for them"
        )

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Observe now, or right after the closure where forward and backward run inside step(closure)."""
        closure: Callable[[], Any] | None = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._observe(optimizer)
            return None

        def observed() -> Any:
            loss = closure()
            with torch.no_grad():
                self._observe(optimizer)
            return loss

        rest = {name: value for name, value in kwargs.items() if name != "closure"}
        return (args[0], observed), rest

    def _observe(self, optimizer: Optimizer) -> None:
        raise NotImplementedError


def plain_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's settings as a log can hold them."""
    return {k: v if isinstance(v, (int, float, str, bool, type(None))) else str(v) for k, v in settings.items()}
