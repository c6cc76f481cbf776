"""How a training is measured: the keywords that all three faces share, checked once."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from .checks import check_whole_number
from .curvature.engines import ENGINES
from .grad_scaler import LossScaler, check_scaler
from .measure import GRAM


@dataclass(frozen=True)
class MeasuringOptions:
    """What `CatapultSGD`, `CatapultLR` and `CatapultMonitor` take beside their own settings.

    Raises:
        ValueError, TypeError: an option is not usable; says which and why.

    Example:
        >>> MeasuringOptions(every=10, overhead=0.05).engine
        'auto'
    """

    # Measure at least every so many steps; None: when the policy asks for it.
    every: int | None = None
    # The share of the running time that measuring may take; None: no limit by the clock.
    overhead: float | None = None
    # How products with the curvature are made; "auto": decided on the first measured step.
    engine: str = "auto"
    # Path of the run log, or None.
    log: str | os.PathLike[str] | None = None
    # Where the model returns the loss (criterion=None): picks it from what the model returns.
    outputs: Callable[[Any], Any] | None = None
    # The torch.amp.GradScaler that scales the loss, if one does.
    grad_scaler: LossScaler | None = None
    # The torch.distributed group whose ranks average their gradients; None: found from the model.
    process_group: Any = None

    def __post_init__(self) -> None:
        check_scaler(self.grad_scaler)
        if self.every is not None:
            check_whole_number("every", self.every)
        _check_overhead(self.overhead)
        if self.engine not in ("auto", GRAM, *ENGINES):
            raise ValueError(f"engine must be one of auto, {GRAM}, {', '.join(ENGINES)}, got {self.engine!r}")
        if self.outputs is not None and not callable(self.outputs):
            raise TypeError(f"outputs must be a function of the model's output, got {self.outputs!r}")
        if self.log is not None and not isinstance(self.log, (str, os.PathLike)):
            raise TypeError(f"log must be a path, got {self.log!r}")

    def check_criterion(self, criterion: Any) -> None:
        """A ValueError for options that do not go with the criterion."""
        if self.outputs is not None and criterion is not None:
            raise ValueError(
                f"outputs picks the loss where criterion is None, got outputs={self.outputs!r} and a criterion"
            )

    def given(self) -> dict[str, Any]:
        """The options that differ from their defaults, by name."""
        values = {f.name: (getattr(self, f.name), f.default) for f in fields(self)}
        return {name: value for name, (value, default) in values.items() if value != default}


def _check_overhead(overhead: float | None) -> None:
    if overhead is None:
        return
    if not isinstance(overhead, (int, float)) or isinstance(overhead, bool) or not 0 < overhead < 1:
        raise ValueError(
            f"overhead must be a share of the running time above 0 and below 1, such as 0.05 for 5 %, got {overhead!r}"
        )
