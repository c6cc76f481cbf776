"""Promise: any torch scheduler works on top. ``group["lr"]`` is the user's and the scheduler's alone, the rate applied
is ``group["effective_lr"] = lr * rate``, and groups keep their proportion.

Oracle: the same scheduler on a ``torch.optim.SGD`` that is never stepped by gradients, which has the lr it would have.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim import lr_scheduler as schedulers
from training import Training, net, noise

from catapult_opt import CatapultPolicy

STEPS = 24
Make = Callable[[Optimizer], Any]

SCHEDULERS: dict[str, Make] = {
    "StepLR": lambda o: schedulers.StepLR(o, step_size=5, gamma=0.5),
    "warm-up from zero": lambda o: schedulers.LambdaLR(o, lambda i: min(1.0, i / 10)),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, T_max=STEPS),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, max_lr=1.0, total_steps=STEPS + 1, cycle_momentum=False),
    "OneCycleLR with momentum": lambda o: schedulers.OneCycleLR(o, max_lr=1.0, total_steps=STEPS + 1),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=1, threshold=10.0),
    "warm-up then cosine": lambda o: schedulers.SequentialLR(
        o,
        [schedulers.LinearLR(o, start_factor=0.1, total_iters=5), schedulers.CosineAnnealingLR(o, T_max=STEPS)],
        milestones=[5],
    ),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, base_lr=0.1, max_lr=1.0, step_size_up=4, cycle_momentum=False),
}
every_scheduler = pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)


def train(lr: Any = 1.0, groups: bool = False, face: str = "CatapultSGD", **settings: Any) -> Training:
    """A small net in float64; without a face the optimizer is torch's."""
    model = net(4, 8, 1).double()
    params: Any = list(model.parameters())
    if groups:
        params = [{"params": params[:2], "lr": lr / 4}, {"params": params[2:]}]
    data = noise(16, 4, dtype=torch.float64)
    if face == "":
        return Training("", model, data, params=params, base=lambda params: SGD(params, lr=lr, **settings))
    return Training(face, model, data, params=params, lr=lr, every=1, **settings)


def lrs(run: Training) -> list[float]:
    return [float(g["lr"]) for g in run.optimizer.param_groups]


def parts(run: Training) -> list[Tensor]:
    return [p.detach().clone() for p in run.model.parameters()]


def advance(scheduler: Any, loss: float) -> None:
    scheduler.step(loss) if isinstance(scheduler, schedulers.ReduceLROnPlateau) else scheduler.step()


@every_scheduler
@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("groups", [False, True])
def test_the_controller_never_writes_lr(make: Make, tensor: bool, groups: bool) -> None:
    """After every step lr is what the scheduler alone would have made of it, and stays the same tensor if it is one."""
    run = train(torch.tensor(0.8) if tensor else 0.8, groups, momentum=0.5)
    idle = train(torch.tensor(0.8) if tensor else 0.8, groups, face="", momentum=0.5)
    scheduler, expected = make(run.optimizer), make(idle.optimizer)
    for _ in range(STEPS):
        before = [g["lr"] for g in run.optimizer.param_groups]
        loss = run.step()
        assert all(g["lr"] is lr for g, lr in zip(run.optimizer.param_groups, before, strict=True))
        idle.optimizer.step()
        advance(scheduler, loss)
        advance(expected, loss)
        assert lrs(run) == lrs(idle)


@every_scheduler
def test_effective_lr_is_what_is_applied(make: Make) -> None:
    """Weights move by -effective_lr times the gradient (or its running sum), that is all."""
    run = train(0.8, groups=True)
    scheduler = make(run.optimizer)
    for _ in range(STEPS):
        before = parts(run)
        loss = run.step()
        rates = run.rates()
        for i, (p, w) in enumerate(zip(run.model.parameters(), before, strict=True)):
            direction = run.optimizer.state[p].get("momentum_buffer", p.grad)
            rate = rates[0 if i < 2 else 1]
            torch.testing.assert_close(p.detach(), w - rate * direction, rtol=1e-12, atol=1e-14)
        advance(scheduler, loss)


@every_scheduler
def test_effective_lr_is_lr_times_one_rate_for_all_groups(make: Make) -> None:
    run = train(0.8, groups=True)
    scheduler = make(run.optimizer)
    for _ in range(STEPS):
        before = lrs(run)
        loss = run.step()
        assert run.rates()[0] * before[1] == pytest.approx(run.rates()[1] * before[0])
        advance(scheduler, loss)


def test_lr_multiplies_the_rate() -> None:
    """The first step's: the critical rate of the very update, where the policy says so, times lr."""
    policy = CatapultPolicy(start=1.0, near=1.0, creep=1e-9)
    whole = train(1.0, policy=policy)
    whole.step()
    assert whole.rates()[0] == pytest.approx(whole.optimizer.last.eta_crit)
    for lr in (0.1, 0.5, 3.0):
        part = train(lr, policy=policy)
        part.step()
        assert part.optimizer.last.eta_crit == pytest.approx(whole.optimizer.last.eta_crit)
        assert part.rates()[0] == pytest.approx(lr * whole.rates()[0])


def test_a_schedule_of_ones_changes_nothing() -> None:
    plain, scheduled = train(), train()
    scheduler = schedulers.LambdaLR(scheduled.optimizer, lambda i: 1.0)
    for _ in range(STEPS):
        assert plain.step() == scheduled.step()
        scheduler.step()
    assert plain.rates() == scheduled.rates()


def test_groups_are_the_same_as_rescaled_parameters() -> None:
    """Proportions enter the critical rate, too. Oracle: the equivalent problem with one lr.

    With w = sqrt(r) u, gradient descent on u at rate eta is gradient descent on w at rate r eta: the critical rate of
    groups at (r eta, eta) is that of the net with its first layer written as sqrt(r) u.
    """

    class Scaled(nn.Module):
        def __init__(self, inner: nn.Linear, factor: float) -> None:
            super().__init__()
            self.factor = factor
            self.weight = nn.Parameter(inner.weight.detach() / factor)
            self.bias = nn.Parameter(inner.bias.detach() / factor)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.factor * self.weight, self.factor * self.bias)

    policy = CatapultPolicy()
    grouped = train(1.0, groups=True, policy=policy)
    plain = net(4, 8, 1).double()
    other = Training(
        "CatapultSGD", nn.Sequential(Scaled(plain[0], 0.5), *plain[1:]), grouped.batches, policy=policy, every=1
    )
    for i in range(6):
        assert grouped.step() == pytest.approx(other.step(), rel=1e-5 if i < 2 else 1e-3)
        ratio = grouped.optimizer.last.eta_crit / other.optimizer.last.eta_crit
        assert ratio == pytest.approx(1, rel=1e-3)


def test_a_group_switched_off_by_its_scheduler_stays_where_it_is() -> None:
    run = train(1.0, groups=True)
    scheduler = schedulers.LambdaLR(run.optimizer, [lambda i: 0.0, lambda i: 1.0])
    first = parts(run)[:2]
    for _ in range(10):
        run.step()
        scheduler.step()
    assert all(map(torch.equal, parts(run)[:2], first))
    assert run.rates()[0] == 0.0 < run.rates()[1]


def test_a_warm_up_from_zero_does_not_move_but_measures() -> None:
    """lr = 0 with a batch is a step of the run; without one it is only an initialisation."""
    run = train(0.0)
    before = parts(run)
    run.step()
    assert all(map(torch.equal, parts(run), before))
    assert run.optimizer.last is not None
    assert run.rates() == [0.0]


def test_scheduler_state_and_optimizer_state_resume_together() -> None:
    def build() -> tuple[Training, Any]:
        run = train(momentum=0.5)
        return run, schedulers.OneCycleLR(run.optimizer, max_lr=1.0, total_steps=STEPS + 1)

    run, scheduler = build()
    for _ in range(9):
        advance(scheduler, run.step())
    again, scheduler_again = build()
    again.load(copy.deepcopy(run.checkpoint()))
    scheduler_again.load_state_dict(scheduler.state_dict())
    for _ in range(9, STEPS):
        first, second = run.step(), again.step()
        assert first == second
        assert (lrs(run), run.rates()) == (lrs(again), again.rates())
        advance(scheduler, first)
        advance(scheduler_again, second)
