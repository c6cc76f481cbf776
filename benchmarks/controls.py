"""The controls of the generalization benchmark, which tell what of a catapult it is that pays.

They are built on the package's public interface: the controller (or the monitor) sets or reads what it always does, and
a hook registered after its own has the last word on the rate.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

from drivers import Driver, Setup
from torch import Tensor
from torch.optim import SGD, Optimizer

from catapult_opt import CatapultLR, CatapultMonitor

BELOW = 0.95  # the cap of the control that may not go above the critical rate, in critical rates
_CEILING = 30.0  # first losses, above which a spike at a random time ends


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


def capped(setup: Setup) -> Driver:
    """CatapultSGD's controller, whose rate is cut to just below the critical one of every step."""

    def control(optimizer: SGD) -> CatapultLR:
        settings = setup.catapult_policy()
        return CatapultLR(optimizer, model=setup.model, criterion=setup.criterion, policy=settings, every=1)

    return Controlled(setup, control, lambda decided, eta_crit, _: min(decided, BELOW * eta_crit))


def _watched(setup: Setup) -> Callable[[SGD], CatapultMonitor]:
    return lambda optimizer: CatapultMonitor(optimizer, model=setup.model, criterion=setup.criterion)


def mean_rate(setup: Setup) -> Driver:
    """The mean of the rates that CatapultSGD applied, all the way."""
    return Driver(setup.model, SGD(setup.model.parameters(), lr=setup.given))


def tracking(setup: Setup) -> Driver:
    """A fixed multiple of the critical rate of every step, the multiple tuned."""
    assert setup.lr is not None
    return Controlled(setup, _watched(setup), lambda _, eta_crit, loss: setup.lr * eta_crit)  # type: ignore[operator]


class RandomSpikes:
    """As many times above the critical rate as CatapultSGD, each as long and as high, but at random times.

    In a spike the rate is held at `up` critical rates of its first step (and at most so many of the present step), in
    between it is `down` critical rates. A spike ends early where the loss is above 30 times the first one. What is
    missing is CatapultSGD's timing: that waits for the loss to be back.

    Args:
        above: what `Rates.above` has of CatapultSGD's run.
    """

    def __init__(self, above: dict[str, Any], steps: int, seed: int) -> None:
        self._up, self._down = above["up"], above["down"]
        self.raised = place(above["lengths"], steps, random.Random(seed))
        self._step, self._held, self._first = 0, math.inf, math.nan

    def __call__(self, _: float, eta_crit: float, loss: float) -> float:
        if self._step == 0:
            self._first = loss
        spike = self.raised[self._step]
        begins = spike is not None and (self._step == 0 or self.raised[self._step - 1] != spike)
        self._step += 1
        if begins:
            self._held = self._up * eta_crit
        if loss > _CEILING * self._first:
            self._held = 0.0
        if spike is None or not self._held:
            return self._down * eta_crit
        return min(self._held, self._up * eta_crit)


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


def random_spikes(setup: Setup) -> Driver:
    rule = RandomSpikes(setup.given, setup.steps, setup.seed)
    return Controlled(setup, _watched(setup), rule)
