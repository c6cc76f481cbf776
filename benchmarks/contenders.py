"""The optimizers of the generalization benchmark, and the controls that tell what of a catapult it is that pays.

A contender is an entry of `CONTENDERS`. The controls are built on the package's public interface: the controller (or
the monitor) sets or reads what it always does, and a hook registered after its own has the last word on the rate.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import inspect
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from catapult_opt import CatapultLR, CatapultMonitor, CatapultPolicy, CatapultSGD, policy

Batch = tuple[Tensor, Tensor]
BASELINES = ("sgd", "adamw", "untuned")  # the kinds of contenders that do not depend on this package
BELOW = 0.95  # the cap of the control that may not go above the critical rate, in critical rates


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
        return self.optimizer if isinstance(self.optimizer, CatapultSGD) else None

    @contextlib.contextmanager
    def evaluated(self, view: str) -> Iterator[nn.Module]:
        if self._averager is None:
            yield self.model
        else:
            averaged = self._averager.averaged_model
            with own_statistics(averaged, self._sample):
                yield averaged


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
    """A context in which the controller's averaged weights and buffers are in place."""
    return getattr(controller, "averaged", contextlib.nullcontext)()


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
    """AdamW whose rate follows a parabola fitted to three losses of another batch, as the README of gen-optim has it."""

    def __init__(self, setup: Setup, *, every: int) -> None:
        super().__init__(setup.model, AdamW(setup.model.parameters(), lr=1e-4))
        self._setup, self._every, self._steps = setup, every, 0

    def step(self, loss: float, x: Tensor, y: Tensor) -> None:
        from GeN import lr_parabola

        self._steps += 1
        if self._steps % self._every == 0:
            lr_parabola(
                self.model, self.optimizer, self._setup.criterion, tr_iter=self._setup.batches, device="cpu",
                task="image_cls",
            )  # fmt: skip
        super().step(loss, x, y)


class Controlled(Driver):
    """Plain SGD whose rate of the coming step is set by a rule, on top of an observer that measures every step.

    Args:
        setup: for what.
        observe: makes the observer; its hook on the optimizer runs first.
        rule: (rate so far, critical rate of this very step, loss) -> rate of this step.
    """

    def __init__(
        self,
        setup: Setup,
        observe: Callable[[SGD], CatapultMonitor | CatapultLR],
        rule: Callable[[float, float, float], float],
    ) -> None:
        super().__init__(setup.model, SGD(setup.model.parameters(), lr=1.0))
        self._observer, self._rule = observe(self.optimizer), rule
        self._rate, self._loss = 0.0, math.nan
        self.optimizer.register_step_pre_hook(self._have_the_last_word)

    def step(self, loss: float, x: Tensor, y: Tensor) -> None:
        self._loss = loss
        super().step(loss, x, y)

    @property
    def rate(self) -> float:
        return self._rate

    @property
    def observer(self) -> CatapultMonitor | CatapultLR:
        return self._observer

    def _have_the_last_word(self, optimizer: Optimizer, *_: Any) -> None:
        found = self._observer.last
        assert found is not None
        (group,) = optimizer.param_groups
        # Without any curvature the critical rate is infinite, and no rule for a rate.
        if math.isfinite(found.eta_crit):
            self._rate = self._rule(group["lr"], found.eta_crit, self._loss)
        group["lr"] = self._rate


Build = Callable[[Setup], Driver]


@dataclass(frozen=True)
class Contender:
    """An optimizer in the comparison."""

    name: str
    label: str
    build: Build
    settings: dict[str, Any]  # all that makes a run of it another one, for the key under which it is kept
    kind: str  # "sgd" or "adamw" (tuned), "untuned", "catapult", or "control"
    start: Callable[[bool, float], float] | None = None  # (NTK net?, critical rate at the start) -> where a grid begins
    after: str | None = None  # another contender, at whose best rate the grid begins
    follows: Callable[[dict[str, Any]], Any] | None = None  # record of CatapultSGD's run -> what the control is given
    package: str | None = None  # of the extra bench

    @property
    def tuned(self) -> bool:
        return self.start is not None or self.after is not None

    def missing(self) -> str | None:
        """What to do if the package is not installed."""
        if self.package is None or importlib.util.find_spec(self.package):
            return None
        return f"{self.label} is left out: {self.package} is missing (pip install --no-deps -r constraints-bench.txt)"


def _sgd(setup: Setup, *, momentum: float = 0.0, cosine: bool = False, averaged: bool = False) -> Driver:
    optimizer = SGD(setup.model.parameters(), lr=setup.lr, momentum=momentum)
    scheduler = CosineAnnealingLR(optimizer, setup.steps) if cosine else None
    return Driver(setup.model, optimizer, scheduler, Averaged(setup.model) if averaged else None, setup.sample)


def _adamw(setup: Setup, *, cosine: bool = False) -> Driver:
    optimizer = AdamW(setup.model.parameters(), lr=setup.lr)
    return Driver(setup.model, optimizer, CosineAnnealingLR(optimizer, setup.steps) if cosine else None)


def _adamw_as_it_comes(setup: Setup) -> Driver:
    return Driver(setup.model, AdamW(setup.model.parameters()))


def _sgd_as_people_type_it(setup: Setup) -> Driver:
    optimizer = SGD(setup.model.parameters(), lr=0.01, momentum=0.9)
    return Driver(setup.model, optimizer, CosineAnnealingLR(optimizer, setup.steps))


def _d_adaptation(setup: Setup) -> Driver:
    from dadaptation import DAdaptAdam

    return Driver(setup.model, DAdaptAdam(setup.model.parameters()))


def _prodigy(setup: Setup, *, cosine: bool = False) -> Driver:
    from prodigyopt import Prodigy

    optimizer = Prodigy(setup.model.parameters())
    return Driver(setup.model, optimizer, CosineAnnealingLR(optimizer, setup.steps) if cosine else None)


def _dog(setup: Setup) -> Driver:
    from dog import DoG, PolynomialDecayAverager

    averager = PolynomialDecayAverager(setup.model)
    return Driver(setup.model, DoG(setup.model.parameters()), averager=averager, sample=setup.sample)


def _schedule_free(setup: Setup, *, kind: str) -> Driver:
    import schedulefree

    optimizer = getattr(schedulefree, kind)(setup.model.parameters())
    optimizer.train()
    return ScheduleFree(setup.model, optimizer, sample=setup.sample)


def _catapult(setup: Setup, *, length: bool = False, momentum: float = 0.0, **settings: Any) -> Driver:
    """CatapultSGD; on a task whose base is AdamW its controller on that, which has a momentum already."""
    chosen = setup.catapult_policy(**({"total_steps": setup.steps} if length else {}))
    watched: dict[str, Any] = {"model": setup.model, "criterion": setup.criterion, "policy": chosen, **settings}
    if setup.base == "adamw":
        adamw = AdamW(setup.model.parameters())
        return Catapult(setup, adamw, CatapultLR(adamw, **watched))
    optimizer = CatapultSGD(setup.model.parameters(), momentum=momentum, **watched)
    return Catapult(setup, optimizer, optimizer)


def _capped(setup: Setup) -> Driver:
    """CatapultSGD's controller, whose rate is cut to just below the critical one of every step."""

    def control(optimizer: SGD) -> CatapultLR:
        settings = setup.catapult_policy()
        return CatapultLR(optimizer, model=setup.model, criterion=setup.criterion, policy=settings, every=1)

    return Controlled(setup, control, lambda decided, eta_crit, _: min(decided, BELOW * eta_crit))


def _watched(setup: Setup) -> Callable[[SGD], CatapultMonitor]:
    return lambda optimizer: CatapultMonitor(optimizer, model=setup.model, criterion=setup.criterion)


def _mean_rate(setup: Setup) -> Driver:
    """The mean of the rates that CatapultSGD applied, all the way."""
    return Driver(setup.model, SGD(setup.model.parameters(), lr=setup.given))


def _tracking(setup: Setup) -> Driver:
    """A fixed multiple of the critical rate of every step (as CDAT does, Roulet et al. 2024), the multiple tuned."""
    assert setup.lr is not None
    return Controlled(setup, _watched(setup), lambda _, eta_crit, loss: setup.lr * eta_crit)  # type: ignore[operator]


class RandomSpikes:
    """As many raised rates as CatapultSGD had, each as long, at random times; in between as when it cools.

    In a spike the rate is held at kappa * eta_crit of its first step (and at most that of the present one), and it
    ends early above the policy's ceiling, as CatapultSGD's do. What is missing is its timing: that waits for the loss
    to be back, and cools once the spike has paid.
    """

    def __init__(self, lengths: list[int], steps: int, settings: CatapultPolicy, seed: int) -> None:
        self._policy = settings
        self.raised = place(lengths, steps, random.Random(seed))
        self._step, self._held, self._first = 0, math.inf, math.nan

    def __call__(self, _: float, eta_crit: float, loss: float) -> float:
        p = self._policy
        if self._step == 0:
            self._first = loss
        spike = self.raised[self._step]
        begins = spike is not None and (self._step == 0 or self.raised[self._step - 1] != spike)
        self._step += 1
        if begins:
            self._held = p.kappa * eta_crit
        if loss > p.ceiling * self._first:
            self._held = 0.0
        if spike is None or not self._held:
            return p.cool * eta_crit
        return min(self._held, p.kappa * eta_crit)


def place(lengths: list[int], steps: int, rng: random.Random) -> list[int | None]:
    """For every step the number of the spike it lies in, or None: the spikes in random order, with random gaps."""
    order = rng.sample(range(len(lengths)), len(lengths))
    free = steps - sum(lengths)
    cuts = sorted(rng.randint(0, free) for _ in order)
    gaps = [b - a for a, b in zip([0, *cuts], [*cuts, free], strict=True)]
    out: list[int | None] = []
    for gap, spike in zip(gaps, order, strict=False):
        out += [None] * gap + [spike] * lengths[spike]
    return out + [None] * gaps[-1]


def _random_spikes(setup: Setup) -> Driver:
    rule = RandomSpikes(setup.given, setup.steps, setup.catapult_policy(), setup.seed)
    return Controlled(setup, _watched(setup), rule)


@functools.cache
def _controller() -> dict[str, Any]:
    """The default settings of CatapultSGD and the code that decides: a run under others is not one of ours any more."""
    digest = hashlib.sha256(code_of(inspect.getsource(policy)).encode()).hexdigest()[:12]
    return {"policy": dataclasses.asdict(CatapultPolicy()), "code": digest}


def code_of(source: str) -> str:
    """What is left without comments, docstrings and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


def _baseline(name: str, label: str, kind: str, build: Callable[..., Driver], **extra: Any) -> Contender:
    settings = extra.pop("settings", {})
    return Contender(name, label, functools.partial(build, **settings), settings, kind, **extra)


def _own(name: str, label: str, kind: str, build: Callable[..., Driver], **extra: Any) -> Contender:
    contender = _baseline(name, label, kind, build, **extra)
    return dataclasses.replace(contender, settings={**contender.settings, **_controller()})


def _half_critical(_: bool, eta_crit: float) -> float:
    return eta_crit / 2


def _momentum_start(_: bool, eta_crit: float) -> float:
    return eta_crit / 8


def _adam_start(ntk: bool, _: float) -> float:
    # Weights of size 1 want other steps than those of size 1 / sqrt(width).
    return 0.125 if ntk else 0.004


CONTENDERS: dict[str, Contender] = {
    c.name: c
    for c in (
        _baseline("sgd", "SGD", "sgd", _sgd, start=_half_critical),
        _baseline("sgd-cosine", "SGD, cosine", "sgd", _sgd, settings={"cosine": True}, after="sgd"),
        _baseline("sgd-averaged", "SGD, averaged", "sgd", _sgd, settings={"averaged": True}, after="sgd"),
        _baseline("momentum", "SGD .9", "sgd", _sgd, settings={"momentum": 0.9}, start=_momentum_start),
        _baseline(
            "momentum-cosine", "SGD .9, cosine", "sgd", _sgd,
            settings={"momentum": 0.9, "cosine": True}, after="momentum",
        ),
        _baseline("adamw", "AdamW", "adamw", _adamw, start=_adam_start),
        _baseline("adamw-cosine", "AdamW, cosine", "adamw", _adamw, settings={"cosine": True}, after="adamw"),
        _baseline("adamw-1e-3", "AdamW at .001", "untuned", _adamw_as_it_comes),
        _baseline("sgd-1e-2", "SGD .9 at .01, cosine", "untuned", _sgd_as_people_type_it),
        _baseline("cdat", "CDAT", "untuned", CDAT, settings={"sigma": 2.0}),
        _baseline("d-adaptation", "D-Adaptation (Adam)", "untuned", _d_adaptation, package="dadaptation"),
        _baseline("gen", "GeN (AdamW)", "untuned", GeN, settings={"every": 4}, package="GeN"),  # its README's lower bound
        _baseline("prodigy", "Prodigy", "untuned", _prodigy, package="prodigyopt"),
        _baseline(
            "prodigy-cosine", "Prodigy, cosine", "untuned", _prodigy, settings={"cosine": True}, package="prodigyopt"
        ),
        _baseline("dog", "DoG, averaged", "untuned", _dog, package="dog"),
        _baseline(
            "schedule-free", "Schedule-Free AdamW", "untuned", _schedule_free,
            settings={"kind": "AdamWScheduleFree"}, package="schedulefree",
        ),
        _baseline(
            "schedule-free-sgd", "Schedule-Free SGD", "untuned", _schedule_free,
            settings={"kind": "SGDScheduleFree"}, package="schedulefree",
        ),
        _own("catapult", "CatapultSGD", "catapult", _catapult),
        _own("catapult-T", "CatapultSGD, total_steps", "catapult", _catapult, settings={"length": True}),
        _own("catapult-m", "CatapultSGD .9", "catapult", _catapult, settings={"momentum": 0.9}),
        _own(
            "catapult-m-T", "CatapultSGD .9, total_steps", "catapult", _catapult,
            settings={"momentum": 0.9, "length": True},
        ),
        _own("catapult-5", "CatapultSGD, 5 % overhead", "catapult", _catapult, settings={"overhead": 0.05}),
        _own("capped", f"controller capped at {BELOW:g} eta_crit", "control", _capped),
        _own("mean-rate", "constant, CatapultSGD's mean rate", "control", _mean_rate, follows=lambda r: r["mean_rate"]),
        _own(
            "random-spikes", "spikes at random times", "control", _random_spikes, follows=lambda r: r["raised"]
        ),
        _own("tracking", "kappa eta_crit tracked, tuned", "control", _tracking, start=lambda *_: 1.0),
    )
}  # fmt: skip
