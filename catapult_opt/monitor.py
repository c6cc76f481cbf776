"""Observe, measure, count and log the steps of a training; `CatapultMonitor` does only that."""

from __future__ import annotations

import functools
import math
import os
import time
import warnings
import weakref
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .bases import BaseUpdate, check_supported, next_update
from .capture import Capture, LossCall, as_module
from .catapults import CatapultCounter, Event, is_super_critical
from .checks import check_whole_number
from .curvature.operators import ENGINES, FINITE_DIFFERENCE, StepSize
from .curvature.vectors import Vector
from .distributed import Group, group_of, local, reshard, unwrapped
from .measure import GRAM, CriticalLR, MeasurementError, MeasurementWarning, choose_engine, measure, trainable
from .policy import Catapulter, Decision
from .runlog import RunLogWriter
from .scaling import LossScaler, check_scaler
from .trees import read_numbers, tensors_in

# A first measurement pays once for a good vector; later ones start from it.
_COLD_TOL, _COLD_MATVECS = 9e-4, 30
# Counting what lies above the edge asks for more than acting on it does.
_COUNTING, _ACTING = (0.003, 10), (0.05, 5)
# What torch's batch_norm writes without a trace in the tensor's version.
_RUNNING_STATISTICS = ("running_mean", "running_var")
# Averages of mini-batch losses run over about this many steps.
_MINI_BATCH_SMOOTHING = 20
# What a measurement costs, in training steps: a curvature product, and the rest (benchmarks/curvature.py).
_PRODUCT, _MEASUREMENT = 1.3, 1.0
# So many steps' worth of measuring may be spent ahead of time: a training's first steps change the curvature most.
_ADVANCE = 5.0
# So much more where the loss rises though it should not.
_ALARM = 25.0


@dataclass(frozen=True)
class Observation:
    """What a step saw before its update."""

    loss: float | None  # None: left on its device, on a step where nobody asks for it
    critical: CriticalLR | None  # eta_crit of the base update; None on a step that was not (or could not be) measured
    vector: Vector | None  # to start the next measurement from
    seconds: float  # spent measuring
    smoothing: int  # steps to average over: 1 where the batch is the same every step
    late: Tensor | None = None  # the loss, if left on its device
    noisy: float = 1.0  # of the critical rate, this part is left with mini-batch noise

    @property
    def eta_crit(self) -> float | None:
        """The critical rate to act on; None where nothing was measured."""
        return None if self.critical is None else self.critical.eta_crit * self.noisy

    @property
    def squared_error(self) -> bool:
        return self.critical is not None and self.critical.squared_error


@dataclass(frozen=True)
class _Entry:
    """A step decided, to be counted and logged once its loss is known."""

    record: dict[str, Any]
    rate: float
    critical: CriticalLR | None
    smoothing: int
    events: list[Event]
    late: Tensor | None = None


class Clock:
    """How long a training has run since its first step, and how much of that was spent measuring.

    Args:
        overhead: the share that measuring may take; None: no limit.

    What quiet phases leave of the share is there for catapults, which want many measurements at once.
    """

    def __init__(self, overhead: float | None, group: Group) -> None:
        self._overhead, self._group = overhead, group
        self._began: float | None = None
        self._lap = 0.0
        self.spent = 0.0  # seconds

    @property
    def elapsed(self) -> float:
        return 0.0 if self._began is None else time.perf_counter() - self._began

    @property
    def affordable(self) -> bool:
        return self._overhead is None or not self._group.any(self.spent > self._overhead * self.elapsed)

    def start(self) -> None:
        """At the first step: the clock runs from here."""
        if self._began is None:
            self._began = time.perf_counter()

    def spend(self, seconds: float) -> float:
        self.spent += seconds
        return seconds

    def lap(self) -> float:
        """Seconds since the last call."""
        before, self._lap = self._lap, self.elapsed
        return self._lap - before


def measurement_cost(matvecs: int) -> float:
    """Of a measurement with so many curvature products, in training steps (counted, not timed)."""
    return _MEASUREMENT + _PRODUCT * matvecs


class Budget:
    """What a controller may measure on mini-batches: counted, so that a run measures on the same steps anywhere.

    Args:
        share: of the training's steps; inf: no limit.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self.spent = 0.0  # training steps' worth of measuring
        self.alarm = False  # the loss rises where it should not: there is more to spend

    def allows(self, step: int) -> bool:
        """May this step be measured?"""
        return self.spent <= self._share * step + _ADVANCE + self.alarm * _ALARM


def check_overhead(overhead: float | None) -> None:
    if overhead is None:
        return
    if not isinstance(overhead, (int, float)) or isinstance(overhead, bool) or not 0 < overhead < 1:
        raise ValueError(
            f"overhead must be a share of the running time above 0 and below 1, such as 0.05 for 5 %, got {overhead!r}"
        )


class Session:
    """What all faces share around an update: observe the step, count, log.

    Args:
        face: name of the public class, for the log.
        optimizer: whose parameters are trained.
        model, criterion, outputs: see `CatapultSGD`.
        every: measure at least every so many steps; None: only when asked to (`record`).
        share: of the steps' time that the measurements a controller asks for may take, by count, where batches differ
            and `overhead` sets no limit; None: nobody acts on them, they only have to be exact.
        overhead: share of the running time that measuring may take, see `CatapultSGD`; None: no limit.
        engine: how curvature is measured, see `CatapultSGD`.
        log: path of the run log, or None.
        settings: for the header of the log.
        process_group: whose ranks train together, see `CatapultSGD`.
        copies: of the parameters that the face keeps, for the log.

    Losses on an accelerator are read, which waits for it, on measured steps and where asked for; the others stay there
    until then and are counted and logged in order.
    """

    def __init__(
        self,
        face: str,
        optimizer: Optimizer,
        model: nn.Module,
        criterion: Any,
        *,
        outputs: Callable[[Any], Any] | None,
        every: int | None,
        overhead: float | None,
        engine: str,
        log: str | os.PathLike[str] | None,
        settings: dict[str, Any],
        grad_scaler: LossScaler | None,
        copies: int,
        process_group: Any,
        share: float | None = None,
    ) -> None:
        check_scaler(grad_scaler)
        check_overhead(overhead)
        check_model(model, _params(optimizer))
        if every is not None:
            check_whole_number("every", every)
        if engine not in ("auto", GRAM, *ENGINES):
            raise ValueError(f"engine must be one of auto, {GRAM}, {', '.join(ENGINES)}, got {engine!r}")
        if outputs is not None and criterion is not None:
            raise ValueError(f"outputs picks the loss where criterion is None, got outputs={outputs!r} and a criterion")
        if outputs is not None and not callable(outputs):
            raise TypeError(f"outputs must be a function of the model's output, got {outputs!r}")
        if log is not None and not isinstance(log, (str, os.PathLike)):
            raise TypeError(f"log must be a path, got {log!r}")
        self._called, self._process_group = model, process_group
        self._group = group_of(model, _params(optimizer), process_group)
        if self._group.sharded and engine not in ("auto", FINITE_DIFFERENCE):
            raise ValueError(
                f"engine must be auto or {FINITE_DIFFERENCE} for a model under fully_shard, got {engine!r}"
            )
        self.model = unwrapped(model)
        self.criterion = None if criterion is None else as_module(criterion)
        self._optimizer = weakref.ref(optimizer)  # no cycle: hooks and log go when the optimizer goes
        self._counter = CatapultCounter()
        self.step = 0
        self.last: CriticalLR | None = None
        self.step_size = StepSize()
        self.engine = "" if engine == "auto" else engine  # decided on the first measured step
        self._events: list[Event] = []  # of the present step
        self._told: set[str] = set()  # why measurements failed
        self._every = every
        self._clock = Clock(overhead, self._group)
        self._accuracy = _COUNTING if share is None else _ACTING
        self._budget = Budget(share if share is not None and overhead is None else math.inf)
        self._copies = copies
        self._outputs = outputs
        self._face, self._settings = face, settings
        self._writer = RunLogWriter(log) if log is not None and self._group.writes else None
        self._waiting: list[_Entry] = []  # for their losses
        self._finish = weakref.finalize(self, _finish, self._waiting, self._counter, self._writer)
        self._started = self._rewound = False
        self._early: list[tuple[int, dict[str, float]]] = []  # metrics from before the log was begun
        self._moving: set[str] = set()  # names of the buffers that forward passes change
        self._repeated = False
        self._batch_size: int | None = None  # of the first step
        self._due: int | None = None  # step of the next measurement asked for
        self._measured_at = 0  # step of the last measurement
        self._previous = ""  # fingerprint of the last measured batch
        params = functools.partial(_trainable, self._optimizer)
        self.capture = Capture(self.model, self.criterion, params, outputs, grad_scaler, called=model)
        self.capture.arm()

    @property
    def params(self) -> list[Tensor]:
        """The optimizer's trainable parameters at present: groups are added and layers unfrozen along the way."""
        return _trainable(self._optimizer)

    @property
    def together(self) -> bool:
        """Does this process train with others?"""
        return self._group.size > 1

    @property
    def counter(self) -> CatapultCounter:
        """Counts up to the present step."""
        self.catch_up()
        return self._counter

    def catch_up(self) -> bool:
        """Read the losses left on the device; were there any?"""
        waited = bool(self._waiting)
        _catch_up(self._waiting, self._counter, self._writer)
        return waited

    def saw_nothing(self) -> bool:
        """No forward pass since the last step, on no process: the call of an initialiser, or a mistake."""
        nothing = self.capture.forwards_seen == 0 and not self.capture.pending
        return not self._group.any(not nothing)

    def initialising(self) -> bool:
        """A step at rate 0 without a loss: torch.distributed.checkpoint makes the optimizer's state so."""
        optimizer = self._optimizer()
        assert optimizer is not None
        still = all(float(g["lr"]) == 0 for g in optimizer.param_groups)
        return still and not self._group.any(not self.capture.problem())

    def observe(self, start: Vector | None, update: BaseUpdate, need_loss: bool = False) -> Observation:
        """Take the step's captured calls; on a measured step find its critical rate.

        Args:
            start: warm-start vector.
            update: what the base optimizer is about to do.
            need_loss: read the loss whatever it takes.

        Raises:
            RuntimeError: nothing was captured; says what to do.
        """
        calls, late, read = self._taken(need_loss)
        loss = _catch_up(self._waiting, self._counter, self._writer, late) if read else None
        if self._counter.measured_steps == 0 and loss is not None and not math.isfinite(loss):
            raise MeasurementError(f"the first loss is {loss}: is there a NaN or inf in the batch or the weights?")
        begun = time.perf_counter()
        self._start_log(calls)
        self.step += 1
        self._clock.start()
        found: CriticalLR | None = None
        vector: Vector | None = None
        if self.capture.armed:
            self._notice_repetition(calls)
            self._moving = self._moved_by(calls)
            if (loss is not None and math.isfinite(loss)) or self._counter.measured_steps == 0:
                found, vector = self._measure(calls, start, update)
            self.last = found or self.last
        seconds = self._clock.spend(time.perf_counter() - begun if self.capture.armed else 0.0)
        smoothing = 1 if self._repeated else _MINI_BATCH_SMOOTHING
        noisy = 1.0 if self._repeated else update.noisy
        return Observation(loss, found, vector, seconds, smoothing, None if read else late, noisy)

    def _taken(self, need_loss: bool) -> tuple[list[LossCall], Tensor, bool]:
        """The step's calls of this process, the loss of all, and whether that is to be read."""
        if self.step == 0 and self._group.size == 1:  # torch.distributed may have been set up since
            group_of(self._called, self.params, self._process_group)
        problem = self.capture.problem()
        if problem and self._group.size == 1:
            raise RuntimeError(problem)
        if self.capture.armed:
            self._check_params()
        calls = [] if problem else self.capture.take()
        values = [c.value * c.weight for c in calls if c.weight is not None]
        late = _summed(values) if values else torch.zeros((), device=self.params[0].device)
        read = need_loss or self.capture.armed or late.device.type == "cpu"
        if self._group.size > 1:
            # A rank without data may go along, but not where weights are gathered: that needs its forward passes.
            out = float(bool(problem)) * (self._group.size if self._group.sharded else 1)
            late, missing = self._group.mean(torch.stack([late.double(), late.double().new_tensor(out)]))
            if problem:
                self.capture.clear()
            if read and float(missing) >= 1:
                raise RuntimeError(problem or "another process has no loss to measure; its error says why")
        return calls, late, read

    def decide(self, machine: Catapulter, seen: Observation) -> Decision:
        """What a controller does in the step observed; as before where its loss is left on the device."""
        if seen.loss is None:
            return Decision(machine.rate, machine.phase)
        return machine.update(
            step=self.step,
            loss=seen.loss,
            eta_crit=seen.eta_crit,
            smoothing=seen.smoothing,
            squared_error=seen.squared_error,
        )

    def record(
        self,
        seen: Observation,
        rate: float,
        decision: Decision | None = None,
        averages: dict[str, float] | None = None,
    ) -> None:
        """Count and log the step, and plan the next measurement.

        Args:
            seen: what `observe` gave.
            rate: of the update.
            decision: what `decide` gave; None: nobody decides.
            averages: what the decision went by, where that is not the present value, for the log.
        """
        record: dict[str, Any] = {"step": self.step, "loss": seen.loss, "effective_lr": rate}
        found = seen.critical
        events, self._events = [*self._events, *(decision.events if decision else ())], []
        if found is not None:
            record |= {
                "eta_crit": found.eta_crit,
                "lambda_max": found.lambda_max,
                "residual": found.residual,
                "matvecs": found.matvecs,
                "super_critical": is_super_critical(rate, found.eta_crit),
                "phase": decision.phase if decision else "watch",
                "probe_seconds": seen.seconds,
                "elapsed": self._clock.lap(),
                **(averages or {}),
            }
            self._measured_at = self.step
            if found.ntk_lambda_max is not None:
                record["ntk_lambda_max"] = found.ntk_lambda_max
        elif self._measured_at:
            record["age"] = self.step - self._measured_at  # steps since the critical rate in use was measured
        entry = _Entry(record, rate, found, seen.smoothing, events, seen.late)
        if seen.loss is None:
            self._waiting.append(entry)
        else:
            _write(entry, seen.loss, self._counter, self._writer)
        self._budget.alarm = decision is not None and decision.alarm
        if decision is not None and seen.loss is not None:
            due = self.step + decision.measure_in
            # A measurement already planned earlier stays: the intervals of a new phase do not push it out.
            self._due = due if found is not None else min(self._due or due, due)
            if self.step == 1 and self._every is None:
                self._due = 2  # is it the same batch again?
        self.arm_next()

    def arm_next(self) -> None:
        upcoming = self.step + 1
        wanted = self._due is not None and upcoming >= self._due
        wanted = wanted and (self._repeated or self._budget.allows(upcoming))
        wanted = wanted or (self._every is not None and self.step % self._every == 0)
        self.capture.arm(self.step == 0 or (wanted and self._clock.affordable))

    def log_metrics(self, values: dict[str, float]) -> None:
        """Write metrics of the user's own at the present step."""
        numbers = {}
        for name, value in values.items():
            try:
                numbers[name] = float(value)
            except (TypeError, ValueError) as error:
                raise TypeError(f"metric {name} must be a number, got {value!r}") from error
        if self._writer is not None and self._started:
            self.catch_up()
            self._writer.metrics(self.step, numbers)
        elif self._writer is not None:
            self._early.append((self.step, numbers))

    def aligned(self, kept: dict[Tensor, Tensor]) -> Vector | None:
        """A warm start kept by parameter, for the present ones, of which some may be new; on a measured step."""
        if not kept or not self.capture.armed:
            return None
        return [kept[p] if p in kept else torch.zeros_like(local(p)) for p in self.params]

    def buffers(self) -> dict[str, Tensor]:
        """The model's buffers that forward passes change, such as BatchNorm's running statistics."""
        return {name: b for name, b in self.model.named_buffers() if name in self._moving}

    def restore_buffers(self, kept: dict[str, Tensor]) -> None:
        """Put earlier values of `buffers` back: one NaN in running statistics would stay for good."""
        for name, b in self.model.named_buffers():
            if name in kept:
                b.copy_(kept[name])

    def detach(self) -> None:
        """Remove the hooks and close the log."""
        self.capture.detach()
        self._finish()
        self._writer = None

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers that continue the session elsewhere."""
        return {
            "step": self.step,
            "counter": self._counter.state_dict(),  # of the losses read so far
            "step_size": self.step_size.relative,
            "engine": self.engine,
            "repeated": self._repeated,
            "batch": self._previous,
            "due": self._due,
            "batch_size": self._batch_size,
            "measured_at": self._measured_at,
            "spent": self._budget.spent,
            "alarm": self._budget.alarm,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # In a log already begun, what comes next supersedes the steps after the one returned to.
        self._started, self._rewound = False, self._started or self._rewound
        self.step = state["step"]
        self.counter.load_state_dict(state["counter"])
        self.step_size.relative = state["step_size"]
        self.engine = state["engine"]
        self._repeated = state["repeated"]
        self._previous = state["batch"]
        self._due = state["due"]
        self._batch_size = state["batch_size"]
        self._measured_at = state["measured_at"]
        self._budget.spent, self._budget.alarm = state["spent"], state["alarm"]
        self.arm_next()

    def _measure(
        self, calls: Sequence[LossCall], start: Vector | None, update: BaseUpdate
    ) -> tuple[CriticalLR | None, Vector | None]:
        cold = self._counter.measured_steps == 0
        tol, max_matvecs = (_COLD_TOL, _COLD_MATVECS) if cold else self._accuracy
        try:
            if not self.engine:
                self.engine, reason = choose_engine(
                    self.model, self.criterion, self.params, calls, update.scale, self._group
                )
                self._events.append(("engine", {"engine": self.engine, "reason": reason}))
            found, vector = measure(
                self.model,
                self.criterion,
                self.params,
                calls,
                start=start,
                step=self.step_size,
                outputs=self._outputs,
                scale=update.scale,
                engine=self.engine,
                tol=tol,
                max_matvecs=max_matvecs,
                group=self._group,
            )
            if cold and not found.lambda_max > 0:
                raise MeasurementError(
                    f"the first batch has no curvature (lambda_max = {found.lambda_max:g}), so that any rate would do: "
                    "does the output depend on the weights at all, or are all units dead?"
                )
            self.step_size.relative = self._group.highest([self.step_size.relative])[0]
        except Exception as error:
            if self._counter.measured_steps == 0:
                self.step -= 1
                self._previous, self._batch_size = "", None
                raise
            if str(error) not in self._told:  # the others of this kind are counted in the log
                self._told.add(str(error))
                message = f"step {self.step} could not be measured, the last critical rate is kept: {error}"
                warnings.warn(message, MeasurementWarning, stacklevel=4)
            self._events.append(("measurement_failed", {"reason": str(error)}))
            return None, None
        if not cold:  # the first one is needed in any case
            self._budget.spent += measurement_cost(found.matvecs)
        eta_crit = update.critical(found.lambda_max)
        return CriticalLR(**{**vars(found), "eta_crit": eta_crit}), vector

    def _start_log(self, calls: Sequence[LossCall]) -> None:
        if self.capture.armed and self._batch_size is None:  # the first step always is; a resumed run knows from before
            sizes = [f.batch_size for call in calls for f in call.forwards]
            self._batch_size = int(self._group.sum(sum(s for s in sizes if s is not None))) or None
        if self._started:
            return
        if self._writer is not None:
            self._begin_log(self._writer)
        self._started = True

    def _begin_log(self, writer: RunLogWriter) -> None:
        header = {
            "name": writer.path.stem,
            "face": self._face,
            "settings": self._settings,
            "batch_size": self._batch_size,
            "parameters": sum(p.numel() for p in self.params),
            "extra_bytes": self._copies * sum(local(p).numel() * p.element_size() for p in self.params),
        }
        writer.start(header, resumed_at=self.step if self.step > 0 or self._rewound else None)
        for step, numbers in self._early:
            writer.metrics(step, numbers)
        self._early = []

    def _check_params(self) -> None:
        try:
            check_model(self.model, self.params)
        except ValueError as error:
            raise RuntimeError(
                f"{error}. If it was replaced after the optimizer was made, make the optimizer anew"
            ) from None

    def _moved_by(self, calls: Sequence[LossCall]) -> set[str]:
        """Names of the buffers that these calls' forward passes changed."""
        moved = {(id(b.module), b.name) for call in calls for f in call.forwards for b in f.buffers}
        modules = self.model.named_modules()
        places = ((path, id(m), name) for path, m in modules for name, _ in m.named_buffers(recurse=False))
        return {
            f"{path}.{name}" if path else name
            for path, module, name in places
            if (module, name) in moved or name in _RUNNING_STATISTICS
        }

    def _notice_repetition(self, calls: Sequence[LossCall]) -> None:
        """Is this batch the same as the last one measured (full-batch training)? Then nothing has to be averaged."""
        tensors = [t for call in calls for f in call.forwards for t in tensors_in((f.args, f.kwargs))]
        batch = _fingerprint(tensors[0]) if tensors else ""
        if self._group.size > 1:  # the same on all: one number of all parts (a rank without data has none)
            parts = self._group.sum(zlib.crc32(batch.encode()) if batch or not calls else math.nan)
            batch = "" if math.isnan(parts) else f"{parts:.0f}"
        if not batch:
            return
        if self._previous:
            self._repeated = batch == self._previous
        self._previous = batch


class Beside:
    """What a face that stands beside somebody's optimizer shows, and its hook on the step."""

    _session: Session

    @property
    def criterion(self) -> nn.Module | None:
        """The criterion whose calls are observed: a plain function given as criterion must be called through this."""
        return self._session.criterion

    @property
    def engine(self) -> str:
        """How curvature is measured; empty until the first measured step has decided it."""
        return self._session.engine

    @property
    def last(self) -> CriticalLR | None:
        """The last measurement: of that step's batch, at the weights before its update."""
        return self._session.last

    @property
    def super_critical_steps(self) -> int:
        """Measured steps with eta - eta_crit > 1e-8: the thesis' count of catapults in SGD."""
        return self._session.counter.super_critical_steps

    @property
    def catapults(self) -> int:
        """Episodes completed: rise from a super-critical start, peak, return with a lower lambda_max."""
        return self._session.counter.catapults

    @property
    def collapses(self) -> int:
        """Times the curvature vanished (dead units)."""
        return self._session.counter.collapses

    @property
    def measured_steps(self) -> int:
        return self._session.counter.measured_steps

    def log_metrics(self, **values: float) -> None:
        """Log metrics at the present step, e.g. val_loss=0.3; names that start with `val` rank runs in the report."""
        self._session.log_metrics(values)

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
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
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


class CatapultMonitor(Beside):
    """Watch a training: measure critical rates, count catapults, write the run log; change nothing.

    The training with a monitor is bit-identical to the one without. The measured steps cost about one to five extra
    training steps each, so `every` sets the price.

    Args:
        optimizer: torch's SGD, Adam, AdamW, RMSprop or Adagrad; measured is that update's own critical rate (`bases`).
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
        self._optimizer = optimizer
        settings = {"every": every, "overhead": overhead, "optimizer": type(optimizer).__name__}
        settings |= plain_settings(optimizer.defaults)
        self._session = Session(
            type(self).__name__,
            optimizer,
            model,
            criterion,
            outputs=outputs,
            every=every,
            overhead=overhead,
            engine=engine,
            log=log,
            settings=settings,
            grad_scaler=grad_scaler,
            copies=1,
            process_group=process_group,
        )
        self._vector: dict[Tensor, Tensor] = {}
        self._handle = optimizer.register_step_pre_hook(self._before_step)

    def detach(self) -> None:
        """Stop watching: remove the hooks, close the log."""
        self._handle.remove()
        self._session.detach()

    def _observe(self, optimizer: Optimizer) -> None:
        if self._session.initialising() or (not self._session.together and self._session.saw_nothing()):
            return
        if getattr(optimizer, "grad_scale", None) is not None:
            raise RuntimeError(
                "CatapultMonitor cannot watch a fused optimizer under a GradScaler, which unscales gradients where "
                "nobody sees it: pass fused=False to the optimizer"
            )
        update = next_update(optimizer, scale=self._session.capture.armed)
        seen = self._session.observe(self._session.aligned(self._vector), update)
        if seen.vector is not None:
            self._vector = dict(zip(self._session.params, seen.vector, strict=True))
        self._session.record(seen, update.rate)


def _catch_up(
    waiting: list[_Entry], counter: CatapultCounter, writer: RunLogWriter | None, loss: Tensor | None = None
) -> float | None:
    """Read the losses left on the device and this one, all at once; count and log the steps that waited for theirs."""
    late = [entry.late for entry in waiting if entry.late is not None] + ([] if loss is None else [loss])
    numbers = read_numbers(late) if late else []
    for entry, number in zip(waiting, numbers, strict=False):
        _write(entry, number, counter, writer)
    waiting.clear()
    return None if loss is None else numbers[-1]


def _summed(values: list[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(values).sum()


def _write(entry: _Entry, loss: float, counter: CatapultCounter, writer: RunLogWriter | None) -> None:
    found, step = entry.critical, entry.record["step"]
    events = counter.update(
        loss=loss,
        rate=entry.rate,
        lambda_max=None if found is None else found.lambda_max,
        eta_crit=None if found is None else found.eta_crit,
        smoothing=entry.smoothing,
    )
    if writer is not None:
        writer.step({**entry.record, "loss": loss})
        for name, details in [*entry.events, *events]:
            writer.event(step, name, **details)


def _finish(waiting: list[_Entry], counter: CatapultCounter, writer: RunLogWriter | None) -> None:
    """At detach, when the session goes, or when the interpreter does."""
    _catch_up(waiting, counter, writer)
    if writer is not None:
        writer.close()


def _params(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _trainable(reference: weakref.ref[Optimizer]) -> list[Tensor]:
    optimizer = reference()
    return [] if optimizer is None else [p for p in _params(optimizer) if p.requires_grad]


def check_model(model: nn.Module, params: Sequence[Tensor]) -> None:
    """The model must hold all trainable parameters of the optimizer, and there must be some."""
    reshard(model)  # a validation leaves gathered weights in place of the optimizer's
    known = {id(p) for p in trainable(model)}
    if not any(p.requires_grad for p in params):
        raise ValueError("params: none of the parameters requires a gradient")
    for i, p in enumerate(params):
        if p.requires_grad and id(p) not in known:
            raise ValueError(
                f"params: parameter {i} of shape {tuple(p.shape)} is not a parameter of model "
                f"({type(model).__name__}): pass the model that holds it"
            )


def _fingerprint(tensor: Tensor) -> str:
    """The same for the same shape and values: short enough for a checkpoint, and does not keep the batch alive.

    "" where the values cannot be read: a batch not known to be a repetition.
    """
    if tensor.is_meta or tensor.layout != torch.strided:
        return ""
    flat = tensor.detach().flatten().cpu().contiguous()
    return f"{tuple(tensor.shape)} {tensor.dtype} {zlib.crc32(flat.view(torch.uint8).numpy().data):08x}"


def plain_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """What of the settings can stand in a log."""
    return {k: v if isinstance(v, (int, float, str, bool, type(None))) else str(v) for k, v in settings.items()}
