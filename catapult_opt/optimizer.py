"""`CatapultSGD`: torch.optim.SGD that finds its own learning rate, above the critical one."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT
from torch.optim.sgd import sgd

from .controller import Controller
from .grad_scaler import LossScaler
from .memory import check_entries
from .observer import check_model, params_of
from .options import MeasuringOptions
from .policy import CatapultPolicy
from .state import parse
from .step_hook import Face, attend
from .updates import next_update

# The controller's state but for its tensors, as a JSON string in every group: it survives every kind of checkpoint.
# Written when somebody asks for the optimizer's state.
_STATE = "catapult_state"
# Where 0.1.0 kept the buffers of its snapshot.
_FORMER_BUFFERS = "catapult_buffers"


class CatapultSGD(Face, Optimizer):
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
        self._controller: Controller | None = None
        self._observer, self._recorder = None, None
        options = MeasuringOptions(
            every=every,
            overhead=overhead,
            engine=engine,
            log=log,
            outputs=outputs,
            grad_scaler=grad_scaler,
            process_group=process_group,
        )
        if model is not None:
            self._attach(model, criterion, policy, options)
            return
        for name, value in {"criterion": criterion, "policy": policy, **options.given()}.items():
            if value is not None:
                raise ValueError(f"{name}={value!r} needs a model: pass model=, or leave it out")

    def __repr__(self) -> str:
        """As torch's, without the controller's state, which is long and for checkpoints only."""
        lines = super().__repr__().splitlines()
        return "\n".join(line for line in lines if not line.lstrip().startswith(_STATE))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; its settings are checked as those of the constructor."""
        if isinstance(param_group, dict):
            _check_settings({**self.defaults, **param_group})
        controller = self.__dict__.get("_controller")  # not there yet while the constructor adds the first groups
        before = len(self.param_groups)
        super().add_param_group(param_group)
        if controller is None:
            return
        try:
            check_model(controller.observer.model, self.param_groups[-1]["params"])
        except ValueError:
            del self.param_groups[before:]
            raise
        self._complete_groups()

    def attach(
        self, *, model: nn.Module, criterion: Any, policy: CatapultPolicy | None = None, **measuring: Any
    ) -> None:
        """(Re)connect to model and criterion: after a deep copy or unpickling, which keep the state but no hooks.

        Args:
            model, criterion, policy: as for the constructor.
            measuring: every, overhead, engine, log, outputs, grad_scaler, process_group, as for the constructor.

        Raises:
            ValueError, TypeError: an argument is not usable; says which and why. Nothing was changed.
        """
        self._attach(model, criterion, policy, MeasuringOptions(**measuring))

    def _attach(
        self, model: nn.Module, criterion: Any, policy: CatapultPolicy | None, options: MeasuringOptions
    ) -> None:
        settings = {k: float(v) if isinstance(v, Tensor) else v for k, v in self.defaults.items()}
        controller = Controller(
            type(self).__name__,
            self,
            model,
            criterion,
            policy=policy,
            options=options,
            state=self.state,
            settings=settings,
        )
        self._store()
        try:
            text = self.param_groups[0].get(_STATE)  # also of the optimizer that this one is a copy of
            state = controller.parse(parse(text)) if text else None
        except ValueError:
            controller.close()
            raise
        self.detach()
        self._controller, self._observer, self._recorder = controller, controller.observer, controller.recorder
        attend(self)
        self._complete_groups()
        if state is not None:
            controller.take(state)

    def detach(self) -> None:
        """Remove the hooks from model and criterion and close the log. `step()` then needs a new `attach`.

        What was counted can still be read.
        """
        if self._controller is not None:
            self._store()
            self._controller.close()
            attend(self, False)
        self._controller = None

    @property
    def phase(self) -> str | None:
        """What the policy does, see `policy`; None without a model."""
        return None if self._controller is None else self._controller.phase

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Evaluate the averaged weights: they and their buffers are in the model inside, and back to the bit after it.

        The average runs over calm steps only, so that it never lies in a catapult. Inside, `step()` is refused.

        Raises:
            RuntimeError: there is no model.

        Example:
            >>> model = nn.Linear(2, 1)
            >>> optimizer = CatapultSGD(model.parameters(), model=model, criterion=nn.MSELoss())
            >>> with optimizer.averaged():
            ...     outputs = model(torch.eye(2))
        """
        with self._attached().averaged():
            yield

    def use_averaged(self) -> None:
        """Put the averaged weights and buffers into the model for good, at the end of a training.

        Raises:
            RuntimeError: there is no model.
        """
        self._attached().restore()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Absent after unpickling and deep copies (the state of an Optimizer is its groups), kept by load_state_dict.
        for name in ("_controller", "_observer", "_recorder"):
            self.__dict__.setdefault(name, None)
        if self._controller is not None:  # load_state_dict makes a new mapping
            self._controller.memory.keep_in(self.state)
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

        Parameters are told apart by their names in the model where the state holds them: the same ones in another order
        within their groups are put in order.

        Raises:
            ValueError: with a model, for the state dict of another optimizer, whose lr is a rate and not a multiplier,
                or a controller's state that is damaged; names the field. The state before stays as it was.
        """
        controller = self._controller
        if controller is None:
            super().load_state_dict(state_dict)
            return
        _check_own(state_dict)
        text = state_dict["param_groups"][0].get(_STATE)
        document = parse(text) if text else {}
        document.setdefault("buffers", state_dict["param_groups"][0].get(_FORMER_BUFFERS) or {})
        state = controller.parse(document) if text else None
        state_dict = _in_order(
            state_dict, document.get("parameters"), controller.observer.parameter_names(params_of(self))
        )
        state_dict = self._checked(state_dict)
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group.pop(_FORMER_BUFFERS, None)
        self._complete_groups()
        if state is not None:
            controller.take(state)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients; batches whose gradients are thrown away no longer belong to the step."""
        super().zero_grad(set_to_none)
        if self._controller is not None:
            self._controller.observer.drop_finished()

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
        controller = self._controller
        if controller is None:
            self._refuse_unattached()
            self._update(None)
        elif controller.observer.initialising():
            controller.memory.prepare(controller.observer.params)
            self._update(0.0)
        else:
            decision = controller.step(next_update(self, scale=controller.observer.measures_next))
            if decision.restore:
                controller.restore()
                self._stop(controller.observer.params)
            else:
                self._update(decision.rate, brake=decision.brake)

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

    def _attached(self) -> Controller:
        if self._controller is None:
            raise RuntimeError(
                "this CatapultSGD has no model, and so no average of its weights: pass model=, or attach"
            )
        return self._controller

    def _complete_groups(self) -> None:
        """What a controlled optimizer's groups hold beside torch's."""
        for group in self.param_groups:
            group.setdefault("effective_lr", 0.0)
            group.setdefault(_STATE, "")

    def _store(self) -> None:
        """The controller's state into the groups; what a copy without a model has there stays."""
        if self._controller is None:
            return
        text = json.dumps(self._controller.state_dict(params_of(self)))
        for group in self.param_groups:
            group[_STATE] = text

    def _checked(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The state dict with each parameter's entries under their present names; a ValueError if one does not fit."""
        assert self._controller is not None
        names = self._controller.observer.parameter_names(params_of(self))
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        entries = dict(state_dict.get("state", {}))
        for key, p, name in zip(saved, params_of(self), names, strict=False):
            if key in entries:
                entries[key] = check_entries(entries[key], p, name)
        return {**state_dict, "state": entries}

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


def _in_order(state_dict: dict[str, Any], saved: Any, names: list[str]) -> dict[str, Any]:
    """The state dict with the parameters of each group in the order of the present ones, by their names.

    torch goes by the position alone. Where names are not known, or none is to be found again (the model stands inside
    another one now), the position is all there is.

    Raises:
        ValueError: some of the parameters are at other places, and it is not a mere change of order within a group.
    """
    groups = state_dict["param_groups"]
    keys = [key for group in groups for key in group["params"]]
    # torch.distributed.checkpoint puts parameters in order itself, and names them by strings.
    if saved == names or not isinstance(saved, list) or len(saved) != len(keys) or len(names) != len(keys):
        return state_dict
    if any(isinstance(key, str) for key in keys) or not any(name in names for name in saved):
        return state_dict
    ordered, first = [], 0
    for group in groups:
        places = range(first, first + len(group["params"]))
        first = places.stop
        at = {saved[i]: keys[i] for i in places}
        missing = [names[i] for i in places if names[i] not in at]
        if missing:
            raise ValueError(
                f"state_dict: its parameters are in other places than this optimizer's, and {missing[0]!r} is not in "
                "the same group: make the groups as they were when the state was saved"
            )
        ordered.append({**group, "params": [at[names[i]] for i in places]})
    return {**state_dict, "param_groups": ordered}


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
