"""What a step saw before its update: its loss, whether its batch repeats, and on measured steps its critical rate."""

from __future__ import annotations

import functools
import math
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .capture import Capture
from .catapults import Event
from .criterion import as_module
from .curvature.engines import ENGINES, FINITE_DIFFERENCE, StepSize
from .distributed import Group, group_of, unwrapped
from .link import LossCall
from .measure import GRAM, CriticalLR, MeasurementError, MeasurementWarning, choose_engine, measure
from .options import MeasuringOptions
from .parameters import check_model, params_of
from .repetition import batch_hash
from .state import FieldsState, field_of, take_over
from .updates import BaseUpdate
from .vectors import Vector

# A first measurement pays once for a good vector; later ones start from it.
_COLD_TOL, _COLD_MATVECS = 9e-4, 30
# Relative accuracy and the most products of later measurements: counting what lies above the edge asks for more than
# acting on it does.
COUNTING, ACTING = (0.003, 20), (0.05, 5)
# What torch's batch_norm writes without a trace in the tensor's version.
_RUNNING_STATISTICS = ("running_mean", "running_var")
# Averages of mini-batch losses run over about this many steps.
MINI_BATCH_WINDOW = 20


class _NoCurvature(MeasurementError):
    """A batch that gives no critical rate, such as one of loss 0: no reason to stop a training, first step or not."""


@dataclass(frozen=True)
class Observation:
    """What a step saw before its update."""

    # The number of the step, from 1.
    step: int
    # The loss; None where it is left on its device, on a step where nobody asks for it.
    loss: float | None
    # The loss left on its device, a 0-d tensor; None where it was read.
    unread_loss: Tensor | None
    # The critical rate of the base update; None on a step that was not (or could not be) measured.
    critical: CriticalLR | None
    # The vector to start the next measurement from; None where there is none.
    vector: Vector | None
    # Was there a measurement that found no positive curvature?
    flat: bool
    # Seconds spent measuring.
    seconds: float
    # Steps to average over: 1 where the batch is the same every step.
    window: int
    # Is the loss a squared error, as the last measurement found?
    squared_error: bool
    # With mini-batch noise, this part of the critical rate is left.
    minibatch_factor: float
    # What happened while measuring, for the log.
    events: tuple[Event, ...]

    @property
    def eta_crit(self) -> float | None:
        """The critical rate to act on; infinite where there is no curvature, None where nothing was measured."""
        if self.critical is None:
            return math.inf if self.flat else None
        return self.critical.eta_crit * self.minibatch_factor


@dataclass
class _State(FieldsState):
    # Steps observed.
    step: int = field_of(0, least=0)
    # How curvature is measured; "" before the first measured step.
    engine: str = field_of("", choices=("", "hessian", GRAM, *ENGINES))
    # Relative size of a finite-difference step, calibrated by the measurements so far; 0 before the first.
    step_size: float = field_of(0.0, least=0.0, most=1.0)
    # Is the batch the same in every step, as far as measured steps tell?
    repeated: bool = field_of(False)
    # Hash of the last measured batch, "" before there is one, and its step.
    batch: str = field_of("")
    batch_step: int = field_of(0, least=0)
    # Samples of the first step's batch, over all processes.
    batch_size: int | None = field_of(None, least=1)
    # Was there any measurement yet? Did the last one find that the loss is a squared error?
    measured: bool = field_of(False)
    squared_error: bool = field_of(False)
    # The curvature that it found; 0 before there is one.
    lambda_max: float = field_of(0.0, least=0.0)


class Observer:
    """Watches a model and its criterion for one optimizer, and measures where it is asked to.

    Args:
        optimizer: whose parameters are trained; it is not kept alive.
        model, criterion: see `CatapultSGD`.
        options: how to measure.
        accuracy: relative accuracy and most products of a measurement: `COUNTING` or `ACTING`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        criterion: Any,
        options: MeasuringOptions,
        accuracy: tuple[float, int],
    ) -> None:
        params = params_of(optimizer)
        check_model(model, params)
        options.check_criterion(criterion)
        self._called, self._options, self._accuracy = model, options, accuracy
        self.group = group_of(model, params, options.process_group)
        if self.group.sharded and options.engine not in ("auto", FINITE_DIFFERENCE):
            raise ValueError(
                f"engine must be auto or {FINITE_DIFFERENCE} for a model under fully_shard, got {options.engine!r}"
            )
        self.model = unwrapped(model)
        self.criterion = None if criterion is None else as_module(criterion)
        self._optimizer = weakref.ref(optimizer)  # no cycle: hooks and log go when the optimizer goes
        self._state = _State(engine="" if options.engine == "auto" else options.engine)
        self._step_size = StepSize()
        self.last: CriticalLR | None = None
        self._flat = False  # did the last measurement find no curvature?
        self._reported: set[str] = set()  # why measurements failed, of which the user was told
        self._moving: set[str] = set()  # names of the buffers that forward passes change
        trained = functools.partial(_trainable, self._optimizer)
        self._capture = Capture(self.model, self.criterion, trained, options.outputs, options.grad_scaler, called=model)
        self._capture.arm()

    @property
    def params(self) -> list[Tensor]:
        """The optimizer's trainable parameters at present: groups are added and layers unfrozen along the way."""
        return _trainable(self._optimizer)

    @property
    def step(self) -> int:
        """Steps observed so far."""
        return self._state.step

    @property
    def engine(self) -> str:
        """How curvature is measured; "" before the first measured step has decided it."""
        return self._state.engine

    @property
    def repeated(self) -> bool:
        """Is the batch the same every step (full-batch training)?"""
        return self._state.repeated

    @property
    def measures_next(self) -> bool:
        """Is the coming step to be measured?"""
        return self._capture.armed

    def measure_next(self, on: bool) -> None:
        """Measure the coming step, or only read its loss."""
        self._capture.arm(on)

    def drop_finished(self) -> None:
        """Forget the batches whose gradients were thrown away (zero_grad)."""
        self._capture.drop_finished()

    def saw_nothing(self) -> bool:
        """No forward pass since the last step in a process that trains alone: the call of an initialiser."""
        return self.group.size == 1 and self._capture.forwards_seen == 0 and not self._capture.pending

    def initialising(self) -> bool:
        """A step at rate 0 without a loss: torch.distributed.checkpoint makes the optimizer's state so."""
        optimizer = self._optimizer()
        assert optimizer is not None
        still = all(float(g["lr"]) == 0 for g in optimizer.param_groups)
        return still and not self.group.any(not self._capture.problem())

    def observe(
        self,
        start: Vector | None,
        update: BaseUpdate,
        *,
        read: Callable[[Tensor], float],
        begin: Callable[[int, int | None], None],
        need_loss: bool,
    ) -> Observation:
        """Take the step's captured calls; on a measured step find its critical rate.

        Args:
            start: warm-start vector.
            update: what the base optimizer is about to do.
            read: reads a loss from its device (with those that still wait there).
            begin: called with the steps so far and the size of the first batch before anything is measured.
            need_loss: read the loss whatever it takes.

        Raises:
            RuntimeError: nothing was captured; says what to do.
        """
        calls, unread, reading = self._captured(need_loss)
        loss = read(unread) if reading else None
        state = self._state
        if not state.measured and loss is not None and not math.isfinite(loss):
            raise MeasurementError(f"the first loss is {loss}: is there a NaN or inf in the batch or the weights?")
        begun = time.perf_counter()
        found: CriticalLR | None = None
        vector: Vector | None = None
        events: list[Event] = []
        cold, measuring = not state.measured, self._capture.armed
        batch_size = state.batch_size
        if measuring and batch_size is None:
            sizes = [f.batch_size or 0 for call in calls for f in call.forwards]
            batch_size = int(self.group.sum(sum(sizes))) or None
        begin(state.step, batch_size)
        if measuring:
            seen_again, self._flat = _repetition(calls, self.group, state), False
            if (loss is not None and math.isfinite(loss)) or cold:
                found, vector = self._measure(calls, start, update, events)
            self._moving = _moved_by(calls, self.model)
            state.batch_size = batch_size
            state.repeated, state.batch, state.batch_step = seen_again
            if found is not None:
                self.last, state.squared_error, state.lambda_max = found, found.squared_error, found.lambda_max
        state.step += 1
        return Observation(
            step=state.step,
            loss=loss,
            unread_loss=None if reading else unread,
            critical=found,
            vector=vector,
            flat=self._flat and measuring,
            seconds=time.perf_counter() - begun if measuring else 0.0,
            window=1 if state.repeated else MINI_BATCH_WINDOW,
            squared_error=state.squared_error,
            minibatch_factor=1.0 if state.repeated else update.minibatch_factor,
            events=tuple(events),
        )

    def buffers(self) -> dict[str, Tensor]:
        """The model's buffers that forward passes change, such as BatchNorm's running statistics, by name."""
        if not self._moving:  # asked for in every step: most networks have none
            return {}
        return {name: b for name, b in self.model.named_buffers() if name in self._moving}

    def expect_moving(self, names: Iterable[str]) -> None:
        """Take these buffers for those that forward passes change, until the next measured step shows it."""
        self._moving = set(names)

    def detach(self) -> None:
        """Remove the hooks from model and criterion."""
        self._capture.detach()

    def state_dict(self) -> dict[str, Any]:
        self._state.step_size = self._step_size.relative
        return self._state.as_dict()

    def parse(self, state: object) -> FieldsState:
        """The state checked, to be given to `take`."""
        return take_over(_State, state, "observer")

    def take(self, state: FieldsState) -> None:
        assert isinstance(state, _State)
        self._state, self._step_size.relative = state, state.step_size

    def _captured(self, need_loss: bool) -> tuple[list[LossCall], Tensor, bool]:
        """The step's calls of this process, the loss of all, and whether that is to be read."""
        capture, group = self._capture, self.group
        if self.step == 0 and group.size == 1:  # torch.distributed may have been set up since
            group_of(self._called, self.params, self._options.process_group)
        problem = capture.problem()
        if problem and group.size == 1:
            raise RuntimeError(problem)
        if capture.armed:
            self._check_params()
        calls = [] if problem else capture.take()
        values = [c.value * c.weight for c in calls if c.weight is not None]
        unread = _summed(values) if values else torch.zeros((), device=self.params[0].device)
        reading = need_loss or capture.armed or unread.device.type == "cpu"
        if group.size > 1:
            # A rank without data may go along, but not where weights are gathered: that needs its forward passes.
            out = float(bool(problem)) * (group.size if group.sharded else 1)
            unread, missing = group.mean(torch.stack([unread.double(), unread.double().new_tensor(out)]))
            if problem:
                capture.clear()
            if reading and float(missing) >= 1:
                raise RuntimeError(problem or "another process has no loss to measure; its error says why")
        return calls, unread, reading

    def _measure(
        self, calls: Sequence[LossCall], start: Vector | None, update: BaseUpdate, events: list[Event]
    ) -> tuple[CriticalLR | None, Vector | None]:
        state, cold = self._state, not self._state.measured
        tol, max_matvecs = (_COLD_TOL, _COLD_MATVECS) if cold else self._accuracy
        try:
            if not state.engine:
                state.engine, reason = choose_engine(
                    self.model, self.criterion, self.params, calls, update.scale, self.group
                )
                events.append(("engine", {"engine": state.engine, "reason": reason}))
            found, vector = measure(
                self.model,
                self.criterion,
                self.params,
                calls,
                start=start,
                before=state.lambda_max or None,
                step=self._step_size,
                outputs=self._options.outputs,
                scale=update.scale,
                engine=state.engine,
                tol=tol,
                max_matvecs=max_matvecs,
                group=self.group,
            )
            if not found.lambda_max > 0:
                raise _NoCurvature(
                    "the batch has no positive curvature, so that any rate would do: does the output depend on the "
                    "weights at all, are all units dead, or is the loss 0?"
                )
            self._step_size.relative = self.group.highest([self._step_size.relative])[0]
        except Exception as error:
            if cold and not isinstance(error, _NoCurvature):
                raise
            if str(error) not in self._reported:  # the others of this kind are counted in the log
                self._reported.add(str(error))
                message = f"step {self.step + 1} could not be measured, the last critical rate is kept: {error}"
                warnings.warn(message, MeasurementWarning, stacklevel=4)
            events.append(("measurement_failed", {"reason": str(error)}))
            self._flat = isinstance(error, _NoCurvature)
            return None, None
        state.measured = True
        eta_crit = update.critical(found.lambda_max)
        return CriticalLR(**{**vars(found), "eta_crit": eta_crit}), vector

    def _check_params(self) -> None:
        try:
            check_model(self.model, self.params)
        except ValueError as error:
            raise RuntimeError(
                f"{error}. If it was replaced after the optimizer was made, make the optimizer anew"
            ) from None


def _repetition(calls: Sequence[LossCall], group: Group, state: _State) -> tuple[bool, str, int]:
    """Is the batch the same in every step? Then nothing has to be averaged. And this batch's hash and step.

    Two steps in a row tell. Where the last measured step lies further back, the same batch may only have come by again,
    as in the same order of mini-batches every epoch: that confirms a repetition, but does not find one.
    """
    found, step = batch_hash(calls), state.step + 1
    if group.size > 1:  # the same on all: one number of all parts (a rank without data has none)
        parts = group.sum(math.nan if found is None and calls else (found or 0) % 2**40)
        found = None if math.isnan(parts) else int(parts)
    if found is None:
        return state.repeated, state.batch, state.batch_step
    known = state.repeated or not state.batch or state.batch_step == step - 1
    same = known and f"{found}" == state.batch
    return same, f"{found}", step


def _moved_by(calls: Sequence[LossCall], model: nn.Module) -> set[str]:
    """Names of the model's buffers that these calls' forward passes changed."""
    moved = {(id(b.module), b.name) for call in calls for f in call.forwards for b in f.buffers}
    modules = model.named_modules()
    places = ((path, id(m), name) for path, m in modules for name, _ in m.named_buffers(recurse=False))
    return {
        f"{path}.{name}" if path else name
        for path, module, name in places
        if (module, name) in moved or name in _RUNNING_STATISTICS
    }


def _trainable(reference: weakref.ref[Optimizer]) -> list[Tensor]:
    optimizer = reference()
    return [] if optimizer is None else [p for p in params_of(optimizer) if p.requires_grad]


def _summed(values: list[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(values).sum()
