"""Optimizers in the training loop of the generalization benchmark: what is stepped, and which weights are evaluated."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from catapult_opt import CatapultLR, CatapultPolicy, CatapultSGD

Batch = tuple[Tensor, Tensor]


@dataclass
class Setup:
    """What a contender is built for."""

    model: nn.Module
    criterion: nn.Module
    steps: int
    seed: int = 0
    lr: float | None = None  # of a tuned contender
    given: Any = None  # what a control takes over from the run of CatapultSGD with the same seed
    policy: dict[str, Any] = field(default_factory=dict)  # changes to the default policy
    base: str = "sgd"  # the optimizer underneath, for those that drive one: "sgd" or "adamw"
    batches: Iterator[Batch] | None = None  # others than the training's own, endless
    sample: Sequence[Tensor] = ()  # inputs to take BatchNorm's statistics from

    def catapult_policy(self, **settings: Any) -> CatapultPolicy:
        return CatapultPolicy(**{**settings, **self.policy})


class Driver:
    """An optimizer in a training loop: `step` after each backward pass, `evaluated` for the model to look at.

    Args:
        optimizer: stepped.
        scheduler: stepped after it.
        averager: with `step()` and `averaged_model`, which is then what is evaluated.
        sample: inputs that BatchNorm's statistics of averaged weights are taken from.
    """

    views: tuple[str, ...] = ("weights",)  # what can be evaluated; the first is what users are told to

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        scheduler: LRScheduler | None = None,
        averager: Any = None,
        sample: Sequence[Tensor] = (),
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self._scheduler, self._averager, self._sample = scheduler, averager, sample

    def step(self, loss: float, x: Tensor, y: Tensor) -> None:
        self.optimizer.step()
        if self._scheduler is not None:
            self._scheduler.step()
        if self._averager is not None:
            self._averager.step()

    @property
    def rate(self) -> float:
        """Of the last step."""
        group = self.optimizer.param_groups[0]
        return float(group["effective_lr"]) if "effective_lr" in group else float(group["lr"])

    @property
    def observer(self) -> Any:
        """Who counts catapults and measured steps, if anybody."""
        return None

    @contextlib.contextmanager
    def evaluated(self, view: str) -> Iterator[nn.Module]:
        if self._averager is None:
            yield self.model
        else:
            model = self._averager.averaged_model
            with own_statistics(model, self._sample):
                yield model


@contextlib.contextmanager
def own_statistics(model: nn.Module, sample: Sequence[Tensor]) -> Iterator[None]:
    """BatchNorm's running statistics are those of these very weights, not of others passed through; kept as they were.

    Each layer's are the mean over the batches of `sample` (Izmailov et al. 2018, section 3.2).
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        yield
        return
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    momenta, training = [m.momentum for m in norms], model.training
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all batches
    model.train()
    with torch.no_grad():
        for x in sample:
            model(x)
    model.train(training)
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for name, buffer in model.named_buffers():
            buffer.copy_(kept[name])


class Averaged:
    """An exponential moving average of the weights over the last fifty steps or so (torch's own)."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.98))

    def step(self) -> None:
        self._average.update_parameters(self._model)

    @property
    def averaged_model(self) -> nn.Module:
        averaged: nn.Module = self._average.module
        return averaged


class ScheduleFree(Driver):
    """Its weights to be evaluated are other ones than those it trains at."""

    @contextlib.contextmanager
    def evaluated(self, view: str) -> Iterator[nn.Module]:
        self.optimizer.eval()
        with own_statistics(self.model, self._sample):
            yield self.model
        self.optimizer.train()


class Catapult(Driver):
    """CatapultSGD, or its controller on AdamW; evaluated are the averaged weights and, next to them, the raw ones."""

    views = ("averaged", "raw")

    def __init__(self, setup: Setup, optimizer: Optimizer, controller: CatapultSGD | CatapultLR) -> None:
        super().__init__(setup.model, optimizer)
        self._controller = controller

    @property
    def observer(self) -> CatapultSGD | CatapultLR:
        return self._controller

    @contextlib.contextmanager
    def evaluated(self, view: str) -> Iterator[nn.Module]:
        with averaged(self._controller) if view == "averaged" else contextlib.nullcontext():
            yield self.model


def averaged(controller: Any) -> Any:
    """A context in which the controller's averaged weights and buffers are in place of the raw ones."""
    return controller.averaged()


class CDAT(Driver):
    """Gradient descent at the rate sigma * max(-g^T u, 0) / |u^T H u| of every step, with the update u = -g.

    Curvature dynamics aware tuning (Roulet et al. 2024, arXiv 2407.06183), without averages over the steps. H is the
    Hessian of the loss on the step's own batch: on a quadratic the loss falls at sigma < 2, and stays at sigma = 2.
    """

    def __init__(self, setup: Setup, *, sigma: float) -> None:
        super().__init__(setup.model, SGD(setup.model.parameters(), lr=0.0))
        self._criterion, self._sigma = setup.criterion, sigma

    def step(self, loss: float, x: Tensor, y: Tensor) -> None:
        named = dict(self.model.named_parameters())
        gradient = [p.grad for p in named.values()]
        slope = sum(float((g * g).sum()) for g in gradient)
        curvature = abs(self._curvature(named, gradient, x, y))
        self.optimizer.param_groups[0]["lr"] = self._sigma * slope / max(curvature, 1e-30)
        super().step(loss, x, y)

    def _curvature(self, named: dict[str, nn.Parameter], u: list[Tensor], x: Tensor, y: Tensor) -> float:
        """u^T H u, of the model as it trains; BatchNorm's statistics stay what they are."""
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        with sdpa_kernel(SDPBackend.MATH):  # the other kernels have no second derivative
            loss = self._criterion(torch.func.functional_call(self.model, {**named, **buffers}, (x,)), y)
            slopes = torch.autograd.grad(loss, list(named.values()), create_graph=True)
            along = sum((s * a).sum() for s, a in zip(slopes, u, strict=True))
            turned = torch.autograd.grad(along, list(named.values()))
        return sum(float((h * a).sum()) for h, a in zip(turned, u, strict=True))


class GeN(Driver):
    """AdamW whose rate follows a parabola through three losses of another batch, as in the README of gen-optim.

    Args:
        every: steps between two fits; the README asks for 4 at least.
    """

    def __init__(self, setup: Setup, *, every: int) -> None:
        super().__init__(setup.model, AdamW(setup.model.parameters(), lr=1e-4))
        self._setup, self._every, self._steps = setup, every, 0

    def step(self, loss: float, x: Tensor, y: Tensor) -> None:
        from GeN import lr_parabola

        self._steps += 1
        if self._steps % self._every == 0:
            setup = self._setup
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # three points leave no covariance, and scipy says so each time
                lr_parabola(
                    self.model, self.optimizer, setup.criterion, tr_iter=setup.batches, device="cpu", task="image_cls"
                )
        super().step(loss, x, y)
