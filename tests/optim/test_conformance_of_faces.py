"""Promise: under a controller or a monitor an optimizer keeps the contract that PyTorch tests its own optimizers for.

`test_conformance.py` is about ``CatapultSGD`` without a model. Here a model is there: the settings and schedulers are
those of PyTorch's optimizer database (private, so for tests only), the checks those of its ``test_optim.py`` that have
a meaning where the rate is the controller's. Left out: fused, capturable, differentiable and maximize, all refused.
"""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop
from training import DRIVING, FACES, QUICK, Training, net, noise

from catapult_opt import CatapultPolicy

pytest.importorskip("expecttest")
database = pytest.importorskip("torch.testing._internal.common_optimizers")

REFUSED = {"fused", "capturable", "differentiable", "maximize"}
BASES: tuple[type[Optimizer], ...] = (SGD, Adam, AdamW, RMSprop, Adagrad)


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


def problem(
    kind: type[Optimizer] = SGD, face: str = "", groups: bool = False, policy: Any = QUICK, **kwargs: Any
) -> Training:
    """Least squares of a small net on four samples. `kwargs` are the optimizer's."""
    model = net(5, 8, 2)
    params: Any = list(model.parameters())
    if groups:
        lr = kwargs.pop("lr", 0.1)
        params = [{"params": params[:2], "lr": lr}, {"params": params[2:], "lr": lr / 2}]
    more = {"policy": policy} if face in DRIVING else {}
    if face == "CatapultSGD":
        return Training(face, model, noise(4, 5, 2), params=params, **more, **kwargs)
    return Training(face, model, noise(4, 5, 2), params=params, base=lambda params: kind(params, **kwargs), **more)


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
    alone, watched = problem(kind, **settings(kind)[i]), problem(kind, "CatapultMonitor", **settings(kind)[i])
    for closure in (False, True):
        assert alone.steps(2, closure=closure) == watched.steps(2, closure=closure)
    assert watched.watch.measured_steps == 4
    assert torch.equal(alone.weights(), watched.weights())
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


def controlled(face: str, case: tuple[type[Optimizer], int], **more: Any) -> Training:
    """`lr` is 1 for CatapultSGD, a multiplier; where the database means it to be tiny or a tensor, so it stays."""
    kind, i = case
    kwargs = settings(kind)[i]
    if face == "CatapultSGD":
        kwargs["lr"] = torch.tensor(1.0) if isinstance(kwargs.get("lr"), Tensor) else 1.0
    return problem(kind, face, **{**kwargs, **more})


@every_controlled
def test_goes_the_right_way_and_gives_lr_back(face: str, case: tuple[type[Optimizer], int]) -> None:
    training = controlled(face, case, policy=CatapultPolicy(total_steps=60))
    lrs = [copy.deepcopy(group["lr"]) for group in training.optimizer.param_groups]
    losses = training.steps(60)
    assert losses[-1] < losses[0]
    assert [group["lr"] for group in training.optimizer.param_groups] == lrs
    assert type(training.optimizer.param_groups[0]["lr"]) is type(lrs[0])


@every_controlled
def test_closures_are_the_plain_loop(face: str, case: tuple[type[Optimizer], int]) -> None:
    loop, closures = controlled(face, case), controlled(face, case)
    assert loop.steps(8) == closures.steps(8, closure=True)
    assert torch.equal(loop.weights(), closures.weights())


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
    assert torch.equal(other.weights(), whole.weights())
    assert same(other.checkpoint(), whole.checkpoint())


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{len(s)}-schedulers")
@pytest.mark.parametrize(("face", "groups"), [("CatapultSGD", True), ("CatapultLR", False)])
def test_schedulers_of_the_database_on_top(schedule: Any, groups: bool, face: str) -> None:
    """They multiply what the controller finds; `effective_lr` says what came out; the loss goes down."""
    training = problem(SGD, face, groups, lr=1.0, policy=CatapultPolicy(total_steps=40))
    schedulers = [make(training.optimizer) for make in schedule]
    losses = training.steps(40, schedulers=schedulers)
    assert losses[-1] < losses[0]
    first = training.optimizer.param_groups[0]
    assert first["effective_lr"] >= 0  # one of them ends at 0
    if groups:
        second = training.optimizer.param_groups[1]
        assert second["effective_lr"] == pytest.approx(first["effective_lr"] / 2)


@every_base
def test_a_step_without_anything_done_is_refused_and_changes_nothing(kind: type[Optimizer]) -> None:
    training = problem(kind, "CatapultLR", lr=0.1)
    training.steps(2)
    before, state = training.weights(), copy.deepcopy(training.checkpoint())
    training.optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="no forward pass of model"):
        training.optimizer.step()
    assert torch.equal(training.weights(), before)
    assert same(training.checkpoint(), state)
    assert training.optimizer.param_groups[0]["lr"] == 0.1
    training.steps(1)


@every_base
@pytest.mark.parametrize("face", ["CatapultLR", "CatapultMonitor"])
def test_a_closure_that_fails_leaves_lr_and_the_next_step_alone(kind: type[Optimizer], face: str) -> None:
    training, clean = problem(kind, face, lr=0.1), problem(kind, face, lr=0.1)
    training.steps(2), clean.steps(2)

    def failing() -> Tensor:
        training.backward()
        raise KeyError("the user's")

    with pytest.raises(KeyError, match="the user's"):
        training.optimizer.step(failing)
    assert training.optimizer.param_groups[0]["lr"] == 0.1
    training.steps(3), clean.steps(3)
    assert torch.equal(training.weights(), clean.weights())


@every_base
@pytest.mark.parametrize("face", ["CatapultLR", "CatapultMonitor"])
def test_hooks_of_the_user_run_once_and_in_order(kind: type[Optimizer], face: str) -> None:
    training, order = problem(kind, face, lr=0.1), []
    training.optimizer.register_step_pre_hook(lambda *_: order.append("pre"))
    training.optimizer.register_step_post_hook(lambda *_: order.append("post"))
    training.steps(2)
    training.steps(1, closure=True)
    assert order == ["pre", "post"] * 3


@every_base
@pytest.mark.parametrize("face", ["CatapultLR", "CatapultMonitor"])
def test_detached_it_is_the_optimizer_alone(kind: type[Optimizer], face: str) -> None:
    alone, beside = problem(kind, lr=0.01), problem(kind, face, lr=0.01)
    beside.watch.detach()
    assert alone.steps(3) == beside.steps(3)
    assert torch.equal(alone.weights(), beside.weights())
    assert not beside.optimizer._optimizer_step_pre_hooks
    assert not beside.optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("face", FACES)
def test_a_group_added_in_mid_training_is_trained(face: str) -> None:
    """Unfreezing: the last layer joins with half the rate of the first."""
    quick = QUICK
    training = problem(SGD, face, groups=True, lr=1.0 if face == "CatapultSGD" else 0.01, policy=quick)
    late = training.optimizer.param_groups.pop()
    for p in late["params"]:
        p.requires_grad_(False)
        training.optimizer.state.pop(p, None)
    training.steps(3)
    before = training.model[2].weight.detach().clone()
    for p in late["params"]:
        p.requires_grad_(True)
    training.optimizer.add_param_group({"params": late["params"], "lr": late["lr"]})
    losses = training.steps(5)
    assert not torch.equal(training.model[2].weight, before)
    assert bool(training.weights().isfinite().all())
    assert all(loss > 0 for loss in losses)
    if face != "CatapultMonitor":
        first, second = (group["effective_lr"] for group in training.optimizer.param_groups)
        assert second == pytest.approx(first / 2)


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("foreach", [True, False])
def test_foreach_is_the_forloop(face: str, foreach: bool) -> None:
    fast, slow = (problem(SGD, face, lr=1.0, momentum=0.5, foreach=f) for f in (foreach, None))
    torch.testing.assert_close(torch.tensor(fast.steps(6)), torch.tensor(slow.steps(6)))
    torch.testing.assert_close(fast.weights(), slow.weights())


@pytest.mark.parametrize("face", FACES)
def test_names_of_parameters_are_kept(face: str) -> None:
    model = nn.Linear(3, 2)
    base = None if face == "CatapultSGD" else lambda params: SGD(params, lr=0.1)
    training = Training(face, model, noise(4, 3, 2), params=list(model.named_parameters()), base=base)
    training.step()
    assert training.optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
