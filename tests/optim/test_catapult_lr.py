"""Promise: `CatapultLR` drives any supported torch optimizer, and leaves all that is not the rate of a step alone.

Oracles: `CatapultSGD` on a net without biases; the preconditioned curvature from an explicit float64 Jacobian; the
optimizer without a controller.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam
from training import QUICK, Base, Training, net, noise

from catapult_opt import CatapultLR, CatapultPolicy, read_log


def train(base: Base | None, face: str = "CatapultLR", **settings: Any) -> Training:
    """A small net in float64."""
    model = net(5, 16, 1, activation=nn.ReLU).double()
    return Training(face, model, noise(12, 5, dtype=torch.float64), base=base, **settings)


def sgd(lr: float, **settings: Any) -> Base:
    return lambda params: SGD(params, lr=lr, **settings)


def adam(lr: float) -> Base:
    return lambda params: Adam(params, lr=lr)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_on_sgd_it_is_catapult_sgd_to_the_bit(momentum: float) -> None:
    settings = {"policy": CatapultPolicy(start=1.0, near=1.0, climb=0.5, hold=5), "every": 1}
    one = train(sgd(0.3, momentum=momentum), **settings)
    other = train(None, "CatapultSGD", momentum=momentum, **settings)
    for _ in range(120):
        assert one.step() == other.step()
        assert torch.equal(one.weights(), other.weights())
        assert one.rates() == other.rates()
        assert one.watch.phase == other.watch.phase
    assert one.watch.catapults == other.watch.catapults > 0
    assert one.watch.super_critical_steps == other.watch.super_critical_steps > 0


def test_first_rates_of_adam_are_its_own_critical_rate() -> None:
    """Where the policy says so: at the edge from the first step on."""
    training = train(adam(1e-3), policy=CatapultPolicy(start=1.0, near=1.0, climb=1e3))
    training.backward()
    params = dict(training.model.named_parameters())
    outputs = lambda p: torch.func.functional_call(training.model, p, (training.x,)).flatten()  # noqa: E731
    jacobian = torch.func.jacrev(outputs)(params)
    # The very first step: v_hat = g^2, so that P = |g| + eps.
    columns = [j.reshape(12, -1) / (params[n].grad.flatten().abs() + 1e-8).sqrt() for n, j in jacobian.items()]
    lam = float(torch.linalg.svdvals(torch.cat(columns, 1))[0] ** 2) * 2 / 12
    training.optimizer.step()
    assert training.watch.last.lambda_max == pytest.approx(lam, rel=5e-3)
    # The batch may be a mini-batch, where momentum helps no more; the second time it is known not to be.
    assert training.rates() == [pytest.approx(2 / lam, rel=5e-3)]
    training.step()
    assert training.rates() == [pytest.approx(38 / training.watch.last.lambda_max)]
    assert training.optimizer.param_groups[0]["lr"] == 1e-3


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
    x, y = noise(10, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-10)
    controller = CatapultLR(optimizer, model=model, criterion=None)
    model(x, y).backward()
    exact = copy.deepcopy(model).double()
    names, shapes = zip(*[(n, p.shape) for n, p in exact.named_parameters()], strict=True)

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([s.numel() for s in shapes])
        given = {n: part.view(s) for n, part, s in zip(names, parts, shapes, strict=True)}
        return torch.func.functional_call(exact, given, (x.double(), y.double()))

    hessian = torch.autograd.functional.hessian(loss, torch.nn.utils.parameters_to_vector(exact.parameters()).detach())
    roots = (torch.cat([p.grad.flatten() for p in model.parameters()]).double().abs() + 1e-10).rsqrt()
    expected = float(torch.linalg.eigvalsh(roots[:, None] * hessian * roots)[-1])
    optimizer.step()
    assert controller.last.lambda_max == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    "kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad]
)
def test_trains_and_gives_lr_back(kind: type[torch.optim.Optimizer], tmp_path: Path) -> None:
    log = tmp_path / "run.jsonl"
    training = train(lambda params: kind(params, lr=0.01), policy=QUICK, log=log)  # type: ignore[call-arg]
    losses = training.steps(80)
    training.watch.detach()
    assert min(losses) < losses[0]
    assert training.optimizer.param_groups[0]["lr"] == 0.01
    rates = read_log(log).column("effective_lr")
    assert all(0 < r < float("inf") for r in rates)
    assert training.rates() == [rates[-1]]


# The rate stays where it begins, and no spike is seen.
STEADY = CatapultPolicy(start=1.0, near=1.0, creep=1e-9, rise=1e9)


@pytest.mark.parametrize("tensor", [False, True])
def test_a_scheduler_on_top_scales_the_rate(tensor: bool) -> None:
    """Halved after the first step: the rate decided stays, so the rate applied halves too; groups keep proportions."""
    lr: Any = torch.tensor(0.1) if tensor else 0.1
    model = net(5, 16, 1, activation=nn.ReLU)
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": lr / 4}]
    training = Training("CatapultLR", model, noise(12, 5), params=groups, base=sgd(lr), policy=STEADY)
    scheduler = torch.optim.lr_scheduler.StepLR(training.optimizer, 1, gamma=0.5)
    seen = []
    for _ in range(3):
        training.step()
        seen.append(training.rates())
        scheduler.step()
    assert seen[1][0] <= seen[0][0] / 2 * (1 + 1e-6)
    assert all(b == pytest.approx(a / 4) for a, b in seen)
    assert [float(g["lr"]) for g in training.optimizer.param_groups] == pytest.approx([0.1 / 8, 0.1 / 32])
    assert isinstance(training.optimizer.param_groups[0]["lr"], Tensor) == tensor


def test_a_nan_loss_is_undone_and_leaves_the_averages_of_adam() -> None:
    training = train(adam(0.01))
    training.steps(3)
    optimizer = training.optimizer
    with training.watch.averaged():
        average = training.weights()
    squares = [s["exp_avg_sq"].clone() for s in optimizer.state.values()]
    training.step(training.x, training.y * float("nan"))
    assert torch.equal(training.weights(), average)
    assert all(torch.equal(s["exp_avg_sq"], q) for s, q in zip(optimizer.state.values(), squares, strict=True))
    assert not any(s["exp_avg"].any() for s in optimizer.state.values())
    assert all(p.grad is not None for p in training.model.parameters())
    training.step()
    assert training.finite()


@pytest.mark.parametrize("cut", [1, 7, 23, 40])
def test_resume_is_the_run_it_would_have_been(cut: int) -> None:
    whole, resumed = (train(adam(0.01), policy=QUICK) for _ in range(2))
    whole.steps(cut)
    resumed.load(copy.deepcopy(whole.checkpoint()))
    assert resumed.steps(60 - cut) == whole.steps(60 - cut)
    assert torch.equal(whole.weights(), resumed.weights())
    assert whole.watch.catapults == resumed.watch.catapults


def test_closures() -> None:
    one, other = (train(sgd(0.1), policy=QUICK) for _ in range(2))
    assert one.steps(30) == other.steps(30, closure=True)
    assert torch.equal(one.weights(), other.weights())


def test_refusals_change_nothing() -> None:
    model, criterion = net(5, 16, 1), nn.MSELoss()
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
    one, other = train(sgd(0.1)), train(sgd(0.1), "")
    one.watch.detach()
    assert one.steps(3) == other.steps(3)
    assert torch.equal(one.weights(), other.weights())
