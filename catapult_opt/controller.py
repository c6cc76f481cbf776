"""One controlled step, for both driving faces: observe, decide, remember, record; the face applies the decision."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from .memory import Memory, parse_buffers
from .observer import ACTING, Observer
from .options import MeasuringOptions
from .parameters import parameter_names
from .policy import Catapulter, CatapultPolicy, Decision
from .recorder import Recorder
from .schedule import MeasurementSchedule
from .state import VERSION, FieldsState
from .updates import BaseUpdate


@dataclass(frozen=True)
class ControllerState:
    """A state that was checked, part by part, and is ready to be taken over."""

    observer: FieldsState
    schedule: FieldsState
    counter: FieldsState
    policy: FieldsState
    buffers: dict[str, Tensor]


class Controller:
    """Decides the rate of every step of an optimizer, and keeps what that takes.

    Args:
        face: name of the public class, for the log.
        optimizer: whose rate it is.
        model, criterion: see `CatapultSGD`.
        policy: None for the default.
        options: how to measure.
        state: parameter -> dict, where warm start and average are kept.
        settings: of the optimizer, for the header of the log.

    Raises:
        ValueError, TypeError: an argument is not usable; says which and why.
    """

    def __init__(
        self,
        face: str,
        optimizer: Optimizer,
        model: nn.Module,
        criterion: Any,
        *,
        policy: CatapultPolicy | None,
        options: MeasuringOptions,
        state: MutableMapping[Tensor, dict[str, Any]],
        settings: dict[str, Any],
    ) -> None:
        if policy is not None and not isinstance(policy, CatapultPolicy):
            raise TypeError(f"policy must be a CatapultPolicy, got {policy!r}")
        policy = policy or CatapultPolicy()
        self.observer = observer = Observer(optimizer, model, criterion, options, ACTING)
        self.recorder = Recorder(face, observer, options, {"policy": asdict(policy), **settings}, copies=2)
        self.schedule = MeasurementSchedule(options, observer.group)
        self.memory = Memory(state)
        self._machine = Catapulter(policy)
        # Did the user load other weights since the last step? A checkpoint's weights come with a state of ours.
        self._reloaded, self._steps = False, 0
        self._handle = observer.model.register_load_state_dict_post_hook(_OnLoad(self))  # type: ignore[no-untyped-call]

    @property
    def phase(self) -> str:
        """What the policy does, see `policy`."""
        return self._machine.phase

    def step(self, update: BaseUpdate, unit: float = 1.0) -> Decision:
        """Observe the step about to be made and decide on its rate; remember and record what follows from it.

        Args:
            update: what the base optimizer is about to do.
            unit: the lr that the decision's rate is relative to.

        Raises:
            RuntimeError: nothing was captured, or the averaged weights are in place; nothing was changed.
        """
        if self.memory.in_place:
            raise RuntimeError("step() inside averaged(): leave it first, the averaged weights are not to be trained")
        observer, machine, memory = self.observer, self._machine, self.memory
        params = observer.params
        start = memory.start(params) if observer.measures_next else None
        self.schedule.clock.start()
        seen = observer.observe(start, update, read=self.recorder.read, begin=self.recorder.begin, need_loss=True)
        assert seen.loss is not None
        memory.prepare(params)
        if self._reloaded:  # what was there before is never to come back
            machine.begin_anew()
            memory.average(params, observer.buffers(), 1.0)
        self._reloaded, self._steps = False, self._steps + 1
        decision = machine.update(
            step=seen.step,
            loss=seen.loss,
            eta_crit=seen.eta_crit,
            window=seen.window,
            squared_error=seen.squared_error,
        )
        if seen.vector is not None:
            memory.remember(params, seen.vector)
        memory.average(params, observer.buffers(), decision.average)
        details = {"phase": decision.phase, **self.schedule.account(seen)}
        if seen.window > 1:
            details |= {"eta_crit_mean": machine.eta_crit, "log_lambda_sd": machine.spread}
        self.recorder.record(seen, update.rate / unit * decision.rate, decision.events, details)
        self.schedule.ask(seen.step, decision.measure_in)
        observer.measure_next(self.schedule.next_is_measured(seen.step))
        for name, about in decision.events:
            if name == "held_down":
                warnings.warn(
                    f"the rate has long been {about['rate'] / about['eta_crit']:.2g} of the critical one: "
                    f"{about['reason']}. Look at the batches, or end the training here",
                    stacklevel=4,
                )
        return decision

    def weights_were_loaded(self) -> None:
        """Somebody put other weights into the model; where no step was made yet, a checkpoint's."""
        self._reloaded = self._steps > 0

    def restore(self) -> None:
        """Put the averaged weights and buffers back into the model, for good.

        Raises:
            RuntimeError: they are there, for the time of `averaged`.
        """
        if self.memory.in_place:
            raise RuntimeError("use_averaged() inside averaged(): leave it first, which puts the weights back")
        self.memory.put(self.observer.params, self.observer.model)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights and buffers in place of the model's own."""
        with self.memory.averaged(self.observer.params, self.observer.model):
            yield

    def close(self) -> None:
        """Remove the hooks and close the log."""
        self._handle.remove()
        self.observer.detach()
        self.recorder.close()

    def state_dict(self, params: Sequence[Tensor]) -> dict[str, Any]:
        """What a run goes on from beside the per-parameter tensors: plain values that JSON can hold.

        Args:
            params: those whose tensors are saved beside it, in that order: their names are in the state.
        """
        return {
            "version": VERSION,
            "parameters": parameter_names(self.observer.model, params),
            "observer": self.observer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "counter": self.recorder.state_dict(),
            "policy": self._machine.state_dict(),
            "buffers": self.memory.encoded_buffers(),
        }

    def parse(self, state: dict[str, Any]) -> ControllerState:
        """Check a state, of this version or of 0.1.0; nothing is taken over yet.

        Raises:
            ValueError: a field is not as it should be; names it.
        """
        state = _upgraded(state)
        return ControllerState(
            observer=self.observer.parse(state.get("observer", {})),
            schedule=self.schedule.parse(state.get("schedule", {})),
            counter=self.recorder.parse(state.get("counter", {})),
            policy=self._machine.parse(state.get("policy", {})),
            buffers=parse_buffers(state.get("buffers", {}), self.observer.model),
        )

    def take(self, state: ControllerState) -> None:
        """Go on as the run would have gone where the state was taken."""
        self.observer.take(state.observer)
        self.schedule.take(state.schedule)
        self.recorder.take(state.counter)
        self._machine.take(state.policy)
        self.memory.take_buffers(state.buffers)
        self.observer.expect_moving(state.buffers)
        self._reloaded, self._steps = False, 0
        self.observer.measure_next(self.schedule.next_is_measured(self.observer.step))


class _OnLoad:
    """A hook on loading a state dict that does not keep its controller alive, and is inert in a copy of the model."""

    def __init__(self, controller: Controller | None = None) -> None:
        self._controller = None if controller is None else weakref.ref(controller)

    def __call__(self, module: nn.Module, keys: Any) -> None:
        controller = None if self._controller is None else self._controller()
        if controller is not None:
            controller.weights_were_loaded()

    def __reduce__(self) -> tuple[type[_OnLoad], tuple[()]]:
        return _OnLoad, ()


def _upgraded(state: dict[str, Any]) -> dict[str, Any]:
    """A state in the present format.

    Raises:
        ValueError: not a state, or of a newer version.
    """
    version = state.get("version", 1 if "session" in state or "machine" in state else None)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(f"state_dict: version must be a whole number, got {version!r}: pass what state_dict() gave")
    if version > VERSION:
        raise ValueError(
            f"state_dict: is of version {version}, and this catapult_opt reads up to {VERSION}: upgrade it with "
            "`pip install --upgrade catapult_opt`"
        )
    if version > 1:
        return state
    session, machine = state.get("session"), state.get("machine")
    if not isinstance(session, dict) or not isinstance(machine, dict):
        raise ValueError("state_dict: session and machine must be mappings: pass what state_dict() gave")
    # The policy of 0.1.0 was another one; that of today begins anew.
    counter = session.get("counter", {})
    measured = counter.get("measured", 0) if isinstance(counter, dict) else 0
    return {
        "observer": {**session, "measured": bool(measured)},
        "schedule": session,
        "counter": {**counter, "measured_at": session.get("measured_at", 0)} if isinstance(counter, dict) else counter,
        "policy": {},
        "buffers": state.get("buffers", {}),
    }
