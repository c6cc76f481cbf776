"""`CatapultMonitor`: watches a training under any optimizer whose critical rate is known, and changes nothing."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from .checks import check_whole_number
from .grad_scaler import LossScaler
from .memory import Memory
from .observer import COUNTING, Observer
from .options import MeasuringOptions
from .recorder import Recorder
from .schedule import MeasurementSchedule
from .step_hook import StepHook, plain_settings
from .updates import check_supported, next_update


class CatapultMonitor(StepHook):
    """Watch a training: measure critical rates, count catapults, write the run log; change nothing.

    The training with a monitor is bit-identical to the one without. The measured steps cost about one to five extra
    training steps each, so `every` sets the price.

    Args:
        optimizer: torch's SGD, Adam, AdamW, RMSprop or Adagrad; each has its own critical rate (see `updates`).
        model: the module whose outputs reach the criterion.
        criterion: the loss module called in the loop; a plain function must be called through `monitor.criterion`;
            None where the model returns the loss.
        every: measure every so many steps.
        overhead: share of the running time that measuring may take, such as 0.05: measurements beyond it are left out.
            None: no limit, and every run measures on the same steps.
        engine: how curvature is measured, see `CatapultSGD`.
        log: path of the run log (JSON lines), or None.
        outputs: with criterion=None, picks the scalar loss from what the model returns.
        grad_scaler: the torch.amp.GradScaler that scales the loss, if one does (or an object with its scale(loss)).
        process_group: the ranks that average their gradients, see `CatapultSGD`.

    Raises:
        ValueError, TypeError: an argument is not usable; says which and why.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> criterion = torch.nn.MSELoss()
        >>> monitor = CatapultMonitor(optimizer, model=model, criterion=criterion)
        >>> criterion(model(torch.eye(2)), torch.zeros(2, 1)).backward()
        >>> optimizer.step()
        >>> monitor.measured_steps, round(monitor.last.lambda_max, 3)
        (1, 3.0)
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        model: nn.Module,
        criterion: Any,
        every: int = 1,
        overhead: float | None = None,
        engine: str = "auto",
        log: str | os.PathLike[str] | None = None,
        outputs: Callable[[Any], Any] | None = None,
        grad_scaler: LossScaler | None = None,
        process_group: Any = None,
    ) -> None:
        check_supported(optimizer)
        check_whole_number("every", every)
        options = MeasuringOptions(
            every=every,
            overhead=overhead,
            engine=engine,
            log=log,
            outputs=outputs,
            grad_scaler=grad_scaler,
            process_group=process_group,
        )
        super().__init__(optimizer)
        self._observer = Observer(optimizer, model, criterion, options, COUNTING)
        settings = {"optimizer": type(optimizer).__name__, **plain_settings(optimizer.defaults)}
        self._recorder = Recorder(type(self).__name__, self._observer, options, settings, copies=1)
        self._schedule = MeasurementSchedule(options, self._observer.group)
        self._memory = Memory(defaultdict(dict))  # of the warm start alone
        self._attach(optimizer)

    def _observe(self, optimizer: Optimizer) -> None:
        observer = self._observer
        if observer.initialising() or observer.saw_nothing():
            return
        if getattr(optimizer, "grad_scale", None) is not None:
            raise RuntimeError(
                "CatapultMonitor cannot watch a fused optimizer under a GradScaler, which unscales gradients where "
                "nobody sees it: pass fused=False to the optimizer"
            )
        update = next_update(optimizer, scale=observer.measures_next)
        start = self._memory.start(observer.params) if observer.measures_next else None
        recorder = self._recorder
        self._schedule.clock.start()
        seen = observer.observe(start, update, read=recorder.read, begin=recorder.begin, need_loss=False)
        if seen.vector is not None:
            self._memory.remember(observer.params, seen.vector)
        recorder.record(seen, update.rate, details={"phase": "watch", **self._schedule.account(seen)})
        observer.measure_next(self._schedule.next_is_measured(seen.step))
