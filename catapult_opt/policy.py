"""When to go above the edge: the rule of the controller, in plain numbers (no torch).

The edge is the critical rate eta_crit = 2 / lambda_max. Of a squared error, the rate creeps across it from below, waits
while the loss rises (a catapult, which lowers the curvature and so raises the edge), and goes below the edge until the
loss is back where it was. Any other loss is trained just below the edge. The weights of calm steps enter an average,
which never lies in a spike: it is what should be evaluated, and what a blow-up is undone to.

| phase | the rate | the average | left when |
| --- | --- | --- | --- |
| calm | below `near` edges: rises by `climb` a step; above: by `creep` | takes every weight in | the loss rises: spike |
| spike | stays | frozen | back down: calm. `hold` steps over, or too high: back |
| back | below the edge: `below` edges at most | frozen | the loss is back: calm. Out of patience: calm |

Losses are compared with one another only, by their differences: any constant added to the loss, or any positive factor,
changes no decision. "Spread" is the standard deviation of recent calm losses, "level" is a slow mean
of them (the lowest of many noisy losses is low by luck). A loss that is not finite, or far above any spike, is undone in any phase.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from .catapults import Event
from .checks import check_whole_number

# A critical rate is taken to lie within these bounds: 2 / lambda is infinite where there is no curvature at all.
_LOWEST_EDGE, _HIGHEST_EDGE = 1e-30, 1e30
# One measurement moves the edge by this factor at most: a wrong one is corrected by the next ones.
_TRUST = 10.0
# On mini-batches the edge is a mean over about this many measurements, of its logarithm.
_MEMORY = 4
# Level and spread run over this many steps or, on mini-batches, windows. Differences below this part of a loss are rounding.
_LEVEL_STEPS, _LEVEL_WINDOWS, _ROUNDING = 20, 5, 1e-6
# On mini-batches the rate creeps so much slower, and a catapult is ended by this factor on it: noise raises losses, too.
_SLOWER, _CUT = 5.0, 0.5
# After a catapult the rate is this part of the one that began it, or of so many edges if that is less.
_RESUME, _MOST_EDGES = 0.9, 2.0
# A spike that raised the edge by less than this factor was too low: the next may be so much higher, up to this height.
_GAIN, _HIGHER, _HIGHEST = 1.2, 4.0, 1000.0
# Steps (or windows) after which a catapult that does not come back is given up.
_PATIENCE, _PATIENT_WINDOWS = 100, 10
# A loss this many times as far above the level as a spike may go is undone.
_FATAL = 1000.0
# Losses further off their level than so many spreads count as so far off.
_OUTLIER = 3.0
# Without catapults the rate comes down once it is above this part of the edge.
_TOO_NEAR = 1.1
# So few steps after one blow-up the rate is blamed for the next.
_SOON = 3
# A blow-up halves the rate, but not below this part of the edge, which cannot be to blame.
_BLAME, _BLAMELESS = 0.5, 0.05
# What a measurement costs, in training steps; how many may be made ahead; their share of the time where the batch repeats.
_MEASUREMENT, _AHEAD, _SHARE_REPEATED = 5.0, 5.0, 0.15
# The user is told of a rate that has been below this part of the edge for so many steps.
_SAFE = 1
_CUTB = 0.5
_FIRST = 1
_HELD, _HELD_STEPS = 0.1, 500


@dataclass(frozen=True)
class CatapultPolicy:
    """Settings of the controller; the defaults need no tuning. Rates are in units of the edge, eta_crit.

    Raises:
        ValueError: a setting is out of its range.
        TypeError: a setting of an earlier version is given: the message names the one that replaces it.

    Example:
        >>> CatapultPolicy(total_steps=500).near
        0.5
    """

    total_steps: int | None = None  # The length of the training, if it is known.
    measure_share: float = 0.05  # Measuring may take this share of the steps' time on mini-batches.
    catapults: bool | None = None  # The rate may cross the edge; None leaves it to squared errors.
    start: float = 0.05  # The first rate is this part of the edge.
    climb: float = 0.05  # Below `near` edges the rate rises by this part of itself a step.
    near: float = 0.5  # From this part of the edge on, it creeps.
    creep: float = 0.02  # Creeping, it rises by this part of itself a step (a fifth of it on mini-batches).
    reach: float = 0.7  # Without catapults the rate stays at this part of the edge.
    spike: float = 0.5  # A loss so many spreads above its level is a catapult.
    hold: int = 10  # A catapult is held for so many steps at most (a window at least).
    ceiling: float = 20.0  # A first spike may be so many times as high as the loss has fallen since the start.
    below: float = 0.8  # After it the rate is at most this part of the edge, until the loss is back.
    horizon: int = 50  # The average runs over about so many calm steps.
    settle: float = 0.3  # With `total_steps`, the rate falls to nothing over this last part of them.

    def __post_init__(self) -> None:
        for name in ("measure_share", "start", "near", "reach", "below", "settle"):
            _check(name, getattr(self, name), at_most=1.0)
        for name in ("climb", "creep", "spike", "ceiling"):
            _check(name, getattr(self, name))
        for name in ("hold", "horizon", *(() if self.total_steps is None else ("total_steps",))):
            check_whole_number(name, getattr(self, name))
        if self.catapults not in (None, True, False):
            raise ValueError(
                f"catapults must be True, False or None (where the loss is a squared error), got {self.catapults!r}"
            )


def _check(name: str, value: object, at_most: float = math.inf) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value <= at_most or not math.isfinite(value):  # type: ignore[operator]
        limit = "" if math.isinf(at_most) else f" and at most {at_most:g}"
        raise ValueError(f"{name} must be a finite number above 0{limit}, got {value!r}")


@dataclass(frozen=True)
class Decision:
    """What to do in this step."""

    rate: float  # of this update
    phase: str  # "calm", "spike" or "back"
    average: float  # weight with which the weights before this update enter the average: 0 is frozen, 1 begun anew
    restore: bool = False  # put the average back in place of updating (where there is one yet)
    brake: bool = False  # set the momentum to zero before updating: it would carry the spike on
    events: tuple[Event, ...] = ()
    measure_in: int = 1  # steps until the next measurement is wanted


@dataclass
class _State:
    """Everything the machine remembers: plain numbers, so that it survives every kind of checkpoint."""

    phase: str = "calm"
    since: int = 0  # steps in this phase
    rate: float = 0.0  # crept to; "back" holds what is applied below the edge
    log_edge: float = 0.0
    var_log_edge: float = 0.0
    before: float = 0.0  # log_edge when the present spike began
    losses: int = 0  # finite ones seen
    mean: float = 0.0  # of the loss, over a window
    level: float = 0.0
    var: float = 0.0  # of calm losses about the level
    first: float = 0.0  # loss
    ceiling: float = 0.0  # of the next spike, in falls of the loss
    due: int = 0  # step of the next measurement wanted
    spent: float = 0.0  # on measuring, in steps
    held: int = 0  # steps with a rate far below the edge


class Catapulter:
    """The state machine that the module's docstring describes: one `update` a step.

    Example:
        >>> machine = Catapulter(CatapultPolicy())
        >>> machine.update(step=1, loss=1.0, eta_crit=0.5).rate
        0.05
    """

    def __init__(self, policy: CatapultPolicy) -> None:
        self.policy = policy
        self._state = _State(ceiling=policy.ceiling)

    @property
    def phase(self) -> str:
        return self._state.phase

    @property
    def eta_crit(self) -> float:
        """The critical rate acted on."""
        return math.exp(self._state.log_edge)

    @property
    def spread(self) -> float:
        """Standard deviation of the logarithm of the critical rate, over the last few measurements."""
        return math.sqrt(self._state.var_log_edge)

    @property
    def rate(self) -> float:
        """The last rate decided but for the fall at the end (`settle`); 0.0 before the first decision."""
        s = self._state
        return min(s.rate, self.policy.below * self.eta_crit) if s.phase == "back" else s.rate

    def update(
        self,
        *,
        step: int,
        loss: float,
        eta_crit: float | None = None,
        window: int = 1,
        squared_error: bool = True,
    ) -> Decision:
        """Decide on the rate of this step.

        Args:
            step: 1-based number of the step.
            loss: of this step's batch, at the weights before the update; may be NaN or infinite.
            eta_crit: critical rate of the base update for the same batch and weights, inf for no curvature; None on a
                step that was not measured.
            window: steps to average over: 1 where the batch repeats.
            squared_error: is the loss one? Then catapults pay, where the policy leaves it open.
        """
        s, p = self._state, self.policy
        catapults = squared_error if p.catapults is None else p.catapults
        s.since += 1
        if eta_crit is not None:
            self._measured(eta_crit, step, window, catapults)
        if not s.rate:
            s.rate = p.start * self.eta_crit
        if not math.isfinite(loss) or self._fatal(loss):
            return self._undo(step, loss)
        s.losses += 1
        if s.losses == 1:
            s.mean = s.level = s.first = loss
        s.mean += (loss - s.mean) / min(s.losses, window)
        phase, wish = s.phase, math.inf
        if s.phase == "calm":
            self._calm(loss, window, catapults)
        if s.phase == "spike":
            self._spike(loss, window, catapults, step)
        elif s.phase == "back":
            self._back(window)
        calm = s.phase == "calm"
        average = max(1 / max(s.since, 1), 1 / p.horizon) if calm else 0.0
        return Decision(
            self.rate * self._decay(step),
            s.phase,
            average,
            brake=s.phase == "back" and phase != "back",
            events=self._held_down(),
            measure_in=self._measure_in(step, window, eta_crit is not None),
        )

    def _measured(self, eta_crit: float, step: int, window: int, catapults: bool) -> None:
        """The edge: a mean of the logarithm (batches differ), which one wrong measurement moves only so far.

        That of the first two steps is taken as it is: the edge of an untrained network is no guide to the next.
        """
        s = self._state
        if math.isnan(eta_crit):
            return
        off = math.log(min(max(eta_crit, _LOWEST_EDGE), _HIGHEST_EDGE)) - s.log_edge
        fresh = step <= 2 or s.losses <= 1
        weight = 1.0 if window == 1 or fresh or (off < 0 and not catapults) else 1 / min(_MEMORY, 1 + s.spent / _MEASUREMENT)
        off = off if fresh else min(max(off, -math.log(_TRUST)), math.log(_TRUST))
        s.log_edge += weight * off
        s.var_log_edge = 0.0 if fresh else (1 - weight) * (s.var_log_edge + weight * off**2)
        s.spent += _MEASUREMENT if step > 1 else 0.0

    def _calm(self, loss: float, window: int, catapults: bool) -> None:
        """Climb to near the edge, then creep across it, or stay below; a loss above its level is a spike.

        Crossed slowly, the edge gives gentle catapults and many of them: a peak goes with (rate * lambda - 2)^2. Without
        catapults the rate stays until it is above the edge: to track it from below is a trap, as the network sharpens to
        meet the rate (Cohen et al. 2021), and the rate would follow the edge down.
        """
        s, p = self._state, self.policy
        if (catapults or _SAFE) and s.since > window and s.mean - s.level > max(p.spike * math.sqrt(s.var), _ROUNDING * abs(loss)):
            s.before = s.log_edge
            self._enter("spike")
            return
        steps = _LEVEL_STEPS if window == 1 else _LEVEL_WINDOWS * window
        off = loss - s.level
        if s.losses > window:
            off = min(max(off, -_OUTLIER * math.sqrt(s.var)), _OUTLIER * math.sqrt(s.var)) if s.var else off
        s.var += (off**2 - s.var) / min(s.losses + 1, steps)
        s.level += (loss - s.level) / min(s.losses, steps)
        knee = p.near if catapults else p.reach
        if s.rate < knee * self.eta_crit:
            s.rate = min(s.rate * (1 + (p.climb if catapults else p.climb / _SLOWER)), knee * self.eta_crit)
        elif catapults:
            s.rate *= 1 + (p.creep if window == 1 else p.creep / _SLOWER)
        elif s.rate > _TOO_NEAR * self.eta_crit:
            s.rate = p.reach * self.eta_crit

    def _spike(self, loss: float, window: int, catapults: bool, step: int) -> None:
        """Hold the rate while the loss is up: it is the spike that lowers the curvature (thesis ch. 3)."""
        s, p = self._state, self.policy
        height = (loss if window == 1 else s.mean) - s.level
        if not catapults or s.since > max(p.hold, window) or height > self._top():
            self._enter("back")
            s.due = step + 1
            s.rate *= 1 if catapults else _CUTB
        elif s.mean <= s.level:
            self._enter("calm")
        elif s.since == max(p.hold, window):
            s.due = step + 1

    def _back(self, window: int) -> None:
        """Stay below the edge until the loss is back, or patience is over; then creep on.

        A spike too low to move the edge lets the next one go higher: wide networks gain nothing from low ones.
        """
        s = self._state
        if s.mean <= s.level:
            if s.log_edge - s.before < math.log(_GAIN):
                s.ceiling = min(_HIGHER * s.ceiling, max(_HIGHEST, s.ceiling))
            s.rate = _RESUME * min(s.rate, _MOST_EDGES * self.eta_crit) if window == 1 else self.rate
            self._enter("calm")
        elif s.since > (_PATIENCE if window == 1 else _PATIENT_WINDOWS * window):
            s.rate, s.level = self.rate, s.mean
            self._enter("calm")

    def _top(self) -> float:
        """How far above the level a spike may go: so many times what the loss has fallen, or its spread."""
        s = self._state
        return s.ceiling * max(s.first - s.level, math.sqrt(s.var))

    def _fatal(self, loss: float) -> bool:
        return self._state.losses > 1 and loss - self._state.level > _FATAL * self._top() > 0

    def _undo(self, step: int, loss: float) -> Decision:
        """Put the average back. The rate is to blame in a catapult, or soon after the last undoing.

        A non-finite loss among calm ones is the batch's doing, and so is one right after an undoing: the weights were
        fine.
        """
        s = self._state
        blamed = s.phase != "calm" or 1 < s.since <= _SOON
        if blamed and s.rate > _BLAMELESS * self.eta_crit:
            s.rate = max(_BLAME * self.rate, _BLAMELESS * self.eta_crit)
        self._enter("calm")
        s.mean, s.due = s.level, step + 1
        return Decision(self.rate, s.phase, 0.0, restore=True, brake=True, events=(("restore", {"loss": loss}),))

    def _enter(self, phase: str) -> None:
        self._state.phase, self._state.since = phase, 0

    def _decay(self, step: int) -> float:
        """With total_steps known, the rate falls in a line to nearly nothing over the last part."""
        p = self.policy
        if p.total_steps is None:
            return 1.0
        return min(1.0, max(1, p.total_steps - step + 1) / (p.settle * p.total_steps + 1))

    def _measure_in(self, step: int, window: int, measured: bool) -> int:
        """After 1, 2, 4, ... steps at first, then as often as the share allows; in "back" after 1, 4, 16, ... steps."""
        s = self._state
        share = _SHARE_REPEATED if window == 1 else self.policy.measure_share
        if measured:
            wish = min(4 * max(s.since, 1) if s.phase == "back" else max(step, window*_FIRST), int(_MEASUREMENT / share))
            s.due = s.due if s.due > step else step + wish
        affordable = math.ceil((s.spent - _AHEAD) / share)
        return max(1, max(s.due, affordable) - step) if step > 1 else 1

    def _held_down(self) -> tuple[Event, ...]:
        """Tell once where the rate has long been far below the edge."""
        s = self._state
        if s.held < _HELD_STEPS:
            s.held = s.held + 1 if self.rate < _HELD * self.eta_crit else 0
            if s.held == _HELD_STEPS:
                return (("held_down", {"rate": self.rate, "eta_crit": self.eta_crit, "reason": "losses were not finite"}),)
        return ()
