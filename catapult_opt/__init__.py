"""Train above the critical learning rate, on purpose: a torch.optim optimizer that needs no learning rate."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .criterion import LossModule
    from .measure import CriticalLR, MeasurementError, MeasurementWarning
    from .monitor import CatapultMonitor
    from .on_demand import critical_lr
    from .optimizer import CatapultSGD
    from .policy import CatapultPolicy
    from .replay import is_measuring
    from .runlog import RunLog, read_log
    from .scheduler import CatapultLR

# Looked up on first use, so that reading a log (or `catapult-opt report`) does not load torch.
_HOME = {
    "CatapultLR": "scheduler",
    "CatapultMonitor": "monitor",
    "CatapultPolicy": "policy",
    "CatapultSGD": "optimizer",
    "CriticalLR": "measure",
    "LossModule": "criterion",
    "MeasurementError": "measure",
    "MeasurementWarning": "measure",
    "RunLog": "runlog",
    "critical_lr": "on_demand",
    "is_measuring": "replay",
    "read_log": "runlog",
}

__all__ = [
    "CatapultLR",
    "CatapultMonitor",
    "CatapultPolicy",
    "CatapultSGD",
    "CriticalLR",
    "LossModule",
    "MeasurementError",
    "MeasurementWarning",
    "RunLog",
    "critical_lr",
    "is_measuring",
    "read_log",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
