"""Promise: what cannot work is refused before anything changed, by a message with the argument's name and its value.

One table a face: (what is passed, exception, what the message says). After each refusal the weights, the optimizer's
state, the hooks of model and criterion and the random state are what they were.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from catapult_opt import CatapultMonitor, CatapultPolicy, CatapultSGD, critical_lr

NAN, INF = float("nan"), float("inf")


class World:
    """Everything a user has in hand."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        self.criterion = nn.MSELoss()
        self.x, self.y = torch.randn(5, 3), torch.randn(5, 2)
        self.optimizer: Any = None

    def picture(self) -> bytes:
        modules = [*self.model.modules(), self.criterion]
        hooks = [(list(m._forward_hooks), list(m._forward_pre_hooks), list(m._backward_hooks)) for m in modules]
        optimizer = None
        if self.optimizer is not None:
            state = self.optimizer.state_dict()
            private = self.optimizer.__dict__
            hook_counts = [len(v) for k, v in private.items() if "_hooks" in k]
            optimizer = (plain(state), hook_counts, getattr(self.optimizer, "phase", None))
        weights = plain(self.model.state_dict())
        gradients = plain([p.grad for p in self.model.parameters()])
        return pickle.dumps((hooks, optimizer, weights, gradients, torch.get_rng_state().tolist()))


def plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to_dense().tolist()
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


@contextmanager
def refused(world: World, error: type[Exception], *texts: str) -> Iterator[None]:
    before = world.picture()
    with pytest.raises(error) as caught:
        yield
    for text in texts:
        assert text in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert world.picture() == before


class Identity(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


# (argument, value, exception, texts besides the argument's name)
Row = tuple[str, Any, type[Exception], tuple[str, ...]]

NUMBERS: list[Row] = [
    (name, value, error, (repr(value),))
    for name in ("lr", "momentum", "dampening", "weight_decay")
    for error, values in [(ValueError, (-0.1, NAN, INF, -INF)), (TypeError, ("0.1", None, [0.1], True, 1j))]
    for value in values
    if (name, value) != ("dampening", -0.1)
]
SETTINGS: list[Row] = [
    *NUMBERS,
    ("lr", torch.tensor([0.1, 0.2]), ValueError, ("1-element",)),
    ("lr", torch.tensor(NAN), ValueError, ("nan",)),
    ("lr", torch.tensor(-1.0), ValueError, ("-1",)),
    ("nesterov", True, ValueError, ("momentum=0.0",)),
    ("nesterov", "yes", TypeError, ("'yes'",)),
    ("maximize", 1, TypeError, ("1",)),
    ("differentiable", None, TypeError, ("None",)),
    ("foreach", "fast", TypeError, ("'fast'",)),
    ("fused", True, ValueError, ("True", "not supported", "foreach")),
    ("capturable", True, TypeError, ()),
    ("no_such_setting", 1, TypeError, ()),
]
CONTROLLER: list[Row] = [
    ("maximize", True, ValueError, ("model=None",)),
    ("differentiable", True, ValueError, ("model=None",)),
    ("policy", {"kappa": 3}, TypeError, ("CatapultPolicy", "{'kappa': 3}")),
    ("policy", CatapultPolicy, TypeError, ("CatapultPolicy",)),
]
SHARED: list[Row] = [  # of CatapultSGD and CatapultMonitor
    ("model", "net", TypeError, ("str",)),
    ("model", lambda x: x, TypeError, ("function",)),
    ("model", Identity(), ValueError, ("no parameter", "requires a gradient")),
    ("model", nn.Linear(3, 4), ValueError, ("params", "(4, 3)", "Linear")),
    ("criterion", 5, TypeError, ("5",)),
    ("criterion", "mse", TypeError, ("'mse'",)),
    ("every", 0, ValueError, ("0",)),
    ("every", -3, ValueError, ("-3",)),
    ("every", 1.5, ValueError, ("1.5",)),
    ("every", True, ValueError, ("True",)),
    ("every", "2", ValueError, ("'2'",)),
    ("outputs", lambda out: out, ValueError, ("criterion",)),
    ("outputs", 3, TypeError, ("3",)),
    ("log", 3, TypeError, ("3",)),
    ("engine", "fastest", ValueError, ("'fastest'",)),
    ("engine", None, ValueError, ("None",)),
    ("grad_scaler", 3, TypeError, ("GradScaler", "3")),
]


def name_of(row: Any) -> str | None:
    if isinstance(row, tuple) and row and isinstance(row[0], str):
        return f"{row[0]}={re.sub(r'0x[0-9a-f]+', '', repr(row[1]))[:30]}"
    return None


def table(rows: list[Row]) -> Any:
    return pytest.mark.parametrize("row", rows, ids=name_of)


@table(SETTINGS)
def test_settings_without_a_model(row: Row) -> None:
    name, value, error, texts = row
    world = World()
    with refused(world, error, name, *texts):
        CatapultSGD(world.model.parameters(), **{name: value})


@table([*SETTINGS, *CONTROLLER, *SHARED])
def test_settings_with_a_model(row: Row) -> None:
    name, value, error, texts = row
    world = World()
    arguments = {"model": world.model, "criterion": world.criterion, name: value}
    if name == "outputs" and error is TypeError:
        arguments["criterion"] = None
    with refused(world, error, name, *texts):
        CatapultSGD(world.model.parameters(), **arguments)


@table([*NUMBERS, ("nesterov", True, ValueError, ()), ("maximize", 1, TypeError, ())])
@pytest.mark.parametrize("where", ["constructor", "add_param_group"])
def test_settings_of_a_group(row: Row, where: str) -> None:
    """torch.optim.SGD checks its defaults only: a group's NaN would go into the weights."""
    name, value, error, texts = row
    world = World()
    first, *_, last = world.model.parameters()
    bad = {"params": [last], name: value}
    if where == "constructor":
        with refused(world, error, name, *texts):
            CatapultSGD([{"params": [first]}, bad], model=world.model, criterion=world.criterion)
    else:
        world.optimizer = CatapultSGD([first], model=world.model, criterion=world.criterion)
        with refused(world, error, name, *texts):
            world.optimizer.add_param_group(bad)


def test_a_foreign_parameter_in_a_group_added_later() -> None:
    world = World()
    world.optimizer = CatapultSGD(world.model.parameters(), model=world.model, criterion=world.criterion)
    with refused(world, ValueError, "params", "(7,)", "Sequential"):
        world.optimizer.add_param_group({"params": [torch.ones(7, requires_grad=True)]})


@pytest.mark.parametrize("name", ["criterion", "policy", "log", "outputs", "grad_scaler"])
def test_controller_settings_without_a_model(name: str) -> None:
    values = {
        "criterion": nn.MSELoss(),
        "policy": CatapultPolicy(),
        "log": "run.jsonl",
        "outputs": lambda out: out,
        "grad_scaler": torch.amp.GradScaler("cpu"),
    }
    world = World()
    with refused(world, ValueError, name, "model"):
        CatapultSGD(world.model.parameters(), **{name: values[name]})
    assert not Path("run.jsonl").exists()


def test_no_trainable_parameter_in_model_or_params() -> None:
    world = World()
    params = list(world.model.parameters())
    world.model.requires_grad_(False)
    with refused(world, ValueError, "model", "no parameter that requires a gradient"):
        CatapultSGD(params, model=world.model, criterion=world.criterion)
    world.model[0].requires_grad_(True)
    with refused(world, ValueError, "params", "requires a gradient"):
        CatapultSGD(world.model[2].parameters(), model=world.model, criterion=world.criterion)


@table([*SHARED, *CONTROLLER[2:], ("capturable", True, TypeError, ())])
def test_attach_keeps_the_old_connection(row: Row) -> None:
    name, value, error, texts = row
    world = World()
    world.optimizer = CatapultSGD(world.model.parameters(), model=world.model, criterion=world.criterion)
    step(world)
    arguments = {"model": world.model, "criterion": world.criterion, name: value}
    if name == "outputs" and error is TypeError:
        arguments["criterion"] = None
    with refused(world, error, name, *texts):
        world.optimizer.attach(**arguments)
    step(world)


@table(SHARED)
def test_monitor(row: Row) -> None:
    name, value, error, texts = row
    world = World()
    world.optimizer = torch.optim.SGD(world.model.parameters(), lr=0.1)
    arguments = {"model": world.model, "criterion": world.criterion, name: value}
    if name == "outputs" and error is TypeError:
        arguments["criterion"] = None
    with refused(world, error, name, *texts):
        CatapultMonitor(world.optimizer, **arguments)


@pytest.mark.parametrize("optimizer", ["sgd", None, torch.optim.Rprop, torch.optim.LBFGS], ids=str)
def test_monitor_of_something_else(optimizer: Any) -> None:
    world = World()
    if isinstance(optimizer, type):
        world.optimizer = optimizer = optimizer(world.model.parameters())
    with refused(world, TypeError, "optimizer must be", type(optimizer).__name__):
        CatapultMonitor(optimizer, model=world.model, criterion=world.criterion)


POLICY: list[Row] = [
    *((name, v, ValueError, (repr(v),)) for name in ("kappa", "growth", "spike", "drop", "ceiling", "gain", "fatal")
      for v in (1.0, 0, -2.0, NAN, INF, "2", None)),
    *((name, v, ValueError, (repr(v),)) for name in ("cool", "settle", "ripe")
      for v in (0, -0.5, 1.5, NAN, INF, "1", None)),
    *((name, v, ValueError, (repr(v),))
      for name in ("fit_steps", "hot_steps", "arm_steps", "patience",
                   "measure_cooling", "measure_settled", "measure_following")
      for v in (0, -1, 2.5, NAN, "3", None, True)),
    *((name, v, ValueError, (repr(v),)) for name in ("total_steps", "smoothing") for v in (0, -1, 2.5, NAN, "3", True)),
    ("kapa", 2.0, TypeError, ()),
]  # fmt: skip


@table(POLICY)
def test_policy(row: Row) -> None:
    name, value, error, texts = row
    with refused(World(), error, name, *texts):
        CatapultPolicy(**{name: value})


def test_policy_is_frozen() -> None:
    with pytest.raises(AttributeError):
        CatapultPolicy().kappa = 3.0  # type: ignore[misc]


CRITICAL: list[Row] = [
    *(row for row in SHARED if row[0] in ("model", "criterion") and not isinstance(row[1], nn.Linear)),
    ("curvature", "fisher", ValueError, ("'fisher'",)),
    ("curvature", None, ValueError, ("None",)),
    ("criterion", nn.MSELoss(reduction="none"), ValueError, ("scalar", "(5, 2)", "reduction")),
    ("criterion", lambda out, y: 3.0, ValueError, ("scalar", "float")),
    ("criterion", lambda out, y: torch.zeros(()), ValueError, ("does not depend",)),
    ("criterion", None, ValueError, ("scalar loss",)),
    ("tol", NAN, ValueError, ("nan",)),
    ("tol", -1.0, ValueError, ("-1.0",)),
    ("tol", "small", TypeError, ("'small'",)),
    ("max_matvecs", 0, ValueError, ("0",)),
    ("max_matvecs", 2.5, ValueError, ("2.5",)),
    ("outputs", 3, TypeError, ("3",)),
    ("engine", "fastest", ValueError, ("'fastest'",)),
]


@table(CRITICAL)
def test_critical_lr(row: Row) -> None:
    name, value, error, texts = row
    world = World()
    arguments = {"model": world.model, "criterion": world.criterion, "inputs": world.x, "targets": world.y}
    with refused(world, error, name, *texts):
        critical_lr(**{**arguments, name: value})


# ------------------------------------------------------------------------------------------------------- refusing steps


def step(world: World) -> None:
    world.optimizer.zero_grad()
    world.criterion(world.model(world.x), world.y).backward()
    world.optimizer.step()


def nothing(world: World) -> None: ...


def under_no_grad(world: World) -> None:
    with torch.no_grad():
        world.criterion(world.model(world.x), world.y)


def another_module(world: World) -> None:
    inner = nn.Sequential(*world.model)
    world.criterion(inner(world.x), world.y).backward()


def no_criterion(world: World) -> None:
    nn.functional.mse_loss(world.model(world.x), world.y).backward()


def another_criterion(world: World) -> None:
    nn.MSELoss()(world.model(world.x), world.y).backward()


def no_backward(world: World) -> None:
    world.criterion(world.model(world.x), world.y)


def gradients_reset(world: World) -> None:
    world.criterion(world.model(world.x), world.y).backward()
    world.optimizer.zero_grad()


def forward_method(world: World) -> None:
    """Hooks do not run in model.forward(x)."""
    world.criterion(world.model.forward(world.x), world.y).backward()


FORGOTTEN: list[tuple[Callable[[World], None], tuple[str, ...]]] = [
    (nothing, ("no forward pass", "Sequential", "model=")),
    (under_no_grad, ("no forward pass", "no_grad")),
    (another_module, ("no forward pass", "call the very module passed as model=")),
    (forward_method, ("no forward pass", "Sequential")),
    (no_criterion, ("no call of MSELoss", "optimizer.criterion(...)")),
    (another_criterion, ("no call of MSELoss", "call the very criterion passed as criterion=")),
    (no_backward, ("no backward pass", "loss.backward()")),
    (gradients_reset, ("no backward pass",)),
]


@pytest.mark.parametrize(("forget", "texts"), FORGOTTEN, ids=lambda f: getattr(f, "__name__", ""))
@pytest.mark.parametrize("before", [0, 2])
def test_steps_without_a_captured_loss(forget: Callable[[World], None], texts: tuple[str, ...], before: int) -> None:
    world = World()
    world.optimizer = CatapultSGD(world.model.parameters(), model=world.model, criterion=world.criterion, momentum=0.9)
    for _ in range(before):
        step(world)
    world.optimizer.zero_grad()
    forget(world)
    with refused(world, RuntimeError, *texts):
        world.optimizer.step()
    step(world)  # and the right way works, right after


def test_a_function_called_directly() -> None:
    world = World()
    function = nn.functional.mse_loss
    world.optimizer = CatapultSGD(world.model.parameters(), model=world.model, criterion=function)
    function(world.model(world.x), world.y).backward()
    with refused(world, RuntimeError, "optimizer.criterion(...)", "LossModule"):
        world.optimizer.step()


def test_a_loss_of_something_else_than_the_model() -> None:
    world = World()
    other = nn.Linear(3, 2)
    world.optimizer = CatapultSGD(world.model.parameters(), model=world.model, criterion=world.criterion)
    world.model(world.x)
    world.criterion(other(world.x), world.y).backward()
    with refused(world, RuntimeError, "criterion", "does not come from the model"):
        world.optimizer.step()


def test_a_batch_changed_in_place_before_the_step() -> None:
    world = World()
    world.optimizer = CatapultSGD(world.model.parameters(), model=world.model, criterion=world.criterion)
    world.criterion(world.model(world.x), world.y).backward()
    world.x.mul_(2)
    with refused(world, RuntimeError, "modified in place", "copy"):
        world.optimizer.step()


def test_a_batch_with_a_nan_at_the_first_step() -> None:
    world = World()
    world.optimizer = CatapultSGD(world.model.parameters(), model=world.model, criterion=world.criterion)
    world.y[0, 0] = NAN
    world.criterion(world.model(world.x), world.y).backward()
    with refused(world, RuntimeError, "NaN or inf"):
        world.optimizer.step()


def test_a_batch_with_a_nan_later_is_undone() -> None:
    """Not an error, as a divergence is not: the weights go back to the snapshot instead of to NaN."""
    world = World()
    world.model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    world.optimizer = CatapultSGD(world.model.parameters(), model=world.model, criterion=world.criterion, momentum=0.9)
    first = [p.detach().clone() for p in world.model.parameters()]
    step(world)
    assert not any(map(torch.equal, first, world.model.parameters()))
    good, world.y = world.y, torch.full_like(world.y, NAN)
    step(world)
    assert all(map(torch.equal, first, world.model.parameters()))
    world.y = good
    for _ in range(5):
        step(world)
    assert all(p.isfinite().all() for p in world.model.parameters())


@pytest.mark.parametrize("bad", [nn.MSELoss(reduction="none"), lambda out, y: 1.0], ids=["none", "float"])
def test_a_criterion_without_a_scalar_is_refused_where_it_is_called(bad: Any) -> None:
    world = World()
    world.model[1].momentum = 0.0  # the forward pass itself counts batches, and may: compare the rest
    world.optimizer = CatapultSGD(world.model.parameters(), model=world.model, criterion=bad)
    outputs = world.model(world.x)
    with refused(world, ValueError, "criterion", "scalar"):
        world.optimizer.criterion(outputs, world.y)


@pytest.mark.parametrize("with_model", [False, True])
def test_sparse_gradients(with_model: bool) -> None:
    world = World()
    world.model = nn.Sequential(nn.Embedding(5, 2, sparse=True))
    world.x = torch.tensor([0, 1, 1, 2, 0])
    arguments = {"model": world.model, "criterion": world.criterion} if with_model else {}
    world.optimizer = CatapultSGD(world.model.parameters(), **arguments)
    world.criterion(world.model(world.x), world.y).backward()
    with refused(world, RuntimeError, "sparse", "(5, 2)", "sparse=False"):
        world.optimizer.step()


def test_a_loss_that_is_not_a_scalar_in_the_models_output() -> None:
    world = World()
    world.optimizer = CatapultSGD(world.model.parameters(), model=world.model, criterion=None)
    before = [p.detach().clone() for p in world.model.parameters()]
    with pytest.raises(ValueError, match=r"criterion=None.*scalar loss.*pass outputs="):
        world.model(world.x)
    assert all(map(torch.equal, before, world.model.parameters()))


@pytest.mark.parametrize("value", ["low", None, torch.ones(2), [1.0]], ids=str)
@pytest.mark.parametrize("log", [False, True])
def test_metrics(value: Any, log: bool, tmp_path: Path) -> None:
    world = World()
    path = tmp_path / "run.jsonl" if log else None
    world.optimizer = CatapultSGD(world.model.parameters(), model=world.model, criterion=world.criterion, log=path)
    step(world)
    with refused(world, TypeError, "val_loss", str(value)):
        world.optimizer.log_metrics(val_loss=value)
