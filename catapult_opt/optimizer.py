"""`CatapultSGD`: torch.optim.SGD that finds its own learning rate, above the critical one."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from .controlled import ControlledOptimizer
from .grad_scaler import LossScaler
from .options import MeasuringOptions
from .policy import CatapultPolicy
from .sgd_update import bring_to_rest, check_settings, refuse_sparse, sgd_step
from .updates import next_update


class CatapultSGD(ControlledOptimizer):
    """SGD with momentum at a rate of its own: above the critical one, so that the loss catapults and features align.

    A drop-in for `torch.optim.SGD` that needs no learning rate: hooks on `model` and `criterion` see the batches, at
    `step()` the top eigenvalue of their curvature gives the critical rate of this very update, and the policy decides
    how far above or below it to go. The rate applied is stored in `group["effective_lr"]`.

    On an accelerator one number is read from it a step, the loss: a catapult may be under way at any time.

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
        >>> round(optimizer.last.eta_crit, 3)  # 2 / lambda_max
        0.667
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
        check_settings(defaults)
        if model is not None and (maximize or differentiable):
            name = "maximize" if maximize else "differentiable"
            raise ValueError(f"{name}=True does not go with a model: minimise the negated loss, or pass model=None")
        super().__init__(params, defaults)
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

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; its settings are checked as those of the constructor."""
        if isinstance(param_group, dict):
            check_settings({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # of a state dict of an older torch.optim.SGD
            group.setdefault("nesterov", False)
            group.setdefault("maximize", False)
            group.setdefault("foreach", None)
            group.setdefault("differentiable", False)

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
        refuse_sparse(self.param_groups)
        controller = self._controller
        if controller is None:
            self._refuse_unattached()
            self._update(None)
        elif controller.observer.initialising():
            controller.memory.prepare(controller.observer.params)
            self._update(0.0)
        else:
            decision = controller.step(next_update(self, scale=controller.observer.measures_next))
            if decision.restore or decision.brake:
                bring_to_rest(self.state.values())
            if decision.restore:
                controller.restore()
            else:
                self._update(decision.rate)

    def _update(self, rate: float | None) -> None:
        """torch's own SGD update at lr * rate (None: at lr)."""
        for group in self.param_groups:
            lr = group["lr"]
            if rate is not None:
                lr = group["effective_lr"] = float(lr) * rate
            sgd_step(group, self.state, lr)
