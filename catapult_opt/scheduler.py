"""`CatapultLR`: the catapult controller on top of any torch optimizer whose critical rate is known."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .bases import check_supported, next_update
from .curvature.vectors import Vector
from .distributed import local
from .monitor import Beside, Session, plain_settings
from .optimizer import CatapultSGD
from .policy import Catapulter, CatapultPolicy, Decision
from .scaling import LossScaler

_BASE = "catapult_base_lr"  # what a group's lr is relative to
# Running sums of gradients, brought to rest when a spike is cooled or undone.
_VELOCITIES = ("momentum_buffer", "exp_avg")
_KEPT = {"session", "machine", "vector", "snapshot", "buffers"}  # in a state dict


class CatapultLR(Beside):
    """Drives the rate of a torch optimizer: above the critical one of its own update, so that the loss catapults.

    The optimizer keeps its name, its state and its place in the loop; nothing has to be called. For the time of each
    step its groups' `lr` is replaced by the controller's rate, which stands in `group["effective_lr"]`. The `lr` given
    to the optimizer sets no scale: only the proportions among groups count, and what a scheduler makes of it since.

    Args:
        optimizer: torch's SGD, Adam, AdamW, RMSprop or Adagrad, not fused.
        model: the module whose outputs reach the criterion.
        criterion: the loss module called in the loop; a plain function must be called through `CatapultLR.criterion`;
            None where the model returns the loss.
        policy: a `CatapultPolicy`; None for the default.
        every, overhead, engine, log, outputs, grad_scaler, process_group: see `CatapultSGD`.

    Raises:
        TypeError: an optimizer whose critical rate is not known, or an argument of the wrong type.
        ValueError: an argument is not usable; says which and why.

    Source: thesis ch. 5 (the optimizer); critical rates of the bases: `catapult_opt.bases`.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> criterion = nn.MSELoss()
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> controller = CatapultLR(optimizer, model=model, criterion=criterion)
        >>> criterion(model(torch.eye(2)), torch.zeros(2, 1)).backward()
        >>> optimizer.step()
        >>> round(optimizer.param_groups[0]["effective_lr"], 3)  # 0.4 * eta_crit = 0.4 * 2 (1 - 0.9) / 3
        0.027
    """

    def __init__(
        self,
        optimizer: Optimizer,
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
        check_supported(optimizer)
        if isinstance(optimizer, CatapultSGD):
            raise TypeError(
                "optimizer: CatapultSGD sets a rate of its own: pass torch.optim.SGD, or leave CatapultLR out"
            )
        _check_unfused(optimizer)
        if policy is not None and not isinstance(policy, CatapultPolicy):
            raise TypeError(f"policy must be a CatapultPolicy, got {policy!r}")
        policy = policy or CatapultPolicy()
        bases = [_base(g) for g in optimizer.param_groups]
        if not max(bases) > 0:
            raise ValueError(f"optimizer: lr must be above 0, as rates are relative to it; got {bases}")
        settings: dict[str, Any] = {"every": every, "overhead": overhead, "policy": dataclasses.asdict(policy)}
        settings |= {"optimizer": type(optimizer).__name__, **plain_settings(optimizer.defaults)}
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
            copies=2,
            process_group=process_group,
            share=policy.measure_share,
        )
        self._optimizer, self._machine = optimizer, Catapulter(policy)
        self._vector: dict[Tensor, Tensor] = {}  # warm start and snapshot by parameter: groups may be added
        self._snapshot: dict[Tensor, Tensor] = {}
        self._buffers: dict[str, Tensor] = {}  # BatchNorm statistics and the like, of the snapshot
        self._set_aside: list[tuple[Any, Any]] = []
        _complete_groups(optimizer)
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    @property
    def phase(self) -> str:
        """What the policy does: "fit", "arm", "hot", "cool", "settle" or "follow" ("start" before the first step)."""
        return self._machine.phase

    def detach(self) -> None:
        """Leave the optimizer to itself, at its own lr: remove the hooks, close the log."""
        for handle in self._handles:
            handle.remove()
        self._session.detach()

    def state_dict(self) -> dict[str, Any]:
        """What a run goes on from, beside the optimizer's own state dict: numbers, strings and tensors.

        The tensors are sharded as the parameters are, and there from the start: torch.distributed.checkpoint loads into
        them.
        """
        self._session.catch_up()
        return {
            "session": self._session.state_dict(),
            "machine": self._machine.state_dict(),
            "vector": self._sharded_vector(),
            "snapshot": [self._snapshot.get(p, p).detach().clone() for p in self._session.params],
            "buffers": {name: b.clone() for name, b in self._buffers.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on as the run would have gone where the state was taken."""
        params = self._session.params
        missing = _KEPT - state_dict.keys()
        if missing:
            raise ValueError(f"state_dict has no {sorted(missing)}: pass what CatapultLR.state_dict() gave")
        for name in ("vector", "snapshot"):
            shapes = [x.shape for x in state_dict[name] or []]
            if shapes and shapes != [p.shape for p in params]:
                raise ValueError(
                    f"state_dict: {name} has shapes {[tuple(x) for x in shapes]}, and the parameters "
                    f"{[tuple(p.shape) for p in params]}: is it another model's?"
                )
        self._session.load_state_dict(state_dict["session"])
        self._machine.load_state_dict(state_dict["machine"])
        self._vector = {p: local(x).clone() for p, x in zip(params, state_dict["vector"] or [], strict=False)}
        self._snapshot = {p: x.clone() for p, x in zip(params, state_dict["snapshot"] or [], strict=False)}
        self._buffers = {name: b.clone() for name, b in state_dict["buffers"].items()}

    def _sharded_vector(self) -> Vector:
        """The warm start as parameters are, sharded with them; zeros before there is one."""
        whole = [torch.zeros_like(p, requires_grad=False) for p in self._session.params]
        for x, p in zip(whole, self._session.params, strict=True):
            if p in self._vector:
                local(x).copy_(self._vector[p])
        return whole

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._after_step(optimizer, args, kwargs)  # of a step that failed halfway
        return super()._before_step(optimizer, args, kwargs)

    @torch.no_grad()
    def _observe(self, optimizer: Optimizer) -> None:
        session, machine = self._session, self._machine
        if session.initialising():
            return
        _complete_groups(optimizer)  # some may be new, or loaded from a checkpoint without a controller
        update = next_update(optimizer, scale=session.capture.armed)
        seen = session.observe(session.aligned(self._vector), update, need_loss=machine.phase != "settle")
        unit = max(g[_BASE] for g in optimizer.param_groups)
        factor = update.rate / unit
        decision = session.decide(machine, seen)
        if seen.vector is not None:
            self._vector = dict(zip(session.params, seen.vector, strict=True))
        if decision.take_snapshot:
            self._snapshot = {p: p.detach().clone() for p in session.params}
            self._buffers = {name: b.clone() for name, b in session.buffers().items()}
        session.record(seen, factor * decision.rate, decision)
        self._apply(optimizer, decision, unit)

    def _apply(self, optimizer: Optimizer, decision: Decision, unit: float) -> None:
        """The step's rates in place of lr, or the weights back."""
        if decision.brake or decision.restore:
            _stop(optimizer)
        if decision.restore:
            self._restore(optimizer)
            return
        for group in optimizer.param_groups:
            lr = group["lr"]
            self._set_aside.append((group, lr))
            rate = group["effective_lr"] = float(lr) / unit * decision.rate
            group["lr"] = torch.full_like(lr, rate) if isinstance(lr, Tensor) else rate

    def _restore(self, optimizer: Optimizer) -> None:
        """The snapshot back; without gradients the step then changes nothing."""
        for p, kept in self._snapshot.items():
            p.copy_(kept)
        self._session.restore_buffers(self._buffers)
        for p in (p for g in optimizer.param_groups for p in g["params"] if p.grad is not None):
            self._set_aside.append((p, p.grad))
            p.grad = None

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What the loop left in the groups and the gradients, back in place."""
        for owner, kept in self._set_aside:
            if isinstance(owner, Tensor):
                owner.grad = kept
            else:
                owner["lr"] = kept
        self._set_aside.clear()


def _base(group: dict[str, Any]) -> float:
    return float(group.get("initial_lr", group["lr"]))


def _complete_groups(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        group.setdefault(_BASE, _base(group))
        group.setdefault("effective_lr", 0.0)


def _stop(optimizer: Optimizer) -> None:
    for state in optimizer.state.values():
        for name in _VELOCITIES:
            if isinstance(state.get(name), Tensor):
                state[name].zero_()


def _check_unfused(optimizer: Optimizer) -> None:
    if any(g.get("fused") or g.get("capturable") for g in optimizer.param_groups):
        raise ValueError(
            f"optimizer: {type(optimizer).__name__} with fused=True or capturable=True reads lr where it cannot "
            "be set: leave both out"
        )
