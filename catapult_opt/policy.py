"""When to go above the edge: the rule of the controller, in plain numbers (no torch).

The edge is the critical rate eta_crit = 2 / lambda_max. With a squared error the rate creeps across it, stays while
the loss rises (a catapult, which lowers the curvature and so raises the edge), and goes below it until the loss is
back. With any other loss it stays just below the edge. The weights of calm steps enter an average, which never lies
in a catapult: it is what should be evaluated, and what a blow-up is undone to.

| phase | the rate | the average | left when |
| --- | --- | --- | --- |
| calm | below `near` edges it climbs, above it creeps | takes the weights in | the loss rises: spike |
| spike | stays | frozen | the loss is back: calm. `hold` steps are over, or it is too high: back |
| back | at most `below` edges | frozen, begun anew after it | the loss is back, or patience is over: calm |

Losses are compared with one another only, by differences: a constant added to the loss, or a positive factor on it,
changes no decision. The level is a slow mean of the calm losses (the lowest of many noisy ones is low by luck), the
spread is their standard deviation, the fall is what the level has come down by since the first loss.
A loss that is not finite, or far above any spike, is undone in any phase.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .catapults import Event
from .checks import check_whole_number
from .state import FieldsState, field_of, take_over

# The rate while no measurement has found any curvature.
_BLIND = 1e-3
# One measurement moves the edge by this factor at most: a wrong one is corrected by the next ones.
_TRUST = 10.0
# On mini-batches the edge is a mean over about this many measurements, of its logarithm.
_MEMORY = 4
# Batches ordinarily differ by up to so much in the logarithm of their edge, as a standard deviation.
_ORDINARY = 0.5
# Level and spread are means over at least this many steps, and windows.
_LEVEL_STEPS, _LEVEL_WINDOWS = 20, 5
# A loss further off the level than so many spreads counts as so far off; below this part of a loss a rise is rounding.
_OUTLIER, _ROUNDING, _LARGEST_LOSS = 3.0, 1e-6, 1e100
# On mini-batches the rate creeps, and without catapults it climbs, slower by this factor.
_SLOWER = 5.0
# The rate is at most so many edges: above 12 / lambda no catapult of a ReLU network comes back (Lewkowycz et al. 2020).
_MOST_EDGES = 6.0
# After a catapult the rate is this part of the one that began it, or of so many edges if that is less.
_RESUME, _RESUME_EDGES = 0.9, 2.0
# A spike that raised the edge by less than this factor was too low: the next may be so much higher, up to this height.
_GAIN, _HIGHER, _HIGHEST = 1.2, 4.0, 1000.0
# A catapult that does not come back is given up after so many steps, and windows.
_PATIENCE, _PATIENT_WINDOWS = 100, 10
# Without catapults, the rate comes down once it is above so many edges, and is halved when the loss rises.
_TOO_NEAR, _CUT = 1.1, 0.5
# A loss so many times as far above the level as a spike may go is undone, and halves the rate, down to this part of
# the edge, in a catapult or so few steps after another blow-up.
_FATAL, _SOON, _BLAME, _BLAMELESS = 1000.0, 3, 0.5, 0.1
# A catapult does not lower the curvature by this factor: units have died, and no rate would bring them back.
_COLLAPSED = 1e4
# What a measurement costs, in training steps; how many may be made ahead; their share where the batch repeats.
_MEASUREMENT, _AHEAD, _SHARE_REPEATED = 5.0, 1, 0.15
# The user is told of a rate that has been below this part of the edge for so many steps.
_HELD, _HELD_STEPS = 0.1, 500

# The logarithm of an edge is at most so large: its exponential is still a number.
_LARGEST_LOG = 690.0
# Settings that are at most 1, and those that may be larger.
_PARTS = ("measure_share", "start", "near", "reach", "below", "cooldown")
_FACTORS = ("climb", "creep", "rise", "height")
# Settings of earlier versions: what replaces them ("" where nothing does).
_FORMER = {
    **{"kappa": "creep", "growth": "creep", "spike": "rise", "ceiling": "height", "cool": "below", "hot_steps": "hold"},
    **{"follow": "reach", "begin": "climb", "settle": "cooldown"},
    **{f"measure_{phase}": "measure_share" for phase in ("cooling", "settled", "following")},
    **dict.fromkeys(("ripe", "fit_steps", "drop", "gain", "fatal", "arm_steps", "patience", "finish"), ""),
    **dict.fromkeys(("blow_up", "caution", "smoothing"), ""),
}


@dataclass(frozen=True)
class CatapultPolicy:
    """Settings of the controller; the defaults need no tuning. Rates are in units of the edge, eta_crit.

    Raises:
        ValueError: a setting is out of its range.
        TypeError: a setting of an earlier version is given; the message names the one that replaces it.

    Example:
        >>> CatapultPolicy(total_steps=500).near
        0.5
    """

    total_steps: int | None = None  # The length of the training, if it is known.
    measure_share: float = 0.05  # Measuring may take this share of the steps' time on mini-batches.
    catapults: bool | None = None  # The rate may cross the edge; None allows it for squared errors alone.
    start: float = 0.1  # The first rate is this part of the edge.
    climb: float = 0.05  # Below `near` edges the rate rises by this part of itself a step.
    near: float = 0.5  # From this part of the edge on, the rate creeps.
    creep: float = 0.02  # Creeping, the rate rises by this part of itself a step (a fifth of it on mini-batches).
    reach: float = 0.7  # Without catapults the rate stays at this part of the edge.
    rise: float = 0.5  # A loss so many spreads above its level is a spike.
    hold: int = 10  # A spike is held for so many steps at most, and at least a window.
    height: float = 20.0  # The first spike may be so many times as high as the loss has fallen.
    below: float = 0.5  # After a spike the rate is at most this part of the edge, until the loss is back.
    horizon: int = 50  # The average runs over about so many calm steps.
    cooldown: float = 0.3  # With `total_steps`, the rate falls to nearly nothing over this last part of them.

    def __new__(cls, *args: Any, **settings: Any) -> CatapultPolicy:
        for name in settings:
            if name in _FORMER:
                now = f"use {_FORMER[name]} instead" if _FORMER[name] else "nothing replaces it, leave it out"
                raise TypeError(f"CatapultPolicy has no setting {name} any more: {now}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name in (*_PARTS, *_FACTORS):
            most = 1.0 if name in _PARTS else math.inf
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (number and math.isfinite(value) and 0 < value <= most):
                limit = "" if math.isinf(most) else f" and at most {most:g}"
                raise ValueError(f"{name} must be a finite number above 0{limit}, got {value!r}")
        for name in ("hold", "horizon", *(() if self.total_steps is None else ("total_steps",))):
            check_whole_number(name, getattr(self, name))
        if not (self.catapults is None or isinstance(self.catapults, bool)):
            raise ValueError(f"catapults must be True, False or None (for squared errors), got {self.catapults!r}")


@dataclass(frozen=True)
class Decision:
    """What to do in this step."""

    rate: float  # of this update
    phase: str  # "calm", "spike" or "back"
    average: float  # weight with which the weights before this update enter the average: 0 is frozen, 1 begun anew
    restore: bool = False  # put the average (if there is one yet) back in place of updating
    brake: bool = False  # set the momentum to zero before updating: it would carry the spike on
    events: tuple[Event, ...] = ()
    measure_in: int = 1  # steps until the next measurement is wanted


@dataclass
class _State(FieldsState):
    """Everything the machine remembers: plain numbers, so that it survives every kind of checkpoint."""

    phase: str = field_of("calm", choices=("calm", "spike", "back"))
    since: int = field_of(-1, least=-1)  # steps in this phase before this one; -1 before the first step
    rate: float = field_of(0.0, least=0)  # crept to so far; 0 while no curvature is known
    log_edge: float = field_of(0.0, least=-_LARGEST_LOG, most=_LARGEST_LOG)
    var_log_edge: float = field_of(0.0, least=0)
    before: float = field_of(0.0, least=-_LARGEST_LOG, most=_LARGEST_LOG)  # log_edge when the present spike began
    losses: int = field_of(0, least=0)  # finite ones seen
    mean: float = field_of(0.0)  # of the loss, over a window
    level: float = field_of(0.0)  # of the calm losses
    var: float = field_of(0.0, least=0)  # of the calm losses about the level
    first: float = field_of(0.0)  # loss
    height: float = field_of(0.0, least=0)  # of the next spike, in falls of the loss
    measured: int = field_of(0, least=0)  # measurements after the first step's
    due: int = field_of(0, least=0)  # step of the next measurement wanted
    held: int = field_of(0, least=0)  # steps in a row with a rate far below the edge


class Catapulter:
    """The state machine of the module's docstring: one `update` a step.

    Example:
        >>> machine = Catapulter(CatapultPolicy())
        >>> round(machine.update(step=1, loss=1.0, eta_crit=0.5).rate, 4)
        0.0525
    """

    def __init__(self, policy: CatapultPolicy) -> None:
        self.policy = policy
        self._state = _State(height=policy.height)

    @property
    def phase(self) -> str:
        return self._state.phase

    @property
    def eta_crit(self) -> float:
        """The critical rate acted on: lower than the mean where that of the batches differs by much (few samples)."""
        return math.exp(self._state.log_edge - max(0.0, self.spread - _ORDINARY))

    @property
    def spread(self) -> float:
        """Standard deviation of the logarithm of the critical rate, over the last few measurements."""
        return math.sqrt(self._state.var_log_edge)

    @property
    def rate(self) -> float:
        """The last rate decided (but for the fall at the end of a training of known length), 0.0 before the first."""
        s = self._state
        return min(s.rate, self.policy.below * self.eta_crit) if s.phase == "back" else s.rate

    def state_dict(self) -> dict[str, Any]:
        return self._state.as_dict()

    def parse(self, state: object) -> FieldsState:
        """The state checked, to be given to `take`."""
        return take_over(_State, state, "policy")

    def take(self, state: FieldsState) -> None:
        assert isinstance(state, _State)
        state.height = state.height or self.policy.height
        self._state = state

    def begin_anew(self) -> None:
        """Forget the losses and the phase, not the rate: somebody put other weights into the model."""
        self._state.phase, self._state.losses, self._state.since = "calm", 0, -1

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
            eta_crit: critical rate for the same batch and weights, inf for no curvature; None if it was not measured.
            window: steps to average the loss over: 1 where the batch repeats.
            squared_error: is the loss one? Then catapults pay, unless the policy says otherwise.
        """
        s = self._state
        catapults = squared_error if self.policy.catapults is None else self.policy.catapults
        s.since += 1
        collapsed = eta_crit is not None and s.phase != "calm" and eta_crit > _COLLAPSED * self.eta_crit
        if eta_crit is not None:
            self._measure(eta_crit, step, window, catapults)
        if collapsed or not abs(loss) < _LARGEST_LOSS or self._beyond_recovery(loss, window):
            return self._undo(step, loss, window)
        s.losses += 1
        if s.losses == 1:
            s.mean = s.level = s.first = loss
        s.mean += (loss - s.mean) / min(s.losses, window)
        phase = s.phase
        if phase == "calm":
            self._calm(loss, window, catapults)
        if s.phase == "spike":
            self._spike(loss, window, catapults)
        elif s.phase == "back":
            self._back(window)
        brake = s.phase == "back" != phase
        s.due = step + 1 if brake else s.due
        rate = (self.rate or _BLIND) * self._fall_at_end(step)
        average = max(1 / (s.since + 1), 1 / self.policy.horizon) if s.phase == "calm" else 0.0
        return Decision(rate, s.phase, average, False, brake, self._held_down(), self._measure_in(step, window))

    def _measure(self, eta_crit: float, step: int, window: int, catapults: bool) -> None:
        """Take a measurement in, as the logarithm; plan the next: after 1, 2, 4, ... steps, in "back" 1, 4, 16, ....

        Batches differ, so that on mini-batches a mean counts; without catapults a lower edge counts at once, as the
        sharpest batch is the one that does harm. Those of the first two steps are taken as they are, as the edge of an
        untrained network is no guide to the next.
        """
        s = self._state
        s.measured = min(s.measured + (step > 1), step // self._pace(window) + 1 + _AHEAD)  # debts are soon forgotten
        s.due = step + min(4 * s.since if s.phase == "back" else max(step, window), self._pace(window))
        if not 1 / _LARGEST_LOSS < eta_crit < _LARGEST_LOSS:  # no curvature, or nonsense: the last edge stays
            return
        off = math.log(eta_crit) - s.log_edge
        if not s.rate or step <= 2:
            s.log_edge += off
        else:
            at_once = window == 1 or (off < 0 and not catapults) or abs(off) > math.log(_TRUST)
            weight = 1.0 if at_once else 1 / min(_MEMORY, 1 + s.measured)
            off = min(max(off, -math.log(_TRUST)), math.log(_TRUST))
            s.log_edge += weight * off
            s.var_log_edge = (1 - weight) * (s.var_log_edge + weight * off * off)
        s.rate = s.rate or self.policy.start * self.eta_crit

    def _calm(self, loss: float, window: int, catapults: bool) -> None:
        """Climb to near the edge, then creep across it, or stay below; a loss above its level is a spike.

        Crossed slowly, the edge gives gentle catapults and many: a peak goes with (rate * lambda - 2)^2. Without
        catapults the rate stays where it is until it is above the edge. To track the edge from below is a trap: the
        network sharpens to meet the rate (Cohen et al. 2021), and the rate would follow the edge down.
        """
        s, p = self._state, self.policy
        spread = math.sqrt(s.var)
        risen = s.since > window and s.mean - s.level > max(p.rise * spread, _ROUNDING * abs(loss))
        if risen or (s.losses > window and loss - s.level > self._highest()):
            s.before = s.log_edge
            self._enter("spike")
            return
        steps = max(_LEVEL_STEPS, _LEVEL_WINDOWS * window)
        off = loss - s.level
        if s.losses > window and spread:
            off = min(max(off, -_OUTLIER * spread), _OUTLIER * spread)
        s.var += (off * off - s.var) / min(s.losses + 1, steps)
        s.level += (loss - s.level) / min(s.losses, steps)
        edge, knee = self.eta_crit, p.near if catapults else p.reach
        if s.rate < knee * edge:
            s.rate = min(s.rate * (1 + (p.climb if catapults else p.climb / _SLOWER)), knee * edge)
        elif catapults:
            s.rate = min(s.rate * (1 + (p.creep if window == 1 else p.creep / _SLOWER)), _MOST_EDGES * edge)
        elif s.rate > _TOO_NEAR * edge:
            s.rate = knee * edge

    def _spike(self, loss: float, window: int, catapults: bool) -> None:
        """Hold the rate while the loss is up: it is the spike that lowers the curvature (thesis ch. 3)."""
        s = self._state
        height = max(loss, s.mean) - s.level
        if not catapults or s.since > max(self.policy.hold, window) or height > self._highest():
            s.rate *= 1.0 if catapults else _CUT
            self._enter("back")
        elif s.mean <= s.level:
            self._enter("calm")

    def _back(self, window: int) -> None:
        """Stay below the edge until the loss is back, or patience is over; then go on.

        A spike too low to move the edge lets the next one go higher: wide networks gain nothing from low ones.
        """
        s = self._state
        if s.mean <= s.level:
            if s.log_edge - s.before < math.log(_GAIN):
                s.height = min(_HIGHER * s.height, max(_HIGHEST, s.height))
            s.rate = _RESUME * min(s.rate, _RESUME_EDGES * self.eta_crit) if window == 1 else self.rate
            self._enter("calm")
        elif s.since > self._patience(window):
            s.rate, s.level = self.rate, s.mean
            self._enter("calm")

    def _beyond_recovery(self, loss: float, window: int) -> bool:
        """Is this loss beyond recovery: far above any spike, or given up with half of what was learned lost?

        Weights that were just put back are not to blame: such is the loss of this batch, and losses begin anew.
        """
        s = self._state
        highest = _FATAL * self._highest()
        if s.losses > 1 and loss - s.level > highest > 0:
            if s.phase == "calm" and s.since == 1:
                self.begin_anew()
                s.since = 0
                return False
            return True
        if s.phase != "back" or s.since <= self._patience(window) or min(s.mean, loss) <= (s.first + s.level) / 2:
            return False
        s.losses = 0  # the old level may be out of reach: it is not waited for again
        return True

    def _undo(self, step: int, loss: float, window: int) -> Decision:
        """Put the average back; the rate is halved if it may be to blame.

        It is not where the losses before were calm (then it is the batch), nor right after an undoing (the weights are
        the average's), nor far below the edge.
        """
        s = self._state
        blamed = s.phase != "calm" or 1 < s.since <= _SOON
        if blamed and self.rate > _BLAMELESS * self.eta_crit:
            s.rate = max(_BLAME * self.rate, _BLAMELESS * self.eta_crit)
        self._enter("calm")
        s.mean, s.due = s.level, step + 1
        events = (("restore", {"loss": loss}), *self._held_down())
        rate = (self.rate or _BLIND) * self._fall_at_end(step)
        return Decision(rate, s.phase, 0.0, True, True, events, self._measure_in(step, window))

    def _highest(self) -> float:
        """How far above the level a spike may go: so many times the fall of the loss, or its spread."""
        s = self._state
        return s.height * max(s.first - s.level, math.sqrt(s.var))

    def _patience(self, window: int) -> int:
        return max(_PATIENCE, _PATIENT_WINDOWS * window)

    def _enter(self, phase: str) -> None:
        self._state.phase, self._state.since = phase, 0

    def _fall_at_end(self, step: int) -> float:
        """With total_steps known, the rate falls in a line to nearly nothing over the last part of them."""
        p = self.policy
        if p.total_steps is None:
            return 1.0
        return min(1.0, max(1, p.total_steps - step + 1) / (p.cooldown * p.total_steps + 1))

    def _measure_in(self, step: int, window: int) -> int:
        """Steps until the measurement that is due, or can be afforded; the second step is always measured."""
        s, pace = self._state, self._pace(window)
        return 1 if step == 1 else min(max(1, s.due - step, pace * (s.measured - _AHEAD) - step), pace)

    def _pace(self, window: int) -> int:
        """Steps from one measurement to the next that the share allows."""
        return math.ceil(_MEASUREMENT / (_SHARE_REPEATED if window == 1 else self.policy.measure_share))

    def _held_down(self) -> tuple[Event, ...]:
        """Tell, once, where the rate has long been far below the edge, and why."""
        s = self._state
        if s.held >= _HELD_STEPS:
            return ()
        s.held = s.held + 1 if self.rate < _HELD * self.eta_crit else 0
        if s.held < _HELD_STEPS:
            return ()
        reason = "the loss does not come back" if s.phase == "back" else "losses were not finite, or blew up"
        return (("held_down", {"rate": self.rate, "eta_crit": self.eta_crit, "reason": reason}),)
