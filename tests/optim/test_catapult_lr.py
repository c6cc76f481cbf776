"""Promise: `CatapultLR` drives any supported torch optimizer, and leaves all that is not the rate of a step alone.

Oracles: `CatapultSGD` on a net without biases; the preconditioned curvature from an explicit float64 Jacobian; the
optimizer without a controller.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from catapult_opt import CatapultLR, CatapultPolicy, CatapultSGD, read_log

POLICY = CatapultPolicy(arm_steps=5, hot_steps=3, patience=12)


def make(bias: bool = False) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16, bias=bias), nn.ReLU(), nn.Linear(16, 1, bias=bias)).double()
    return model, nn.MSELoss(), torch.randn(12, 5).double(), torch.randn(12, 1).double()


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def step(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, optimizer: Any) -> Tensor:
    optimizer.zero_grad()
    loss: Tensor = criterion(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_on_sgd_it_is_catapult_sgd_to_the_bit(momentum: float) -> None:
    one, other = make(), make()
    optimizer = torch.optim.SGD(one[0].parameters(), lr=0.3, momentum=momentum)
    controller = CatapultLR(optimizer, model=one[0], criterion=one[1], policy=POLICY)
    whole = CatapultSGD(other[0].parameters(), model=other[0], criterion=other[1], policy=POLICY, momentum=momentum)
    phases = set()
    for _ in range(120):
        step(*one, optimizer)
        step(*other, whole)
        assert torch.equal(weights(one[0]), weights(other[0]))
        assert optimizer.param_groups[0]["effective_lr"] == whole.param_groups[0]["effective_lr"]
        phases.add(controller.phase)
    assert phases >= {"arm", "hot", "cool"}
    assert controller.super_critical_steps == whole.super_critical_steps > 0


def test_first_rates_of_adam_are_parts_of_its_own_critical_rate() -> None:
    model, criterion, x, y = make(bias=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    controller = CatapultLR(optimizer, model=model, criterion=criterion)
    criterion(model(x), y).backward()
    params = dict(model.named_parameters())
    jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (x,)).flatten())(params)
    # The very first step: v_hat = g^2, so that P = |g| + eps.
    columns = [j.reshape(12, -1) / (params[n].grad.flatten().abs() + 1e-8).sqrt() for n, j in jacobian.items()]
    lam = float(torch.linalg.svdvals(torch.cat(columns, 1))[0] ** 2) * 2 / 12
    optimizer.step()
    assert controller.last.lambda_max == pytest.approx(lam, rel=5e-3)
    # The batch may be a mini-batch, where momentum helps no more; the second time it is known not to be.
    assert optimizer.param_groups[0]["effective_lr"] == pytest.approx(0.4 * 2 / lam, rel=5e-3)
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    optimizer.step()
    assert optimizer.param_groups[0]["effective_lr"] == pytest.approx(0.8 * 38 / controller.last.lambda_max)
    assert optimizer.param_groups[0]["lr"] == 1e-3


class WithLoss(nn.Module):
    """Returns its loss. Tiny inputs give their weights tiny gradients, and Adam takes long steps along those."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 1)
        self.register_buffer("sizes", torch.tensor([1.0, 1.0, 1e-7, 1e-9]))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.last(torch.tanh(self.first(x * self.sizes))) - y).square().mean()


def test_adam_on_a_model_that_returns_its_loss() -> None:
    """Central differences under a preconditioner that differs by millions, against the explicit Hessian in float64."""
    model = WithLoss()
    x, y = torch.randn(10, 4), torch.randn(10, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-10)
    controller = CatapultLR(optimizer, model=model, criterion=None)
    model(x, y).backward()
    exact = copy.deepcopy(model).double()
    names, shapes = zip(*[(n, p.shape) for n, p in exact.named_parameters()], strict=True)

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([s.numel() for s in shapes])
        given = {n: part.view(s) for n, part, s in zip(names, parts, shapes, strict=True)}
        return torch.func.functional_call(exact, given, (x.double(), y.double()))

    hessian = torch.autograd.functional.hessian(loss, weights(exact))
    roots = (torch.cat([p.grad.flatten() for p in model.parameters()]).double().abs() + 1e-10).rsqrt()
    expected = float(torch.linalg.eigvalsh(roots[:, None] * hessian * roots)[-1])
    optimizer.step()
    assert controller.last.lambda_max == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    "kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad]
)
def test_trains_and_gives_lr_back(kind: type[torch.optim.Optimizer], tmp_path: Path) -> None:
    model, criterion, x, y = make(bias=True)
    optimizer = kind(model.parameters(), lr=0.01)  # type: ignore[call-arg]
    log = tmp_path / "run.jsonl"
    controller = CatapultLR(optimizer, model=model, criterion=criterion, policy=POLICY, log=log)
    losses = [float(step(model, criterion, x, y, optimizer)) for _ in range(80)]
    controller.detach()
    assert min(losses) < losses[0]
    assert optimizer.param_groups[0]["lr"] == 0.01
    rates = read_log(log).column("effective_lr")
    assert all(0 < r < float("inf") for r in rates)
    assert optimizer.param_groups[0]["effective_lr"] == rates[-1]


# From the first step on, and no spike is seen.
ARMED = CatapultPolicy(ripe=1.0, smoothing=1, spike=1e6, ceiling=1e7, fatal=1e8)


@pytest.mark.parametrize("tensor", [False, True])
def test_a_scheduler_on_top_scales_the_rate(tensor: bool) -> None:
    """Halved after the first step: the armed rate is held, so the rate applied halves too; groups keep proportions."""
    model, criterion, x, y = make()
    lr: Any = torch.tensor(0.1) if tensor else 0.1
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": lr / 4}]
    optimizer = torch.optim.SGD(groups, lr=lr)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    CatapultLR(optimizer, model=model, criterion=criterion, policy=ARMED)
    seen = []
    for _ in range(3):
        step(model, criterion, x, y, optimizer)
        seen.append([g["effective_lr"] for g in optimizer.param_groups])
        scheduler.step()
    assert seen[1][0] <= seen[0][0] / 2 * (1 + 1e-6)
    assert all(b == pytest.approx(a / 4) for a, b in seen)
    assert [float(g["lr"]) for g in optimizer.param_groups] == pytest.approx([0.1 / 8, 0.1 / 32])
    assert isinstance(optimizer.param_groups[0]["lr"], Tensor) == tensor


def test_a_nan_loss_is_undone_and_leaves_the_averages_of_adam() -> None:
    model, criterion, x, y = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    controller = CatapultLR(optimizer, model=model, criterion=criterion, policy=CatapultPolicy(ripe=1.0, smoothing=1))
    start = weights(model)
    for _ in range(3):
        step(model, criterion, x, y, optimizer)
    squares = [s["exp_avg_sq"].clone() for s in optimizer.state.values()]
    step(model, criterion, x, y * float("nan"), optimizer)
    assert torch.equal(weights(model), start)  # the snapshot is of the last attempt
    assert all(torch.equal(s["exp_avg_sq"], q) for s, q in zip(optimizer.state.values(), squares, strict=True))
    assert not any(s["exp_avg"].any() for s in optimizer.state.values())
    assert all(p.grad is not None for p in model.parameters())
    step(model, criterion, x, y, optimizer)
    assert torch.isfinite(weights(model)).all()
    assert controller.phase == "arm"


@pytest.mark.parametrize("cut", [1, 7, 23, 40])
def test_resume_is_the_run_it_would_have_been(cut: int) -> None:
    make_optimizer: Callable[[Any], Any] = lambda p: torch.optim.Adam(p, lr=0.01)  # noqa: E731
    whole = make()
    optimizer = make_optimizer(whole[0].parameters())
    controller = CatapultLR(optimizer, model=whole[0], criterion=whole[1], policy=POLICY)
    for i in range(60):
        if i == cut:
            kept = copy.deepcopy((whole[0].state_dict(), optimizer.state_dict(), controller.state_dict()))
        step(*whole, optimizer)
    resumed = make()
    resumed[0].load_state_dict(kept[0])
    second = make_optimizer(resumed[0].parameters())
    again = CatapultLR(second, model=resumed[0], criterion=resumed[1], policy=POLICY)
    second.load_state_dict(kept[1])
    again.load_state_dict(kept[2])
    for _ in range(60 - cut):
        step(*resumed, second)
    assert torch.equal(weights(whole[0]), weights(resumed[0]))
    assert again.catapults == controller.catapults


def test_closures() -> None:
    one, other = make(), make()
    optimizers = [torch.optim.SGD(m[0].parameters(), lr=0.1) for m in (one, other)]
    for o, m in zip(optimizers, (one, other), strict=True):
        CatapultLR(o, model=m[0], criterion=m[1], policy=POLICY)
    model, criterion, x, y = other

    def closure() -> Tensor:
        optimizers[1].zero_grad()
        loss: Tensor = criterion(model(x), y)
        loss.backward()
        return loss

    for _ in range(30):
        expected = step(*one, optimizers[0])
        assert torch.equal(optimizers[1].step(closure), expected)
    assert torch.equal(weights(one[0]), weights(model))


def test_refusals_change_nothing() -> None:
    model, criterion, _, _ = make()
    for optimizer in (torch.optim.LBFGS(model.parameters()), torch.optim.Rprop(model.parameters())):
        before = copy.deepcopy(optimizer.state_dict())
        with pytest.raises(TypeError, match=type(optimizer).__name__):
            CatapultLR(optimizer, model=model, criterion=criterion)
        assert optimizer.state_dict() == before
    with pytest.raises(ValueError, match="fused"):
        CatapultLR(torch.optim.Adam(model.parameters(), fused=True), model=model, criterion=criterion)
    with pytest.raises(ValueError, match="lr must be above 0"):
        CatapultLR(torch.optim.SGD(model.parameters(), lr=0.0), model=model, criterion=criterion)
    with pytest.raises(TypeError, match="policy"):
        CatapultLR(torch.optim.SGD(model.parameters(), lr=0.1), model=model, criterion=criterion, policy=2.0)  # type: ignore[arg-type]


def test_detached_it_is_the_optimizer_again() -> None:
    one, other = make(), make()
    optimizer, plain = (torch.optim.SGD(m[0].parameters(), lr=0.1) for m in (one, other))
    CatapultLR(optimizer, model=one[0], criterion=one[1]).detach()
    for _ in range(3):
        step(*one, optimizer)
        step(*other, plain)
    assert torch.equal(weights(one[0]), weights(other[0]))
