"""Promise: under a controller or a monitor an optimizer keeps the contract that PyTorch tests its own optimizers for.

`test_conformance.py` is about ``CatapultSGD`` without a model. Here a model is there: the settings and schedulers are
those of PyTorch's optimizer database (private, so for tests only), the checks those of its ``test_optim.py`` that have
a meaning where the rate is the controller's. Left out: fused, capturable, differentiable and maximize, all refused.
"""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import ReduceLROnPlateau

from catapult_opt import CatapultLR, CatapultMonitor, CatapultPolicy, CatapultSGD

pytest.importorskip("expecttest")
database = pytest.importorskip("torch.testing._internal.common_optimizers")

REFUSED = {"fused", "capturable", "differentiable", "maximize"}
BASES: tuple[type[Optimizer], ...] = (SGD, Adam, AdamW, RMSprop, Adagrad)
POLICY = CatapultPolicy(arm_steps=4, hot_steps=3, patience=12)


def settings(kind: type[Optimizer]) -> list[dict[str, Any]]:
    """Every setting of the database that a controller takes, each once; fresh ones, for schedulers write into a tensor
    lr."""
    info = next(info for info in database.optim_db if info.optim_cls is kind)
    found = [entry.kwargs for entry in info.optim_inputs_func(device="cpu")]
    return [kwargs for kwargs in found if not any(kwargs.get(name) for name in REFUSED)]


CASES = [(kind, i) for kind in BASES for i in range(len(settings(kind)))]
SCHEDULES = next(info for info in database.optim_db if info.optim_cls is SGD).scheduler_inputs


def label(case: Any) -> str | None:
    if not isinstance(case, tuple):
        return None
    kind, i = case
    chosen = {k: float(v) if isinstance(v, Tensor) else v for k, v in settings(kind)[i].items()}
    return f"{kind.__name__} " + ",".join(f"{k}={v}" for k, v in chosen.items())


every_case = pytest.mark.parametrize("case", CASES, ids=label)
every_base = pytest.mark.parametrize("kind", BASES, ids=lambda kind: kind.__name__)


class Problem:
    """Least squares of a small net on four samples, an optimizer, and what stands beside it."""

    def __init__(
        self, kind: type[Optimizer] = SGD, face: str = "", groups: bool = False, policy: Any = POLICY, **kwargs: Any
    ) -> None:
        generator = torch.Generator().manual_seed(3)
        self.model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))
        with torch.no_grad():
            for p in self.model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) / 3)
        self.criterion = nn.MSELoss()
        self.x, self.y = torch.randn(4, 5, generator=generator), torch.randn(4, 2, generator=generator)
        params: Any = self.model.parameters()
        if groups:
            lr = kwargs.pop("lr", 0.1)
            first, last = self.model[0].parameters(), self.model[2].parameters()
            params = [{"params": first, "lr": lr}, {"params": last, "lr": lr / 2}]
        whole = {"model": self.model, "criterion": self.criterion}
        self.face: Any = None
        if face == "CatapultSGD":
            self.optimizer: Optimizer = CatapultSGD(params, policy=policy, **whole, **kwargs)
        else:
            self.optimizer = kind(params, **kwargs)
        if face == "CatapultLR":
            self.face = CatapultLR(self.optimizer, policy=policy, **whole)
        elif face == "CatapultMonitor":
            self.face = CatapultMonitor(self.optimizer, **whole)

    def backward(self) -> Tensor:
        self.optimizer.zero_grad()
        loss: Tensor = self.criterion(self.model(self.x), self.y)
        loss.backward()
        return loss

    def steps(self, count: int, closure: bool = False, schedulers: Any = ()) -> list[float]:
        losses = []
        for _ in range(count):
            if closure:
                loss: Any = self.optimizer.step(functools.partial(self.backward))  # type: ignore[arg-type]
            else:
                loss = self.backward()
                self.optimizer.step()
            losses.append(float(loss.detach()))
            for scheduler in schedulers:
                scheduler.step(losses[-1]) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()
        return losses

    @property
    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])

    def checkpoint(self) -> dict[str, Any]:
        kept = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        if isinstance(self.face, CatapultLR):
            kept["face"] = self.face.state_dict()
        return kept

    def load(self, kept: dict[str, Any]) -> None:
        self.model.load_state_dict(kept["model"])
        self.optimizer.load_state_dict(kept["optimizer"])
        if isinstance(self.face, CatapultLR):
            self.face.load_state_dict(kept["face"])


def plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def same(a: Any, b: Any) -> bool:
    return bool(plain(a) == plain(b))


# ------------------------------------------------------------------------------------------------------------- monitor


@every_case
def test_an_optimizer_watched_is_the_optimizer(case: tuple[type[Optimizer], int]) -> None:
    """Oracle: the same optimizer alone, to the bit, state and all, in every setting of the database."""
    kind, i = case
    alone, watched = Problem(kind, **settings(kind)[i]), Problem(kind, "CatapultMonitor", **settings(kind)[i])
    for closure in (False, True):
        assert alone.steps(2, closure) == watched.steps(2, closure)
    assert watched.face.measured_steps == 4
    assert torch.equal(alone.weights, watched.weights)
    assert same(alone.optimizer.state_dict(), watched.optimizer.state_dict())


# --------------------------------------------------------------------------------------------------------- controllers


CONTROLLED = [("CatapultSGD", case) for case in CASES if case[0] is SGD] + [("CatapultLR", case) for case in CASES]


def rare(face: str, case: tuple[type[Optimizer], int]) -> Any:
    """All but the last settings of each optimizer, the fullest ones, are for the slow run."""
    kind, i = case
    return [pytest.mark.slow] if i < len(settings(kind)) - 1 else []


every_controlled = pytest.mark.parametrize(
    ("face", "case"), [pytest.param(*c, id=f"{c[0]} {label(c[1])}", marks=rare(*c)) for c in CONTROLLED]
)


def controlled(face: str, case: tuple[type[Optimizer], int], **more: Any) -> Problem:
    """`lr` is 1 for CatapultSGD, a multiplier; where the database means it to be tiny or a tensor, so it stays."""
    kind, i = case
    kwargs = settings(kind)[i]
    if face == "CatapultSGD":
        kwargs["lr"] = torch.tensor(1.0) if isinstance(kwargs.get("lr"), Tensor) else 1.0
    return Problem(kind, face, **{**kwargs, **more})


@every_controlled
def test_goes_the_right_way_and_gives_lr_back(face: str, case: tuple[type[Optimizer], int]) -> None:
    problem = controlled(face, case, policy=CatapultPolicy(total_steps=60))
    lrs = [copy.deepcopy(group["lr"]) for group in problem.optimizer.param_groups]
    losses = problem.steps(60)
    assert losses[-1] < losses[0]
    assert [group["lr"] for group in problem.optimizer.param_groups] == lrs
    assert type(problem.optimizer.param_groups[0]["lr"]) is type(lrs[0])


@every_controlled
def test_closures_are_the_plain_loop(face: str, case: tuple[type[Optimizer], int]) -> None:
    loop, closures = controlled(face, case), controlled(face, case)
    assert loop.steps(8) == closures.steps(8, closure=True)
    assert torch.equal(loop.weights, closures.weights)


@every_controlled
@pytest.mark.parametrize("way", ["deepcopy", "weights_only"])
def test_a_checkpoint_continues_to_the_bit(face: str, case: tuple[type[Optimizer], int], way: str) -> None:
    whole = controlled(face, case)
    whole.steps(7)
    kept = copy.deepcopy(whole.checkpoint())
    if way == "weights_only":
        file = io.BytesIO()
        torch.save(kept, file)
        file.seek(0)
        kept = torch.load(file, weights_only=True)
    other = controlled(face, case)
    other.steps(2)  # it has a life of its own before
    other.load(kept)
    assert same(other.checkpoint(), whole.checkpoint())
    assert other.steps(8) == whole.steps(8)
    assert torch.equal(other.weights, whole.weights)
    assert same(other.checkpoint(), whole.checkpoint())


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{len(s)}-schedulers")
@pytest.mark.parametrize(("face", "groups"), [("CatapultSGD", True), ("CatapultLR", False)])
def test_schedulers_of_the_database_on_top(schedule: Any, groups: bool, face: str) -> None:
    """They multiply what the controller finds; `effective_lr` says what came out; the loss goes down."""
    problem = Problem(SGD, face, groups, lr=1.0, policy=CatapultPolicy(total_steps=40))
    schedulers = [make(problem.optimizer) for make in schedule]
    losses = problem.steps(40, schedulers=schedulers)
    assert losses[-1] < losses[0]
    first = problem.optimizer.param_groups[0]
    assert first["effective_lr"] >= 0  # one of them ends at 0
    if groups:
        second = problem.optimizer.param_groups[1]
        assert second["effective_lr"] == pytest.approx(first["effective_lr"] / 2)


@every_base
def test_a_step_without_anything_done_is_refused_and_changes_nothing(kind: type[Optimizer]) -> None:
    problem = Problem(kind, "CatapultLR", lr=0.1)
    problem.steps(2)
    before, state = problem.weights, copy.deepcopy(problem.checkpoint())
    problem.optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="no forward pass of model"):
        problem.optimizer.step()
    assert torch.equal(problem.weights, before)
    assert same(problem.checkpoint(), state)
    assert problem.optimizer.param_groups[0]["lr"] == 0.1
    problem.steps(1)


@every_base
@pytest.mark.parametrize("face", ["CatapultLR", "CatapultMonitor"])
def test_a_closure_that_fails_leaves_lr_and_the_next_step_alone(kind: type[Optimizer], face: str) -> None:
    problem, clean = Problem(kind, face, lr=0.1), Problem(kind, face, lr=0.1)
    problem.steps(2), clean.steps(2)

    def failing() -> Tensor:
        problem.backward()
        raise KeyError("the user's")

    with pytest.raises(KeyError, match="the user's"):
        problem.optimizer.step(failing)
    assert problem.optimizer.param_groups[0]["lr"] == 0.1
    problem.steps(3), clean.steps(3)
    assert torch.equal(problem.weights, clean.weights)


@every_base
@pytest.mark.parametrize("face", ["CatapultLR", "CatapultMonitor"])
def test_hooks_of_the_user_run_once_and_in_order(kind: type[Optimizer], face: str) -> None:
    problem, order = Problem(kind, face, lr=0.1), []
    problem.optimizer.register_step_pre_hook(lambda *_: order.append("pre"))
    problem.optimizer.register_step_post_hook(lambda *_: order.append("post"))
    problem.steps(2)
    problem.steps(1, closure=True)
    assert order == ["pre", "post"] * 3


@every_base
@pytest.mark.parametrize("face", ["CatapultLR", "CatapultMonitor"])
def test_detached_it_is_the_optimizer_alone(kind: type[Optimizer], face: str) -> None:
    alone, beside = Problem(kind, lr=0.01), Problem(kind, face, lr=0.01)
    beside.face.detach()
    assert alone.steps(3) == beside.steps(3)
    assert torch.equal(alone.weights, beside.weights)
    assert not beside.optimizer._optimizer_step_pre_hooks
    assert not beside.optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("face", ["CatapultSGD", "CatapultLR", "CatapultMonitor"])
def test_a_group_added_in_mid_training_is_trained(face: str) -> None:
    """Unfreezing: the last layer joins with half the rate of the first."""
    quick = CatapultPolicy(arm_steps=1, hot_steps=1)  # measured every step
    problem = Problem(SGD, face, groups=True, lr=1.0 if face == "CatapultSGD" else 0.01, policy=quick)
    late = problem.optimizer.param_groups.pop()
    for p in late["params"]:
        p.requires_grad_(False)
        problem.optimizer.state.pop(p, None)
    problem.steps(3)
    before = problem.model[2].weight.detach().clone()
    for p in late["params"]:
        p.requires_grad_(True)
    problem.optimizer.add_param_group({"params": late["params"], "lr": late["lr"]})
    losses = problem.steps(5)
    assert not torch.equal(problem.model[2].weight, before)
    assert bool(problem.weights.isfinite().all())
    assert all(loss > 0 for loss in losses)
    if face != "CatapultMonitor":
        first, second = (group["effective_lr"] for group in problem.optimizer.param_groups)
        assert second == pytest.approx(first / 2)


@pytest.mark.parametrize("face", ["CatapultSGD", "CatapultLR", "CatapultMonitor"])
@pytest.mark.parametrize("foreach", [True, False])
def test_foreach_is_the_forloop(face: str, foreach: bool) -> None:
    fast, slow = (Problem(SGD, face, lr=1.0, momentum=0.5, foreach=f) for f in (foreach, None))
    torch.testing.assert_close(torch.tensor(fast.steps(6)), torch.tensor(slow.steps(6)))
    torch.testing.assert_close(fast.weights, slow.weights)


@pytest.mark.parametrize("face", ["CatapultSGD", "CatapultLR", "CatapultMonitor"])
def test_names_of_parameters_are_kept(face: str) -> None:
    model, criterion = nn.Linear(3, 2), nn.MSELoss()
    named: Any = list(model.named_parameters())
    make: dict[str, Callable[[], Optimizer]] = {
        "CatapultSGD": lambda: CatapultSGD(named, model=model, criterion=criterion),
        "CatapultLR": lambda: SGD(named, lr=0.1),
        "CatapultMonitor": lambda: SGD(named, lr=0.1),
    }
    optimizer = make[face]()
    if face != "CatapultSGD":
        {"CatapultLR": CatapultLR, "CatapultMonitor": CatapultMonitor}[face](
            optimizer, model=model, criterion=criterion
        )
    criterion(model(torch.ones(4, 3)), torch.zeros(4, 2)).backward()
    optimizer.step()
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
