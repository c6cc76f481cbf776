"""`CatapultSGD`: torch.optim.SGD that finds its own learning rate, above the critical one."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT
from torch.optim.sgd import sgd

from .bases import next_update
from .curvature.vectors import Vector
from .distributed import local
from .measure import CriticalLR
from .monitor import Session, check_model
from .policy import Catapulter, CatapultPolicy, Decision
from .scaling import LossScaler

_VECTOR = "catapult_vector"  # warm start of the next measurement
_SNAPSHOT = "catapult_snapshot"  # weights to return to from a catapult that does not come back
_BUFFERS = "catapult_buffers"  # BatchNorm statistics and the like to return to, as text: a group holds no tensors
# Everything else, as a JSON string: immutable, and survives every kind of checkpoint. Written when somebody asks; ""
# where what is known here is newer.
_STATE = "catapult_state"


class CatapultSGD(Optimizer):
    """SGD with momentum at a rate of its own: above the critical one, so that the loss catapults and features align.

    A drop-in for `torch.optim.SGD` that needs no learning rate: hooks on `model` and `criterion` see the batches, at
    `step()` the top eigenvalue of their curvature gives the critical rate of this very update, and the policy decides
    how far above or below it to go. The rate applied stands in `group["effective_lr"]`.

    On an accelerator one number is read from it a step, the loss, while a catapult may be under way (most loops log it
    anyway); once settled, only on measured steps.

    Args:
        params: parameters or groups, as for torch.optim.SGD; groups of different lr keep their proportion.
        model: the module called in the loop. None: no controller, torch.optim.SGD bit for bit, and lr is the rate.
        criterion: the loss module called in the loop, (outputs, targets) -> scalar. A plain function is wrapped: call
            it as `optimizer.criterion(...)`. None where the model returns the loss (full Hessian instead of GGN).
        lr: multiplies the controller's rate: leave it at 1, or let a scheduler drive it.
        momentum, dampening, weight_decay, nesterov, maximize, foreach, differentiable: as for torch.optim.SGD.
        policy: a `CatapultPolicy`; None for the default. `CatapultPolicy(total_steps=...)` where the length is known.
        every: measure at least every so many steps; None: when the policy asks for it (1: every step, the dearest log).
        overhead: share of the running time that measuring may take, such as 0.05; a measurement beyond it waits, and
            the rate goes by the last one. None: no limit, and the same run measures on the same steps every time.
        engine: how curvature is measured: "finite-difference" (works on everything), "forward" or "double-backward"
            (exact where they work), "layerwise-gram" (linear layers, one scalar output); "auto": decided on step one.
        log: path of the run log for `catapult-opt report`, or None.
        outputs: with criterion=None, picks the scalar loss from what the model returns.
        grad_scaler: the torch.amp.GradScaler that scales the loss, if one does (or an object with its scale(loss)).
        process_group: the torch.distributed group whose ranks average their gradients. None: found from a model that is
            a DistributedDataParallel or under `fully_shard`; has to be said where a framework wraps the model later.
            The curvature is then that of the mean of all ranks' losses, which is what such a training descends (with
            unequal parts of a batch a mean of means), and all ranks decide alike; rank 0 writes the log. With
            replicated weights a rank without data in a step calls step() all the same.

    Raises:
        ValueError, TypeError: an argument is not usable; says which and why.

    Source: thesis ch. 5 (the optimizer), Def. 3.2.2 (critical rate), Sec. 4.3-4.4 (multiple catapults).

    Example:
        >>> model = nn.Linear(2, 1)
        >>> criterion = nn.MSELoss()
        >>> optimizer = CatapultSGD(model.parameters(), model=model, criterion=criterion)
        >>> criterion(model(torch.eye(2)), torch.zeros(2, 1)).backward()
        >>> optimizer.step()
        >>> round(optimizer.param_groups[0]["effective_lr"], 2)  # 0.4 * eta_crit = 0.4 * 2 / 3
        0.27
    """

    def __init__(
        self,
        params: ParamsT,
        *,
        model: nn.Module | None = None,
        criterion: Any = None,
        lr: float | Tensor = 1.0,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        policy: CatapultPolicy | None = None,
        every: int | None = None,
        overhead: float | None = None,
        engine: str = "auto",
        log: str | os.PathLike[str] | None = None,
        outputs: Callable[[Any], Any] | None = None,
        grad_scaler: LossScaler | None = None,
        process_group: Any = None,
    ) -> None:
        if fused:
            raise ValueError(
                f"fused={fused!r} is not supported: torch's fused kernel takes skipped steps into its own hands; "
                "leave it out (foreach=True is the fast path)"
            )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
        }
        _check_settings(defaults)
        if model is not None and (maximize or differentiable):
            name = "maximize" if maximize else "differentiable"
            raise ValueError(f"{name}=True does not go with a model: minimise the negated loss, or pass model=None")
        super().__init__(params, defaults)
        self._session: Session | None = None
        self._machine: Catapulter | None = None
        self._written = ""
        if model is not None:
            self.attach(
                model=model,
                criterion=criterion,
                policy=policy,
                every=every,
                overhead=overhead,
                engine=engine,
                log=log,
                outputs=outputs,
                grad_scaler=grad_scaler,
                process_group=process_group,
            )
        else:
            given = {"criterion": criterion, "policy": policy, "every": every, "overhead": overhead, "log": log}
            given |= {"process_group": process_group}
            given |= {"outputs": outputs, "grad_scaler": grad_scaler, "engine": None if engine == "auto" else engine}
            for name, value in given.items():
                if value is not None:
                    raise ValueError(f"{name}={value!r} needs a model: pass model=, or leave it out")

    def __repr__(self) -> str:
        """As torch's, without the controller's state, which is long and for checkpoints only."""
        lines = super().__repr__().splitlines()
        return "\n".join(line for line in lines if not line.lstrip().startswith((_STATE, _BUFFERS)))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; its settings are checked as those of the constructor."""
        if isinstance(param_group, dict):
            _check_settings({**self.defaults, **param_group})
        session = self.__dict__.get("_session")  # not there yet while the constructor adds the first groups
        before = len(self.param_groups)
        super().add_param_group(param_group)
        if session is None:
            return
        try:
            check_model(session.model, self.param_groups[-1]["params"])
        except ValueError:
            del self.param_groups[before:]
            raise
        self.param_groups[-1] |= {"effective_lr": 0.0, **{k: self.param_groups[0][k] for k in (_STATE, _BUFFERS)}}

    def attach(
        self,
        *,
        model: nn.Module,
        criterion: Any,
        policy: CatapultPolicy | None = None,
        every: int | None = None,
        overhead: float | None = None,
        engine: str = "auto",
        log: str | os.PathLike[str] | None = None,
        outputs: Callable[[Any], Any] | None = None,
        grad_scaler: LossScaler | None = None,
        process_group: Any = None,
    ) -> None:
        """(Re)connect to model and criterion: after a deep copy or unpickling, which keep the state but no hooks."""
        if policy is not None and not isinstance(policy, CatapultPolicy):
            raise TypeError(f"policy must be a CatapultPolicy, got {policy!r}")
        policy = policy or CatapultPolicy()
        settings: dict[str, Any] = {"every": every, "overhead": overhead, "policy": dataclasses.asdict(policy)}
        settings |= {k: float(v) if isinstance(v, Tensor) else v for k, v in self.defaults.items()}
        session = Session(
            type(self).__name__,
            self,
            model,
            criterion,
            outputs=outputs,
            every=every,
            overhead=overhead,
            engine=engine,
            log=log,
            settings=settings,
            grad_scaler=grad_scaler,
            copies=2,  # warm start and snapshot
            process_group=process_group,
            share=policy.measure_share,
        )
        self.detach()
        self._session, self._machine, self._written = session, Catapulter(policy), ""
        self._complete_groups()

    def detach(self) -> None:
        """Remove the hooks from model and criterion and close the log. `step()` then needs a new `attach`."""
        if self._session is not None:
            self._store()
            self._session.detach()
        self._session = self._machine = None

    @property
    def criterion(self) -> nn.Module | None:
        """The criterion whose calls are observed: a plain function given as criterion must be called through this."""
        return None if self._session is None else self._session.criterion

    @property
    def last(self) -> CriticalLR | None:
        """The last measurement: of that step's batch, at the weights before its update."""
        return None if self._session is None else self._session.last

    @property
    def super_critical_steps(self) -> int:
        """Measured steps with eta - eta_crit > 1e-8: the thesis' count of catapults in SGD."""
        return 0 if self._session is None else self._session.counter.super_critical_steps

    @property
    def catapults(self) -> int:
        """Episodes completed: rise from a super-critical start, peak, return with a lower lambda_max."""
        return 0 if self._session is None else self._session.counter.catapults

    @property
    def phase(self) -> str | None:
        """What the policy does: "fit", "arm", "hot", "cool", "settle" or "follow" ("start" before the first step)."""
        return None if self._machine is None else self._machine.phase

    def log_metrics(self, **values: float) -> None:
        """Log metrics at the present step, e.g. val_loss=0.3; names that start with `val` rank runs in the report."""
        if self._session is not None:
            self._session.log_metrics(values)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Absent after unpickling and deep copies (the state of an Optimizer is its groups), kept by load_state_dict.
        self.__dict__.setdefault("_session", None)
        self.__dict__.setdefault("_machine", None)
        self.__dict__.setdefault("_written", "")
        for group in self.param_groups:  # of a state dict of an older torch.optim.SGD
            group.setdefault("nesterov", False)
            group.setdefault("maximize", False)
            group.setdefault("foreach", None)
            group.setdefault("differentiable", False)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: as the state dict, with the controller's state of this very step."""
        self._store()
        state: dict[str, Any] = super().__getstate__()
        return state

    def state_dict(self) -> dict[str, Any]:
        """torch's own, with the controller's state of this very step."""
        self._store()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict: the run then goes on as it would have gone where it was taken, to the bit.

        Raises:
            ValueError: with a model, for the state dict of another optimizer, whose lr is a rate and not a multiplier.
        """
        if self._session is not None:
            _check_own(state_dict)
        super().load_state_dict(state_dict)
        if self._session is not None:
            self._complete_groups()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients; batches whose gradients are thrown away no longer belong to the step."""
        super().zero_grad(set_to_none)
        if self._session is not None:
            self._session.capture.drop_finished()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update at the controller's rate.

        Args:
            closure: evaluated once, with gradients enabled; its value is returned.

        Raises:
            RuntimeError: nothing was captured since the last step, or a gradient is sparse; nothing was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            self._step()
        return loss

    def _step(self) -> None:
        self._refuse_sparse()
        if self._session is None:
            self._refuse_unattached()
            self._update(None)
        elif self._session.initialising():
            self._prepare_state()
            self._update(0.0)
        else:
            self._load()
            decision = self._decide()
            if decision.restore:
                self._restore()
            else:
                self._update(decision.rate, brake=decision.brake)

    def _decide(self) -> Decision:
        """Observe the step, ask the policy on measured ones, and log."""
        session, machine = self._session, self._machine
        assert session is not None and machine is not None
        update = next_update(self, scale=session.capture.armed)
        seen = session.observe(self._start(), update, need_loss=machine.phase != "settle")
        self._prepare_state()
        decision = session.decide(machine, seen)
        if seen.vector is not None:
            for p, v in zip(session.params, seen.vector, strict=True):
                local(self.state[p][_VECTOR]).copy_(v)
        if decision.take_snapshot:
            for p in session.params:
                self.state[p][_SNAPSHOT].copy_(p)
            buffers = _packed(session.buffers())
            for group in self.param_groups:
                group[_BUFFERS] = buffers
        averages = None
        if seen.smoothing > 1:
            averages = {"eta_crit_mean": machine.eta_crit, "log_lambda_sd": machine.spread}
        session.record(seen, update.rate * decision.rate, decision, averages)
        self._written = ""
        for group in self.param_groups:
            group[_STATE] = ""
        return decision

    def _start(self) -> Vector | None:
        """The warm start, on a measured step."""
        assert self._session is not None
        if not self._session.capture.armed:
            return None
        kept = [self.state.get(p, {}).get(_VECTOR) for p in self._session.params]
        return [
            torch.zeros_like(local(p)) if v is None else local(v)
            for p, v in zip(self._session.params, kept, strict=True)
        ]

    def _update(self, rate: float | None, brake: bool = False) -> None:
        """torch's own SGD update at lr * rate (None: at lr)."""
        for group in self.param_groups:
            params: list[Tensor] = [p for p in group["params"] if p.grad is not None]
            lr = group["lr"]
            if rate is not None:
                lr = group["effective_lr"] = float(lr) * rate
                if brake:
                    self._stop(params)
            self._move(group, params, lr)

    def _move(self, group: dict[str, Any], params: list[Tensor], lr: float | Tensor) -> None:
        momentum = group["momentum"]
        buffers = [self.state[p].get("momentum_buffer") if momentum else None for p in params]
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
                self.state[p]["momentum_buffer"] = buffer

    def _stop(self, params: list[Tensor]) -> None:
        """Momentum to zero."""
        for p in params:
            if self.state[p].get("momentum_buffer") is not None:
                self.state[p]["momentum_buffer"].zero_()

    def _restore(self) -> None:
        """Back to the snapshot, at rest."""
        assert self._session is not None
        for p in self._session.params:
            p.copy_(self.state[p][_SNAPSHOT])
        self._session.restore_buffers(_unpacked(self.param_groups[0][_BUFFERS]))
        self._stop(self._session.params)

    def _prepare_state(self) -> None:
        """Per-parameter tensors of the controller, all there from the first step: they shard with the parameter."""
        assert self._session is not None
        for p in self._session.params:
            state = self.state[p]
            if _VECTOR not in state:
                state[_VECTOR] = torch.zeros_like(p)
                state[_SNAPSHOT] = p.detach().clone()

    def _complete_groups(self) -> None:
        """What a controlled optimizer's groups hold; take over the state they bring along, if any."""
        self._load()
        for group in self.param_groups:
            group.setdefault("effective_lr", 0.0)
            group.setdefault(_BUFFERS, "")
            group.setdefault(_STATE, "")

    def _store(self) -> None:
        """Into the groups; what a copy without a model has there stays."""
        if self._session is None or self._machine is None:
            return
        self._session.catch_up()
        state = {"session": self._session.state_dict(), "machine": self._machine.state_dict()}
        self._written = json.dumps(state)
        for group in self.param_groups:
            group[_STATE] = self._written

    def _load(self) -> None:
        """Take over a state that was loaded since the last step, by whatever way it came into the groups."""
        text = self.param_groups[0].get(_STATE) or ""
        if text and text != self._written:
            assert self._session is not None and self._machine is not None
            state = json.loads(text)
            self._session.load_state_dict(state["session"])
            self._machine.load_state_dict(state["machine"])
            self._written = text

    def _refuse_sparse(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.grad.is_sparse:
                    raise RuntimeError(
                        f"CatapultSGD does not support sparse gradients (parameter of shape {tuple(p.shape)}): "
                        "use sparse=False in the embedding"
                    )

    def _refuse_unattached(self) -> None:
        if any(_STATE in group for group in self.param_groups):
            raise RuntimeError(
                "this CatapultSGD was copied, unpickled or detached and has no model to measure: call "
                "optimizer.attach(model=..., criterion=...) first"
            )


def _packed(tensors: dict[str, Tensor]) -> str:
    """Tensors as text."""
    if not tensors:
        return ""
    file = io.BytesIO()
    torch.save(tensors, file)
    return base64.b64encode(file.getvalue()).decode("ascii")


def _unpacked(text: str) -> dict[str, Tensor]:
    if not text:
        return {}
    tensors: dict[str, Tensor] = torch.load(io.BytesIO(base64.b64decode(text)), map_location="cpu", weights_only=True)
    return tensors


def _check_own(state_dict: dict[str, Any]) -> None:
    """A ValueError for the state dict of an optimizer without a controller."""
    groups = state_dict.get("param_groups")
    if groups is None:
        raise ValueError(
            f"state_dict has no param_groups but {list(state_dict)}: pass what optimizer.state_dict() gave"
        )
    if groups and not any(_STATE in group for group in groups):
        raise ValueError(
            f"state_dict: not of a CatapultSGD with a model; its lr={groups[0].get('lr')!r} is a rate, and here lr "
            "only multiplies the rate that is measured. Load the model's weights alone, and leave the optimizer new"
        )


def _check_settings(settings: dict[str, Any]) -> None:
    """Refuse settings that torch.optim.SGD could not use, by name and value."""
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
