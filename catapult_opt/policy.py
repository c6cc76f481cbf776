"""When to go above the edge: the catapult policy, in plain numbers (no torch).

`CatapultPolicy` holds the settings; `Catapulter` is the state machine: one `update` a step with the step's loss and,
where it was measured, its critical rate; one `Decision` back, which also says when the next measurement is wanted. The
same losses and rates always give the same decisions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .catapults import Event, above
from .checks import check_whole_number
from .state import FieldsState, field_of, take_over

# Stands for "no curvature at all", where 2 / lambda is infinite.
_LARGEST_RATE = 1e30
_LEAST_LOG = -600.0  # of a rate: its exponential is still a number
# An attempt is never below this part of the critical rate, however many have failed: it has to find back.
_LEAST = 1e-6
# A spike above this many times the first loss is watched step by step; below the edge, before the first, it is undone.
_HIGH = 10.0
# What the height of the next spike is raised and lowered by at most, and how many first losses it may be.
_RAISED, _LOWERED, _HIGHEST = 4.0, 1.5, 1000.0
# A loss this many times what it settled at is a new training.
_AGAIN = 10.0
# A critical rate this many times above that of the attempt: no catapult lowers the curvature so far, dead units do.
_COLLAPSED = 1e4
# Standard deviation of the log curvature that is ordinary for mini-batches: caution begins above it.
_ORDINARY = 0.5


@dataclass(frozen=True)
class CatapultPolicy:
    """Settings of the catapult controller; the defaults need no tuning.

    Rates are in units of the critical rate eta_crit. The scale of the losses is the first one of the training: what a
    spike does to the kernel goes by its height, whatever the training had come down to before it.

    Example:
        >>> CatapultPolicy(total_steps=500).kappa
        2.0
    """

    ripe: float = 0.3  # catapults begin once the loss is down at this part of the first one,
    fit_steps: int = 50  # or, where the batch repeats, after this long
    kappa: float = 2.0  # rate of an attempt: kappa * eta_crit
    growth: float = 2.0  # an attempt raises the rate of the last attempt at most by this factor
    spike: float = 1.2  # a loss above this times the lowest one of the attempt is a catapult under way
    drop: float = 2.0  # it has paid, and is cooled, once eta_crit is this factor above that of the attempt,
    ceiling: float = 4.0  # or gone far enough once the loss is (or will be) above this times the first one;
    gain: float = 1.2  # the next may go as high as should raise eta_crit by this factor, judged by the last one
    fatal: float = 1e6  # a loss above this times the first one (or not finite) is undone: restore the snapshot
    cool: float = 0.8  # rate while cooling, settling and, where the batch repeats, before the first: cool * eta_crit
    hot_steps: int = 10  # a catapult is held at the high rate at most this long
    arm_steps: int = 25  # an attempt without a spike is renewed after this long
    patience: int = 100  # a catapult not over after this long is given up: undone above `ripe`, else from there
    measure_cooling: int = 16  # steps between measurements, doubling from 1, at most: in a catapult being cooled
    measure_settled: int = 50  # after the last one,
    measure_following: int = 200  # and where there are none
    measure_share: float = 0.045  # of the steps' time, for mini-batches: measurements beyond it wait
    finish: float = 0.003  # no catapults once the loss is below this times the first one
    settle: float = 0.7  # with total_steps known: none after this fraction of them, and the rate falls to zero
    total_steps: int | None = None  # length of the training, if known
    catapults: bool | None = None  # None: where the loss is a squared error; without them, the edge is followed:
    follow: float = 0.4  # rate while following: follow * the lowest eta_crit so far (before the first: the present),
    begin: float = 0.01  # risen to from zero, by this part of follow * the first eta_crit a step,
    blow_up: float = 2.0  # and a loss above this times the first one is undone
    caution: float = 1.0  # times the spread of the log curvature beyond 0.5: act on a curvature so far above the mean
    smoothing: int | None = None  # steps to average the loss over; None: 1 for a repeated batch, else 20

    def __post_init__(self) -> None:
        for name in ("kappa", "growth", "spike", "drop", "ceiling", "gain", "fatal", "blow_up"):
            _check(name, getattr(self, name), above=1.0)
        for name in ("ripe", "cool", "follow", "finish", "settle", "begin", "measure_share"):
            _check(name, getattr(self, name), above=0.0, at_most=1.0)
        if not (isinstance(self.caution, (int, float)) and 0 <= self.caution < math.inf):
            raise ValueError(f"caution must be a finite number >= 0, got {self.caution!r}")
        if self.catapults not in (None, True, False):
            raise ValueError(
                f"catapults must be True, False or None (where the loss is a squared error), got {self.catapults!r}"
            )
        for name in (*_WHOLE, "total_steps", "smoothing"):
            value = getattr(self, name)
            if value is None and name in ("total_steps", "smoothing"):
                continue
            check_whole_number(name, value)


_WHOLE = ("fit_steps", "hot_steps", "arm_steps", "patience", "measure_cooling", "measure_settled", "measure_following")


def _check(name: str, value: float, *, above: float, at_most: float = math.inf) -> None:
    if not isinstance(value, (int, float)) or not above < value <= at_most or not math.isfinite(value):
        limit = "" if math.isinf(at_most) else f" and at most {at_most:g}"
        raise ValueError(f"{name} must be a finite number above {above:g}{limit}, got {value!r}")


@dataclass(frozen=True)
class Decision:
    """What to do in this step."""

    rate: float  # of the update
    phase: str  # "fit", "arm", "hot", "cool", "settle" or "follow"
    take_snapshot: bool = False  # of the weights before this update
    restore: bool = False  # put the snapshot back instead of updating
    brake: bool = False  # set the momentum to zero before updating: it would carry the spike on
    events: tuple[Event, ...] = ()
    measure_in: int = 1  # steps until the next measurement is wanted
    alarm: bool = False  # the loss rises where it should not: the measurement may overdraw its budget


@dataclass
class _State(FieldsState):
    """Everything the machine remembers: plain numbers, so that it survives every kind of checkpoint."""

    phase: str = field_of("start", choices=("start", "fit", "arm", "hot", "cool", "settle", "follow"))
    rate: float = field_of(0.0)  # held between measurements
    attempt: float = field_of(
        math.inf, infinite=True
    )  # rate of the last attempt; following: the most that growth has come to
    armed: float = field_of(0.0)  # eta_crit at its start; following: the lowest so far
    kappa: float = field_of(0.0)
    height: float = field_of(0.0)  # at which a spike is cooled, in first losses
    low: float = field_of(math.inf, infinite=True)  # the loss to come back to
    began: float = field_of(0.0)  # loss of the first step
    first: float = field_of(0.0)  # the same, but that of the snapshot where this was far above
    before: float = field_of(0.0)  # loss of the last step
    slope: float = field_of(0.0)  # following, and in "fit" after a restore: what the rate grows by, a step
    interval: int = field_of(1, least=1)  # between measurements
    steps: int = field_of(0, least=0)  # decided
    entered: int = field_of(0, least=0)  # step at which the phase was entered
    spiked: int = field_of(0, least=0)  # step at which the loss left `low`
    undone: int = field_of(0, least=0)  # step of the last restore
    updates: int = field_of(0, least=0)  # that the mean loss ran over,
    measured: int = field_of(0, least=0)  # and the mean curvature
    mean_loss: float = field_of(0.0)
    mean_log_curvature: float = field_of(0.0)
    var_log_curvature: float = field_of(0.0)


class Catapulter:
    """The state machine: fit below the edge, arm above it, hold while the loss rises, cool until it is back, and again.

    Catapults wait until the loss is down (`ripe`): a spike of an untrained network destroys more than it finds. How
    high a spike may go is learned on the way: it begins near the first loss, and rises while catapults do not pay.

    Where the loss is no squared error, its curvature says little about what a spike would do (under cross-entropy it
    vanishes with the fit, and an untrained network's is ten times lower than the same network's some steps on): the
    machine then follows the edge of the sharpest batch so far from below, and there are no catapults.

    Example:
        >>> machine = Catapulter(CatapultPolicy())
        >>> machine.update(step=1, loss=1.0, eta_crit=0.5).rate
        0.4
    """

    def __init__(self, policy: CatapultPolicy) -> None:
        self.policy = policy
        self._state = _State()

    @property
    def phase(self) -> str:
        return self._state.phase

    @property
    def eta_crit(self) -> float:
        """The critical rate acted on: of the mean log curvature, plus `caution` times what is unusual of its spread."""
        unusual = max(0.0, self.spread - _ORDINARY)
        return math.exp(max(-self._state.mean_log_curvature - self.policy.caution * unusual, _LEAST_LOG))

    @property
    def spread(self) -> float:
        """Standard deviation of the log curvature over the last few measurements (a fifth of `smoothing`)."""
        return math.sqrt(self._state.var_log_curvature)

    @property
    def rate(self) -> float:
        """The last rate decided, 0.0 before the first decision."""
        return self._state.rate

    def state_dict(self) -> dict[str, Any]:
        return self._state.as_dict()

    def parse(self, state: object) -> FieldsState:
        """The state checked, to be given to `take`."""
        return take_over(_State, state, "policy")

    def take(self, state: FieldsState) -> None:
        assert isinstance(state, _State)
        self._state = state

    def update(
        self,
        *,
        step: int,
        loss: float,
        eta_crit: float | None = None,
        smoothing: int = 1,
        squared_error: bool = True,
    ) -> Decision:
        """Decide on the rate of this step.

        Args:
            step: 1-based number of the step.
            loss: of this step's batch, at the weights before the update.
            eta_crit: critical rate of the base update for the same batch and weights, inf for no curvature; None on a
                step that was not measured. The first step must be.
            smoothing: steps to average over, where the policy leaves it open.
            squared_error: is the loss one? Asked on the first step only.
        """
        s, p = self._state, self.policy
        s.steps += 1
        if s.steps == 1:
            s.phase = "fit" if (squared_error if p.catapults is None else p.catapults) else "follow"
            s.kappa, s.height = p.kappa, p.ceiling
        s.began = s.began or loss
        s.first = s.first or loss
        limit = {"follow": p.blow_up, "fit": _HIGH}.get(s.phase, p.fatal)
        if s.rate and not -math.inf < loss <= above(s.first, limit):
            return self._undo(step, loss)
        if s.rate and s.phase not in ("follow", "settle") and eta_crit is not None and eta_crit > _COLLAPSED * s.armed:
            if not self._restored(step):
                return self._undo(step, loss)
            s.armed = min(eta_crit, _LARGEST_RATE)
        h = p.smoothing or smoothing
        # This very loss, as a mean over many steps would see it too late; of a repeated batch even the coming one, as
        # it grows by the same factor again.
        coming = loss * max(1.0, loss / s.before) if h == 1 and s.before > 0 else loss
        too_high = coming > s.height * abs(s.first)
        newest, measured = loss, eta_crit is not None
        loss = self._averaged(loss, eta_crit, h)
        eta_crit = self.eta_crit
        s.armed = s.armed or eta_crit
        if s.phase == "follow":
            return self._follow(step, newest, eta_crit, measured)
        if s.phase == "fit":
            if not self._ready(step, loss, h):
                return self._fit(loss, eta_crit, measured, h)
            s.phase = "start"
        if self._lost(step, loss, h):
            return self._undo(step, loss)
        over = self._over(step, loss)
        if s.phase == "settle" and not over:
            self._enter("start", step)
        if s.phase == "arm":
            s.low = min(s.low, loss)
            if loss > above(s.low, p.spike):
                self._enter("hot", step)
                s.spiked = step
        if s.phase == "hot" and (too_high or over or self._paid(step, loss, eta_crit, measured, h)):
            self._enter("cool", step)
        if s.phase == "cool" and measured and self._failed(step, loss, eta_crit):
            return self._undo(step, loss)
        events = self._recovery(step, loss, eta_crit, measured, h) if s.phase in ("hot", "cool") else []
        # Momentum may only be passing through the old loss: is this one worth keeping? (Batches differ.)
        back = loss <= (s.first if h == 1 else above(s.first, 2.0))
        due = (s.phase == "start" and back) or (s.phase == "arm" and step - s.entered >= max(p.arm_steps, h))
        fresh = measured and due and not over
        if fresh:
            self._arm(step, loss, eta_crit)
        if over and s.phase in ("start", "arm"):  # a catapult under way is brought home first
            self._enter("settle", step)
            s.low = loss
        s.rate = self._rate(eta_crit) * (self._decay(step) if s.phase == "settle" else 1.0)
        measure_in, s.before = self._next(step, loss, measured, h), loss
        high = h > 1 and newest > _HIGH * abs(s.first)  # before the mean shows it
        cooled = s.phase == "cool" and s.entered == step
        return Decision(
            s.rate,
            s.phase,
            take_snapshot=fresh,
            brake=cooled,
            events=tuple(events),
            measure_in=1 if high else measure_in,
            alarm=high or (cooled and h > 1) or (s.phase == "settle" and loss > above(s.low, p.spike)),
        )

    def _ready(self, step: int, loss: float, h: int) -> bool:
        """The loss is down far enough for catapults, or there is no more time for them."""
        s, p = self._state, self.policy
        down = s.updates >= h and loss <= p.ripe * abs(s.first)
        return down or (h == 1 and s.steps > p.fit_steps) or self._ending(step)

    def _fit(self, loss: float, eta_crit: float, measured: bool, h: int) -> Decision:
        """Below the edge as gradient descent would be; on mini-batches by the margin of `follow`."""
        s, p = self._state, self.policy
        calm = loss <= above(s.first, p.spike)
        part = p.cool if h == 1 else p.follow
        if not s.rate:
            s.slope = p.begin * part * eta_crit
        elif measured:
            s.interval = min(2 * s.interval, max(p.measure_cooling, h))
            s.armed = eta_crit if calm else s.armed
        s.attempt += s.slope  # infinite but after a restore
        s.rate = min(s.attempt, part * eta_crit)
        return Decision(s.rate, s.phase, take_snapshot=measured and calm, measure_in=s.interval)

    def _ending(self, step: int) -> bool:
        p = self.policy
        return p.total_steps is not None and step > p.settle * p.total_steps

    def _over(self, step: int, loss: float) -> bool:
        """No catapult is to begin: little time is left, or little loss (and, settled, until there is much more)."""
        s, p = self._state, self.policy
        little = p.finish * s.began * (_AGAIN if s.phase == "settle" else 1.0)
        return self._ending(step) or (s.phase in ("start", "arm", "settle") and 0 < loss <= little)

    def _paid(self, step: int, loss: float, eta_crit: float, measured: bool, h: int) -> bool:
        """Has the curvature come down within the spike? Measured, or, for a repeated batch, seen from its peak.

        Along the top eigenvector the loss grows by (rate * lambda - 1)^2 a step: it peaks where eta_crit reaches the
        rate.
        """
        s, p = self._state, self.policy
        peaked = h == 1 and loss < s.before
        down = (measured and eta_crit > p.drop * s.armed) or peaked
        return (down and loss > above(s.low, p.spike)) or step - s.entered >= max(p.hot_steps, h)

    def _failed(self, step: int, loss: float, eta_crit: float) -> bool:
        """A spike that leaves the curvature higher than it came is no catapult: the way back would be long."""
        s, p = self._state, self.policy
        return step - s.entered >= p.hot_steps and eta_crit * p.drop < s.armed and loss > above(s.low, p.spike)

    def _next(self, step: int, loss: float, measured: bool, h: int) -> int:
        """Steps until the next measurement is wanted: where a decision waits for it, and 1, 2, 4, ... steps after."""
        s, p = self._state, self.policy
        if s.phase == "start" or (s.phase != "arm" and s.entered == step):
            s.interval = 1
            return 1
        if s.phase == "arm":
            return max(p.arm_steps, h)
        if s.phase == "hot":  # far above the first loss the curvature changes from step to step, and may rise
            return 1 if loss > _HIGH * abs(s.first) else max(p.hot_steps, h)
        rising = loss > above(s.low, p.spike) if s.phase == "settle" else h == 1 and loss > s.before
        if rising:
            s.interval = 1
        elif measured:
            # Right after a catapult eta_crit still falls, and a stale one would raise the loss.
            s.interval = min(2 * s.interval, max(p.measure_settled if s.phase == "settle" else p.measure_cooling, h))
        if s.phase == "settle":
            s.low = min(s.low, loss)
        return s.interval

    def _averaged(self, loss: float, eta_crit: float | None, h: int) -> float:
        """Running means of the loss and of log(1 / eta_crit) over about h updates (full weight to the first ones)."""
        s = self._state
        s.updates += 1
        weight = 1.0 / min(s.updates, h)
        s.mean_loss += weight * (loss - s.mean_loss)
        if eta_crit is not None:
            s.measured += 1
            weight = 1.0 / min(s.measured, max(1, h // 5))  # they are rarer, and differ less
            off = -math.log(min(max(eta_crit, 1 / _LARGEST_RATE), _LARGEST_RATE)) - s.mean_log_curvature
            s.mean_log_curvature += weight * off
            s.var_log_curvature = (1 - weight) * (s.var_log_curvature + weight * off**2)
        return s.mean_loss

    def _enter(self, phase: str, step: int) -> None:
        if self._state.phase != phase:
            self._state.phase, self._state.entered = phase, step

    def _arm(self, step: int, loss: float, eta_crit: float) -> None:
        s, p = self._state, self.policy
        if s.phase == "start" and s.spiked:  # a catapult lies behind
            s.height = min(max(s.height * self._correction(eta_crit / s.armed), p.ceiling), _HIGHEST)
        if s.phase == "arm":  # no spike came of it: what a failure has taken off comes back
            s.kappa = min(p.kappa, 1 + 2 * (s.kappa - 1))
        s.armed, target = eta_crit, s.kappa * eta_crit
        s.rate = s.attempt = min(target, p.growth * s.attempt)
        s.phase, s.entered, s.low = "arm", step, loss

    def _correction(self, gained: float) -> float:
        """Of the height of the next spike, by the factor that the last one gained in eta_crit.

        A step of rate kappa * eta_crit takes from lambda what goes with the loss over lambda (thesis ch. 3): the gain
        goes with the loss over lambda^2.
        """
        rise = max(0.0, math.log(gained))
        change = math.log(self.policy.gain) / max(rise, 1e-3)
        return min(max(change, 1 / _LOWERED), _RAISED) * math.exp(-2 * rise)

    def _recovery(self, step: int, loss: float, eta_crit: float, measured: bool, h: int) -> list[Event]:
        """Back at the old loss and below the edge: done. Too long away: start from the loss reached, more gently."""
        s, p = self._state, self.policy
        if loss <= s.low and (s.phase == "cool" or (measured and s.rate < eta_crit)):
            s.phase, s.kappa = "start", p.kappa
            return []
        if step - s.spiked >= max(p.patience, 4 * h):
            s.phase, s.kappa = "start", 1 + (s.kappa - 1) / 2
            return [("back_off", {"kappa": s.kappa, "loss": loss})]
        return []

    def _rate(self, eta_crit: float) -> float:
        s, p = self._state, self.policy
        if s.phase in ("cool", "settle"):
            return min(s.attempt, p.cool * eta_crit)
        return min(s.rate, s.kappa * eta_crit)

    def _follow(self, step: int, loss: float, eta_crit: float, measured: bool) -> Decision:
        """Below the edge of the sharpest batch so far, from a gentle start on."""
        s, p = self._state, self.policy
        calm = loss <= above(s.first, p.spike)
        if not s.rate:
            s.attempt, s.slope = 0.0, p.begin * p.follow * eta_crit
        elif measured:
            s.interval = min(max(2 * s.interval, step - s.undone), p.measure_following)
            s.armed = min(s.armed, eta_crit) if calm else s.armed
        s.attempt = min(s.attempt + s.slope, _LARGEST_RATE)
        s.rate = min(s.attempt, p.follow * s.armed) * self._decay(step)
        return Decision(s.rate, s.phase, take_snapshot=measured and calm, measure_in=s.interval if calm else 1)

    def _decay(self, step: int) -> float:
        """With total_steps known, the rate falls in a line to nearly nothing over what is left after `settle`."""
        p = self.policy
        if p.total_steps is None:
            return 1.0
        return min(1.0, max(1, p.total_steps - step + 1) / ((1 - p.settle) * p.total_steps + 1))

    def _lost(self, step: int, loss: float, h: int) -> bool:
        """What had been learned is gone (units may be dead), and no time left: out of patience, or about to end."""
        s, p = self._state, self.policy
        ending = p.total_steps is not None and step > (1 + p.settle) / 2 * p.total_steps
        over_time = s.phase in ("hot", "cool") and step - s.spiked >= max(p.patience, 4 * h)
        sure = s.updates >= min(h, 10 if loss < above(s.first, 2.0) else 3)  # of the mean over mini-batches
        return (ending or over_time) and sure and loss > max(p.ripe * abs(s.first), s.low)

    def _restored(self, step: int) -> bool:
        """Are the weights the snapshot's own, by the step before?"""
        return 0 < self._state.undone == step - 1

    def _undo(self, step: int, loss: float) -> Decision:
        """Beyond recovery: put the snapshot back and try again, more gently."""
        s, p = self._state, self.policy
        if self._restored(step):  # the rate cannot be to blame
            s.first = max(s.first, loss) if math.isfinite(loss) else s.first
        else:
            s.kappa = 1 + (s.kappa - 1) / 2
            reached = min(s.attempt, s.rate) if s.phase in ("follow", "fit") else s.attempt
            s.attempt, s.slope = max(reached / 4, _LEAST * s.armed), s.slope / 4
        s.rate, s.undone, s.interval = s.attempt, step, 1
        # The averages start again from the snapshot's.
        s.updates, s.measured, s.mean_log_curvature = 0, 0, -math.log(s.armed)
        if s.phase == "fit":
            s.rate = min(s.attempt, p.follow * self.eta_crit)
        elif s.phase != "follow":
            s.phase, s.entered, s.low = "arm", step, math.inf
            s.rate = self._rate(self.eta_crit)
        return Decision(s.rate, s.phase, restore=True, events=(("restore", {"loss": loss, "kappa": s.kappa}),))
