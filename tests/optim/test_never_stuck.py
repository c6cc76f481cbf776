"""Promise: a training goes on learning through ordinary trouble, and never takes back what its user did.

Oracle: the same training without the trouble; the weights that the user put in; the rate before.
"""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training import DRIVING, Training, net, product

from catapult_opt import CatapultPolicy, CatapultSGD, MeasurementWarning

every_driver = pytest.mark.parametrize("face", DRIVING)
SGD = {"base": lambda params: torch.optim.SGD(params, lr=1.0)}


def training_of(face: str, batches: int = 8, criterion: Any = None, model: Any = None, **more: Any) -> Training:
    x, y = product(160)
    data = list(zip(x.chunk(batches), y.chunk(batches), strict=True))
    base = SGD if face == "CatapultLR" else {}
    return Training(face, model or net(6, 16, 1), data, criterion=criterion, **base, **more)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@every_driver
@pytest.mark.parametrize("every", [20, 7])
def test_after_batches_of_nan_the_rate_is_back_within_200_calm_steps(face: str, every: int) -> None:
    training, calm = training_of(face), training_of(face)
    for i in range(200):
        x, y = training.batch
        training.step(x * math.nan if i % every == every - 1 else x, y)
        calm.step()
    assert training.finite()
    for _ in range(200):
        training.step()
        calm.step()
    assert training.rates()[0] > calm.rates()[0] / 3
    losses = [sum(run.step() for _ in range(8)) for run in (training, calm)]
    assert losses[0] < 0.7 * 8 and losses[0] < 5 * losses[1] + 0.5


@every_driver
def test_one_spoiled_batch_below_the_edge_does_not_lower_the_rate(face: str) -> None:
    """The loss is not finite, the weights were fine: the batch is to blame."""
    training = training_of(face)
    for _ in range(60):
        training.step()
    before = training.rates()[0]
    training.step(training.x * math.nan, training.y)
    training.step()
    assert training.watch.phase == "calm"
    assert training.rates()[0] == pytest.approx(before, rel=0.1)


@every_driver
@pytest.mark.parametrize("loss", ["high", "fine"])
@pytest.mark.parametrize("batches", [1, 8])
def test_weights_that_the_user_loads_are_never_taken_back(face: str, loss: str, batches: int) -> None:
    """A best checkpoint or a new head: neither a high loss nor a spoiled batch brings back those from before."""
    training = training_of(face, batches=batches)
    for _ in range(80):
        training.step()
    before = weights(training.model)
    other = copy.deepcopy(training.model.state_dict())
    for name, t in net(6, 16, 1, seed=5).state_dict().items():
        other[name] = 4 * t if loss == "high" else t
    training.model.load_state_dict(other)
    loaded = weights(training.model)
    for spoiled in (False, False, True, False):
        x, y = training.batch
        training.step(x * math.nan if spoiled else x, y)
        now = weights(training.model)
        assert (now - loaded).norm() < (now - before).norm() / 2
    assert training.finite()


@every_driver
def test_loading_a_checkpoint_is_no_change_of_weights_by_the_user(face: str) -> None:
    """In either order, the run goes on to the bit, and with its average."""
    run = training_of(face)
    for _ in range(30):
        run.step()
    saved = copy.deepcopy((run.model.state_dict(), run.checkpoint()))
    for model_first in (True, False):
        new = training_of(face, model=net(6, 16, 1, seed=3))
        new.step()
        if model_first:
            new.model.load_state_dict(saved[0])
        new.load(copy.deepcopy(saved[1]))
        if not model_first:
            new.model.load_state_dict(saved[0])
        new.done = run.done
        with run.watch.averaged(), new.watch.averaged():
            assert torch.equal(weights(run.model), weights(new.model))
        other = training_of(face, model=net(6, 16, 1, seed=4))
        other.load(copy.deepcopy(saved[1]))
        other.model.load_state_dict(saved[0])
        other.done = new.done
        assert [new.step() for _ in range(5)] == [other.step() for _ in range(5)]
        with other.watch.averaged(), new.watch.averaged():
            assert torch.equal(weights(other.model), weights(new.model))


class Shifted(nn.Module):
    """factor * mse + constant: the same training problem."""

    def __init__(self, constant: float = 0.0, factor: float = 1.0) -> None:
        super().__init__()
        self.constant, self.factor = constant, factor

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.factor * nn.functional.mse_loss(outputs, targets) + self.constant


@pytest.mark.parametrize("constant", [1000.0, -0.4, -5.0])
def test_a_constant_added_to_the_loss_changes_nothing(constant: float) -> None:
    """In float64, where the constant does not take digits."""
    runs = []
    for c in (0.0, constant):
        x, y = product(160)
        run = Training("CatapultSGD", net(6, 16, 1).double(), (x.double(), y.double()), criterion=Shifted(c))
        runs.append([(run.step() - c, run.watch.phase, run.rates()[0]) for _ in range(120)])
    plain, shifted = runs
    assert [p for _, p, _ in plain[:60]] == [p for _, p, _ in shifted[:60]]
    assert [r for _, _, r in plain[:60]] == pytest.approx([r for _, _, r in shifted[:60]], rel=1e-3)


@pytest.mark.parametrize("factor", [1e-20, 1e-6, 1e6, 1e20])
def test_a_factor_on_the_loss_scales_the_rate_alone(factor: float) -> None:
    x, y = product(160)
    found = []
    for f in (1.0, factor):
        model = net(6, 16, 1).double()
        run = Training("CatapultSGD", model, (x.double(), y.double()), criterion=Shifted(factor=f))
        found.append([(run.step() / f, f * run.rates()[0]) for _ in range(40)])
    for (loss, rate), (scaled_loss, scaled_rate) in zip(*found, strict=True):
        assert scaled_loss == pytest.approx(loss, rel=1e-2)
        assert scaled_rate == pytest.approx(rate, rel=1e-2)


@every_driver
@pytest.mark.parametrize("wrong", [1e4, 1e-4, 10.0, 0.1])
def test_one_wrong_measurement_does_no_harm(face: str, wrong: float, monkeypatch: pytest.MonkeyPatch) -> None:
    training = training_of(face, every=5)
    update = training.watch._controller._machine.update
    measured = []

    def once_wrong(**seen: Any) -> Any:
        if seen["eta_crit"] is not None:
            measured.append(1)
            seen["eta_crit"] *= wrong if len(measured) == 20 else 1.0
        return update(**seen)

    monkeypatch.setattr(training.watch._controller._machine, "update", once_wrong)
    x, y = product(160)
    first = nn.functional.mse_loss(training.model(x), y).item()
    for _ in range(300):
        training.step()
    assert len(measured) > 20 and training.finite()
    with training.watch.averaged(), torch.no_grad():
        assert nn.functional.mse_loss(training.model(x), y).item() < 0.5 * first


def test_a_first_batch_without_curvature_is_a_small_step() -> None:
    """Inputs and targets of zero: once a warning, and the training goes on when there is something to learn."""
    training = training_of(
        "CatapultSGD",
        batches=1,
        model=nn.Sequential(nn.Linear(6, 16, bias=False), nn.Tanh(), nn.Linear(16, 1, bias=False)),
    )
    before = weights(training.model)
    x, y = training.batch
    with pytest.warns(MeasurementWarning, match="no positive curvature") as caught:
        training.step(0 * x, 0 * y)
    training.step(0 * x, 0 * y)
    assert len(caught) == 1 and torch.equal(weights(training.model), before)
    losses = [training.step() for _ in range(400)]
    assert min(losses) < 0.5 * losses[0]


@every_driver
def test_a_policy_changed_on_resume_is_in_force(face: str) -> None:
    run = training_of(face, batches=1)
    for _ in range(60):
        run.step()
    resumed = training_of(face, batches=1, policy=CatapultPolicy(catapults=False))
    resumed.model.load_state_dict(run.model.state_dict())
    resumed.load(copy.deepcopy(run.checkpoint()))
    before = resumed.watch.super_critical_steps
    for _ in range(300):
        resumed.step()
    assert resumed.watch.super_critical_steps <= before + 1
    assert resumed.watch.phase == "calm"


def test_fine_tuning_with_few_samples_whose_losses_differ_by_decades_goes_on_learning() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 6)
    y = (x[:, 0] > 0).long()
    model, criterion = net(6, 32, 2), nn.CrossEntropyLoss()
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(300):
        adam.zero_grad()
        criterion(model(x), y).backward()
        adam.step()
    y = ((x[:, 0] + 0.5 * x[:, 1]) > 0).long()  # the task changes a little
    before = criterion(model(x), y).item()
    optimizer = CatapultSGD(model.parameters(), model=model, criterion=criterion)
    for i in range(1200):
        rows = torch.arange(4 * i, 4 * i + 4) % 256
        optimizer.zero_grad()
        criterion(model(x[rows]), y[rows]).backward()
        optimizer.step()
    with optimizer.averaged(), torch.no_grad():
        assert criterion(model(x), y).item() < 0.5 * before


def test_a_rate_held_down_for_long_is_told_once() -> None:
    training = training_of("CatapultSGD", batches=1)
    for _ in range(20):
        training.step()
    x, y = training.batch
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(1500):  # the targets change sign every other step: no rate is right
            training.step(x, y if i % 2 else -50 * y)
    told = [w for w in caught if "of the critical one" in str(w.message)]
    assert len(told) <= 1
    assert training.finite()


@every_driver
def test_a_training_that_diverges_is_brought_back(face: str) -> None:
    """At a rate that doubles every step, and a height of spikes that allows all of it."""
    policy = CatapultPolicy(start=1.0, near=1.0, creep=1.0, height=1e3)
    training = training_of(face, batches=1, policy=policy)
    losses = [training.step() for _ in range(300)]
    assert max(losses) > 1e3 * losses[0], "it diverged"
    assert training.finite() and min(losses[-20:]) < losses[0]


@every_driver
def test_inputs_that_grow_in_the_middle_bring_the_rate_down(face: str) -> None:
    """Four times as large, they make the curvature sixteen times as high."""
    training = training_of(face, batches=1, model=nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 1)))
    x, y = training.batch
    for _ in range(60):
        training.step()
    before = training.rates()[0]
    losses = [training.step(4 * x, y) for _ in range(300)]
    assert training.finite() and min(losses[-50:]) < losses[0]
    assert training.rates()[0] < before
