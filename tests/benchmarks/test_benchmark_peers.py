"""The generalization benchmark's peers, tasks and what is evaluated: each against a closed form or an explicit loop."""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from contenders import CONTENDERS  # noqa: E402
from drivers import CDAT, Catapult, Driver, GeN, Setup, own_statistics  # noqa: E402
from protocol import Run, train  # noqa: E402
from tasks import TASKS, Problem, Split, Task, criterion, draw, sine  # noqa: E402

sys.path.remove(str(BENCHMARKS))

GPT_TASK = dataclasses.replace(TASKS["gpt"], train=40, val=10, test=10, steps=8)


class Signed(nn.Module):
    """A mean squared error, or minus one: a quadratic with the Hessian 2 / n X^T X, or minus that."""

    def __init__(self, sign: float) -> None:
        super().__init__()
        self.sign = sign

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.sign * (outputs - targets).square().mean()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_cdat_takes_the_closed_form_step_of_a_quadratic(sign: float) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(7, 3, dtype=torch.float64), torch.randn(7, 1, dtype=torch.float64)
    model, loss_of = nn.Linear(3, 1, bias=False, dtype=torch.float64), Signed(sign)
    hessian, start = sign * 2 / 7 * x.T @ x, model.weight.detach()[0].clone()
    gradient = sign * 2 / 7 * x.T @ (x @ start - y[:, 0])
    driver = CDAT(Setup(model, loss_of, 1), sigma=2.0)
    loss = loss_of(model(x), y)
    loss.backward()
    driver.step(loss.item(), x, y)
    rate = 2 * (gradient @ gradient / (gradient @ hessian @ gradient).abs()).item()
    assert driver.rate == pytest.approx(rate, rel=1e-12)
    torch.testing.assert_close(model.weight.detach()[0], start - rate * gradient)
    if sign > 0:  # to the point across the valley, where the loss is what it was
        assert loss_of(model(x), y).item() == pytest.approx(loss.item(), rel=1e-12)


def test_cdat_at_sigma_one_goes_to_the_lowest_point_along_the_gradient() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, 1, dtype=torch.float64)
    model, loss_of = nn.Linear(4, 1, dtype=torch.float64), nn.MSELoss()
    loss = loss_of(model(x), y)
    loss.backward()
    before = [p.grad.clone() for p in model.parameters()]
    CDAT(Setup(model, loss_of, 1), sigma=1.0).step(loss.item(), x, y)
    model.zero_grad()
    loss_of(model(x), y).backward()
    along = sum((p.grad * g).sum() for p, g in zip(model.parameters(), before, strict=True))
    assert float(along) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", ["resnet", "gpt"])
def test_cdat_measures_the_model_that_trains_and_changes_nothing_else(name: str) -> None:
    """BatchNorm by the batch, attention with second derivatives: its curvature is that of explicit differences."""
    if name == "gpt":
        problem = draw(GPT_TASK, None, 0)
    else:
        task = dataclasses.replace(TASKS["resnet"], width=2, train=16, val=4, test=4, batch=8)
        problem = Problem(task, *(_pictures(n) for n in (16, 4, 4)))
    torch.manual_seed(0)
    model, loss_of = problem.build().double(), criterion(problem.task)
    x, y = problem.train.inputs[:8], problem.train.targets[:8]
    x = x if name == "gpt" else x.double()
    loss_of(model(x), y).backward()
    gradient = [p.grad.clone() for p in model.parameters()]
    buffers = copy.deepcopy(dict(model.named_buffers()))
    driver = CDAT(Setup(model, loss_of, 1), sigma=2.0)
    found = driver._curvature(dict(model.named_parameters()), gradient, x, y)
    for key, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[key])

    def slope(t: float) -> float:
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for p, g in zip(moved.parameters(), gradient, strict=True):
                p.add_(g, alpha=t)
        moved.zero_grad()
        loss_of(moved(x), y).backward()
        return sum(float((p.grad * g).sum()) for p, g in zip(moved.parameters(), gradient, strict=True))

    t = 1e-6 / math.sqrt(sum(float(g.square().sum()) for g in gradient))
    assert found == pytest.approx((slope(t) - slope(-t)) / (2 * t), rel=1e-3)


def _pictures(n: int) -> Split:
    return Split(torch.randn(n, 3, 16, 16), torch.randint(2, (n,)))


def test_gen_fits_on_every_fourth_step_and_raises_a_rate_far_too_low_by_a_tenth() -> None:
    """lr_parabola moves at most to twice the rate, and nine tenths of the old rate stay."""
    pytest.importorskip("GeN")
    torch.manual_seed(0)
    x, y = torch.randn(50, 3, dtype=torch.float64), torch.randn(50, 1, dtype=torch.float64)
    model, loss_of = nn.Linear(3, 1, dtype=torch.float64), nn.MSELoss()
    driver = GeN(Setup(model, loss_of, 9, batches=iter([(x, y)] * 9)), every=4)
    rates = []
    for _ in range(9):
        driver.optimizer.zero_grad()
        loss = loss_of(model(x), y)
        loss.backward()
        driver.step(loss.item(), x, y)
        rates.append(driver.rate)
    assert rates == pytest.approx([1e-4] * 3 + [1.1e-4] * 4 + [1.21e-4] * 2)


@pytest.mark.parametrize("name", [n for n, c in CONTENDERS.items() if c.kind == "untuned"])
def test_every_peer_learns_and_repeats_itself(name: str) -> None:
    if CONTENDERS[name].missing():
        pytest.skip(CONTENDERS[name].missing())
    task = dataclasses.replace(TASKS["rank2"], name="tiny", width=16, train=40, d=5, steps=60, val=40, test=40)
    first, again = (train(Run(task, name, 60), None) for _ in range(2))
    assert first["evaluations"][-1]["val"] == again["evaluations"][-1]["val"]
    assert first["best"]["val"] < first["evaluations"][0]["val"]


def test_untuned_rows_are_what_people_type() -> None:
    model = nn.Linear(2, 1)
    adamw = CONTENDERS["adamw-1e-3"].build(Setup(model, nn.MSELoss(), 10)).optimizer
    assert type(adamw) is torch.optim.AdamW and adamw.defaults["lr"] == 1e-3
    driver = CONTENDERS["sgd-1e-2"].build(Setup(model, nn.MSELoss(), 10))
    assert driver.rate == 0.01 and driver.optimizer.defaults["momentum"] == 0.9
    loss = nn.MSELoss()(model(torch.ones(3, 2)), torch.ones(3, 1))
    loss.backward()
    for _ in range(5):
        driver.step(loss.item(), torch.ones(3, 2), torch.ones(3, 1))
    assert driver.rate == pytest.approx(0.005)  # half-way down the cosine


def test_statistics_of_averaged_weights_are_those_of_the_sample_and_then_as_before() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))
    model(torch.randn(8, 3))  # so that its statistics are not the initial ones
    before = copy.deepcopy(model.state_dict())
    parts = [torch.randn(5, 3), torch.randn(5, 3)]
    with own_statistics(model, parts):
        inside = [model[0](part).detach() for part in parts]
        expected = torch.stack([part.mean(0) for part in inside]).mean(0)
        torch.testing.assert_close(model[1].running_mean, expected)
        torch.testing.assert_close(model[1].running_var, torch.stack([part.var(0) for part in inside]).mean(0))
    assert model.training and model[1].momentum == 0.1
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_evaluation_uses_running_statistics_and_leaves_the_model_as_it_was() -> None:
    task = dataclasses.replace(TASKS["resnet"], width=2, train=16, val=6, test=6)
    problem = Problem(task, *(_pictures(n) for n in (16, 6, 6)))
    model = problem.build()
    assert sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in model.modules()) == 7  # and a linear layer
    before = copy.deepcopy(model.state_dict())
    found = problem.loss(model, problem.val)
    assert model.training
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    single = [nn.functional.cross_entropy(model.eval()(x[None]), y[None]).item() for x, y in _rows(problem.val)]
    assert found == pytest.approx(sum(single) / len(single), rel=1e-5)  # picture by picture: no batch is looked at


def _rows(split: Split) -> Any:
    return zip(split.inputs, split.targets, strict=True)


def test_catapult_is_evaluated_at_averaged_and_raw_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The record has both; the averaged ones are those that the controller's context puts in place."""
    from contextlib import contextmanager

    @contextmanager
    def zeros(controller: Any) -> Any:
        kept = [p.detach().clone() for p in controller.param_groups[0]["params"]]
        with torch.no_grad():
            for p in controller.param_groups[0]["params"]:
                p.zero_()
        yield
        with torch.no_grad():
            for p, value in zip(controller.param_groups[0]["params"], kept, strict=True):
                p.copy_(value)

    monkeypatch.setattr("drivers.averaged", zeros)
    task = dataclasses.replace(TASKS["rank2"], name="tiny", width=16, train=40, d=5, steps=12, val=40, test=40)
    record = train(Run(task, "catapult", 60), None)
    problem = draw(task, None, 60)
    of_zero = float(problem.test.targets.square().mean())
    assert Catapult.views == ("averaged", "raw")
    assert record["last"]["value"] == pytest.approx(of_zero, rel=1e-6)
    assert record["views"]["raw"]["last"]["value"] != pytest.approx(of_zero, rel=1e-3)
    assert Driver.views == ("weights",)
    assert train(Run(task, "sgd", 60, 0.01), None)["views"] == {}


def test_sine_targets_have_variance_one_and_its_egop_is_that_of_monte_carlo() -> None:
    (split, other), egop = sine((200_000, 10), 6, seed=0)
    x = split.inputs.double().requires_grad_()
    y = torch.sin(2 * x[:, 0]) + x[:, 1] * x[:, 2]
    scale = y.detach().std()
    torch.testing.assert_close(split.targets[:, 0].double(), y.detach() / scale, rtol=0.01, atol=0.01)
    (slopes,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(slopes.T @ slopes / len(x) / scale**2, egop.double(), rtol=0.03, atol=0.02)
    assert not torch.equal(other.inputs, split.inputs[:10])
    first, again, another = (sine((5,), 6, seed=seed)[0][0].inputs for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, another)


def test_text_is_pythons_and_no_window_is_in_two_splits() -> None:
    import string
    from pydoc_data.topics import topics

    problem = draw(GPT_TASK, None, 3)
    known = set(string.printable)
    text = "".join(c if c in known else "?" for c in "\n".join(topics[name] for name in sorted(topics)))
    seen: set[str] = set()
    for split in (problem.train, problem.val, problem.test):
        assert torch.equal(split.inputs[:, 1:], split.targets[:, :-1])  # the targets are the next characters
        for window, following in _rows(split):
            said = "".join(string.printable[i] for i in [*window.tolist(), following[-1].item()])
            place = text.index(said)
            while place % 33:  # a window starts at a multiple of its length; the same words may stand elsewhere, too
                place = text.index(said, place + 1)
            seen.add(f"{place}")
    assert len(seen) >= 59  # two windows may hold the same words


def test_gpt_sees_no_later_character() -> None:
    problem = draw(GPT_TASK, None, 3)
    torch.manual_seed(0)
    model = problem.build()
    x = problem.val.inputs[:2].clone()
    before = model(x)
    x[:, 20] = (x[:, 20] + 1) % 90
    after = model(x)
    torch.testing.assert_close(after[..., :20], before[..., :20])
    assert not torch.allclose(after[..., 20:], before[..., 20:])
    by_hand = nn.functional.cross_entropy(model(problem.test.inputs), problem.test.targets).item()
    assert problem.value(model) == pytest.approx(by_hand, rel=1e-5)


def test_base_of_a_task_is_what_the_controller_drives() -> None:
    model = nn.Linear(2, 1)
    adamw = CONTENDERS["catapult"].build(Setup(model, nn.MSELoss(), 10, base="adamw"))
    assert type(adamw.optimizer) is torch.optim.AdamW
    assert type(CONTENDERS["catapult"].build(Setup(model, nn.MSELoss(), 10)).optimizer).__name__ == "CatapultSGD"


def test_a_field_added_to_the_tasks_changes_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Run(TASKS["rank2"], "sgd", 60, 0.1).key

    @dataclasses.dataclass(frozen=True)
    class Wider(Task):
        more: int = 0

    told = {f.name: getattr(TASKS["rank2"], f.name) for f in dataclasses.fields(Task)}
    assert Run(Wider(**told), "sgd", 60, 0.1).key == plain
    assert Run(Wider(**told, more=1), "sgd", 60, 0.1).key != plain
