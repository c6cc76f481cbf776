"""`CatapultLR`: the catapult controller on top of any torch optimizer whose critical rate is known."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .controller import Controller
from .grad_scaler import LossScaler
from .memory import AVERAGE, VECTOR, check_entries
from .optimizer import CatapultSGD
from .options import MeasuringOptions
from .parameters import parameter_names
from .policy import CatapultPolicy, Decision
from .sgd_update import bring_to_rest
from .step_hook import StepHook, plain_settings
from .updates import check_supported, next_update

_BASE = "catapult_base_lr"  # what a group's lr is relative to
# Where a state of 0.1.0 has them: tensors of the trainable parameters, in their order.
_LISTS = {"vector": VECTOR, "average": AVERAGE, "snapshot": AVERAGE}


class CatapultLR(StepHook):
    """Drives the rate of a torch optimizer: above the critical one of its own update, so that the loss catapults.

    The optimizer keeps its name, its state and its place in the loop; nothing has to be called. For the time of each
    step its groups' `lr` is replaced by the controller's rate, which is in `group["effective_lr"]`. The `lr` given
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

    Source: thesis ch. 5 (the optimizer); critical rates of the bases: `catapult_opt.updates`.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> criterion = nn.MSELoss()
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> controller = CatapultLR(optimizer, model=model, criterion=criterion)
        >>> criterion(model(torch.eye(2)), torch.zeros(2, 1)).backward()
        >>> optimizer.step()
        >>> round(controller.last.eta_crit, 2)  # 2 (1 + momentum) / lambda_max
        1.27
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
        bases = [_base(g) for g in optimizer.param_groups]
        if not max(bases) > 0:
            raise ValueError(f"optimizer: lr must be above 0, as rates are relative to it; got {bases}")
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
        self._state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)  # by parameter: groups may be added
        self._controller = Controller(
            type(self).__name__,
            optimizer,
            model,
            criterion,
            policy=policy,
            options=options,
            state=self._state,
            settings={"optimizer": type(optimizer).__name__, **plain_settings(optimizer.defaults)},
        )
        self._observer, self._recorder = self._controller.observer, self._controller.recorder
        self._set_aside: list[tuple[Any, Any]] = []
        _complete_groups(optimizer)
        self._attach(optimizer, optimizer.register_step_post_hook(self._after_step))

    @property
    def phase(self) -> str:
        """What the policy does, see `policy`."""
        return self._controller.phase

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Evaluate the averaged weights: they and their buffers are in the model inside, and back to the bit after it.

        The average runs over calm steps only, so that it never lies in a catapult. Inside, the optimizer's `step()` is
        refused.
        """
        with self._controller.averaged():
            yield

    def use_averaged(self) -> None:
        """Put the averaged weights and buffers into the model for good, at the end of a training."""
        self._controller.restore()

    def state_dict(self) -> dict[str, Any]:
        """What a run goes on from, beside the optimizer's own state dict: plain values and tensors.

        The tensors are sharded as the parameters are, and there from the start: torch.distributed.checkpoint loads into
        them.
        """
        params = self._observer.params
        self._controller.memory.prepare(params)
        return {
            **self._controller.state_dict(params),
            "vector": [self._state[p][VECTOR].clone() for p in params],
            "average": [self._state[p][AVERAGE].clone() for p in params],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on as the run would have gone where the state was taken.

        Parameters are told apart by their names in the model, where the state holds them, and by their order where not.

        Raises:
            ValueError: a state that is damaged, or another model's; names the field. The state before stays as it was.
        """
        if not isinstance(state_dict, dict):
            raise ValueError(f"state_dict must be what CatapultLR.state_dict() gave, got {type(state_dict).__name__}")
        state = self._controller.parse(state_dict)
        params = self._observer.params
        names = parameter_names(self._observer.model, params)
        saved = state_dict.get("parameters")
        order = saved if isinstance(saved, list) and any(name in saved for name in names) else names
        entries: list[dict[str, Any]] = [{} for _ in params]
        for name, key in _LISTS.items():
            tensors = state_dict.get(name) or []
            at = dict(zip(order, tensors, strict=False))
            if tensors and len(tensors) != len(order):
                raise ValueError(
                    f"state_dict: {name} has {len(tensors)} tensors for {len(order)} parameters: is it another model's?"
                )
            for entry, own in zip(entries, names, strict=True):
                entry |= {key: at[own]} if own in at else {}
        checked = [check_entries(e, p, name) for e, p, name in zip(entries, params, names, strict=True)]
        self._controller.take(state)
        for p, entry in zip(params, checked, strict=True):
            self._state[p] = {key: x.detach().clone().to(p) for key, x in entry.items()}

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._after_step(optimizer, args, kwargs)  # of a step that failed halfway
        return super()._before_step(optimizer, args, kwargs)

    @torch.no_grad()
    def _observe(self, optimizer: Optimizer) -> None:
        controller = self._controller
        if controller.observer.initialising():
            return
        _complete_groups(optimizer)  # some may be new, or loaded from a checkpoint without a controller
        unit = max(g[_BASE] for g in optimizer.param_groups)
        update = next_update(optimizer, scale=controller.observer.measures_next)
        self._apply(optimizer, controller.step(update, unit), unit)

    def _apply(self, optimizer: Optimizer, decision: Decision, unit: float) -> None:
        """The step's rates in place of lr, or the weights back."""
        if decision.brake or decision.restore:
            bring_to_rest(optimizer.state.values())
        if decision.restore:
            self._restore(optimizer)
            return
        for group in optimizer.param_groups:
            lr = group["lr"]
            self._set_aside.append((group, lr))
            rate = group["effective_lr"] = float(lr) / unit * decision.rate
            group["lr"] = torch.full_like(lr, rate) if isinstance(lr, Tensor) else rate

    def _restore(self, optimizer: Optimizer) -> None:
        """The average back; without gradients the step then changes nothing."""
        self._controller.restore()
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


def _check_unfused(optimizer: Optimizer) -> None:
    if any(g.get("fused") or g.get("capturable") for g in optimizer.param_groups):
        raise ValueError(
            f"optimizer: {type(optimizer).__name__} with fused=True or capturable=True reads lr where it cannot "
            "be set: leave both out"
        )
