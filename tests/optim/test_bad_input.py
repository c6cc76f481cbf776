"""Promise: what cannot work is refused before anything changed, by a message of one line that names the argument, its
value, and what is wanted instead. Over the whole public surface, the command line with its exit codes included.

The first tables are one a face: (argument, value, exception, texts). After each refusal the weights, the optimizer's
state, the hooks of model and criterion and the random state are what they were.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch import Tensor, nn
from torch.optim import SGD
from training import BASES, FACES, Training, net, noise

from catapult_opt import CatapultLR, CatapultMonitor, CatapultPolicy, CatapultSGD, LossModule, critical_lr, read_log
from catapult_opt.analysis import agop, dag, datasets, networks, nqm, ntk, tasks
from catapult_opt.cli import main
from catapult_opt.starting_rates import load_factory

NAN, INF = math.nan, math.inf


class World(Training):
    """Everything a user has in hand."""

    def __init__(self, face: str = "", model: nn.Module | None = None, data: Any = None, **settings: Any) -> None:
        if model is None:
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        base = None if face else BASES["CatapultMonitor"]
        super().__init__(face, model, noise(5, 3, 2) if data is None else data, base=base, **settings)

    @property
    def whole(self) -> dict[str, Any]:
        return {"model": self.model, "criterion": self.criterion}

    def picture(self) -> bytes:
        state = plain(self.optimizer.state_dict())
        modules = [*self.model.modules(), *self.criterion.modules()]
        hooks = [(list(m._forward_hooks), list(m._forward_pre_hooks), list(m._backward_hooks)) for m in modules]
        hooks += [len(v) for k, v in self.optimizer.__dict__.items() if "_hooks" in k]
        weights = plain(self.model.state_dict())
        gradients = plain([p.grad for p in self.model.parameters()])
        return pickle.dumps((hooks, state, weights, gradients, torch.get_rng_state().tolist()))


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
    (name, value, error, (repr(value), wanted))
    for name in ("lr", "momentum", "dampening", "weight_decay")
    for error, wanted, values in [
        (ValueError, "a finite number", (-0.1, NAN, INF, -INF)),
        (TypeError, "a number", ("0.1", None, [0.1], True, 1j)),
    ]
    for value in values
    if (name, value) != ("dampening", -0.1)
]
SETTINGS: list[Row] = [
    *NUMBERS,
    ("lr", torch.tensor([0.1, 0.2]), ValueError, ("1-element",)),
    ("lr", torch.tensor(NAN), ValueError, ("nan",)),
    ("lr", torch.tensor(-1.0), ValueError, ("-1",)),
    ("nesterov", True, ValueError, ("momentum=0.0", "momentum > 0")),
    ("nesterov", "yes", TypeError, ("'yes'", "True or False")),
    ("maximize", 1, TypeError, ("1", "True or False")),
    ("differentiable", None, TypeError, ("None", "True or False")),
    ("foreach", "fast", TypeError, ("'fast'", "True, False or None")),
    ("fused", True, ValueError, ("True", "not supported", "foreach")),
    ("capturable", True, TypeError, ()),
    ("no_such_setting", 1, TypeError, ()),
]
CONTROLLER: list[Row] = [
    ("maximize", True, ValueError, ("True", "minimise the negated loss", "model=None")),
    ("differentiable", True, ValueError, ("True", "model=None")),
    ("policy", {"kappa": 3}, TypeError, ("CatapultPolicy", "{'kappa': 3}")),
    ("policy", CatapultPolicy, TypeError, ("CatapultPolicy",)),
]
SHARED: list[Row] = [  # of all faces
    ("model", "net", TypeError, ("str", "nn.Module")),
    ("model", lambda x: x, TypeError, ("function", "nn.Module")),
    ("model", Identity(), ValueError, ("no parameter", "requires a gradient", "unfreeze")),
    ("model", nn.Linear(3, 4), ValueError, ("params", "(4, 3)", "Linear", "pass the model that holds it")),
    ("criterion", 5, TypeError, ("5", "callable")),
    ("criterion", "mse", TypeError, ("'mse'", "callable")),
    *(("every", v, ValueError, (repr(v), "whole number >= 1")) for v in (0, -3, 1.5, True, "2")),
    *(("overhead", v, ValueError, (repr(v), "share of the running time", "such as 0.05"))
      for v in (0, -0.1, 1, 5, NAN, INF, "0.05", True)),
    ("outputs", len, ValueError, ("len", "criterion is None")),
    ("outputs", 3, TypeError, ("3", "function of the model's output")),
    ("log", 3, TypeError, ("3", "a path")),
    ("log", b"run", TypeError, ("b'run'", "a path")),
    ("engine", "fastest", ValueError, ("'fastest'", "one of auto", "finite-difference")),
    ("engine", None, ValueError, ("None", "one of auto")),
    ("grad_scaler", 3, TypeError, ("GradScaler", "3", "scale method")),
]  # fmt: skip


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


def arguments(world: World, row: Row) -> dict[str, Any]:
    """All as it should be but for the row's argument; `outputs` is for models that return their loss."""
    whole = {**world.whole, row[0]: row[1]}
    return {**whole, "criterion": None} if row[:2] == ("outputs", 3) else whole


@table([*SETTINGS, *CONTROLLER, *SHARED])
def test_settings_with_a_model(row: Row) -> None:
    name, _, error, texts = row
    world = World()
    with refused(world, error, name, *texts):
        CatapultSGD(world.model.parameters(), **arguments(world, row))


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
            CatapultSGD([{"params": [first]}, bad], **world.whole)
    else:
        world.optimizer = CatapultSGD([first], **world.whole)
        with refused(world, error, name, *texts):
            world.optimizer.add_param_group(bad)


def test_a_foreign_parameter_in_a_group_added_later() -> None:
    world = World("CatapultSGD")
    with refused(world, ValueError, "params", "(7,)", "Sequential"):
        world.optimizer.add_param_group({"params": [torch.ones(7, requires_grad=True)]})


@pytest.mark.parametrize("name", ["criterion", "policy", "log", "outputs", "grad_scaler", "every", "engine"])
def test_controller_settings_without_a_model(name: str) -> None:
    values = {
        "criterion": nn.MSELoss(),
        "policy": CatapultPolicy(),
        "log": "run.jsonl",
        "outputs": lambda out: out,
        "grad_scaler": torch.amp.GradScaler("cpu"),
        "every": 2,
        "engine": "forward",
    }
    world = World()
    with refused(world, ValueError, name, "pass model="):
        CatapultSGD(world.model.parameters(), **{name: values[name]})
    assert not Path("run.jsonl").exists()


def test_no_trainable_parameter_in_model_or_params() -> None:
    world = World()
    params = list(world.model.parameters())
    world.model.requires_grad_(False)
    with refused(world, ValueError, "model", "no parameter that requires a gradient"):
        CatapultSGD(params, **world.whole)
    world.model[0].requires_grad_(True)
    with refused(world, ValueError, "params", "requires a gradient"):
        CatapultSGD(world.model[2].parameters(), **world.whole)


@table([*SHARED, *CONTROLLER[2:], ("capturable", True, TypeError, ())])
def test_attach_keeps_the_old_connection(row: Row) -> None:
    name, _, error, texts = row
    world = World("CatapultSGD")
    world.step()
    with refused(world, error, name, *texts):
        world.optimizer.attach(**arguments(world, row))
    world.step()


@pytest.mark.parametrize("face", [CatapultLR, CatapultMonitor])
@table(SHARED)
def test_beside_an_optimizer(row: Row, face: Any) -> None:
    name, _, error, texts = row
    world = World()
    with refused(world, error, name, *texts):
        face(world.optimizer, **arguments(world, row))


@pytest.mark.parametrize("face", [CatapultLR, CatapultMonitor])
@pytest.mark.parametrize("optimizer", ["sgd", None, torch.optim.Rprop, torch.optim.LBFGS], ids=str)
def test_beside_something_else(face: Any, optimizer: Any) -> None:
    world = World()
    if isinstance(optimizer, type):
        world.optimizer = optimizer = optimizer(world.model.parameters())
    with refused(world, TypeError, "optimizer must be", type(optimizer).__name__):
        face(optimizer, **world.whole)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(CatapultPolicy)])
@pytest.mark.parametrize("value", [NAN, -1, "2", [1]], ids=repr)
def test_policy(name: str, value: Any) -> None:
    with refused(World(), ValueError, name, repr(value), "must be"):
        CatapultPolicy(**{name: value})


def test_policy_without_such_a_setting() -> None:
    with refused(World(), TypeError, "kapa"):
        CatapultPolicy(kapa=2.0)  # type: ignore[call-arg]


def test_policy_is_frozen() -> None:
    with pytest.raises(AttributeError):
        CatapultPolicy().total_steps = 3  # type: ignore[misc]


CRITICAL: list[Row] = [
    *(row for row in SHARED if row[0] in ("model", "criterion") and not isinstance(row[1], nn.Linear)),
    ("curvature", "fisher", ValueError, ("'fisher'", "'ggn' or 'hessian'")),
    ("curvature", None, ValueError, ("None", "'ggn' or 'hessian'")),
    ("criterion", nn.MSELoss(reduction="none"), ValueError, ("scalar", "(5, 2)", "reduction=")),
    ("criterion", lambda out, y: 3.0, ValueError, ("scalar", "float")),
    ("criterion", lambda out, y: torch.zeros(()), ValueError, ("does not depend", "trainable parameters")),
    ("criterion", None, ValueError, ("scalar loss", "Tensor", "outputs=lambda")),
    ("tol", NAN, ValueError, ("nan", ">= 0")),
    ("tol", -1.0, ValueError, ("-1.0", ">= 0")),
    ("tol", "small", TypeError, ("'small'", "a number")),
    ("max_matvecs", 0, ValueError, ("0", ">= 1")),
    ("max_matvecs", 2.5, ValueError, ("2.5", "whole number")),
    ("outputs", 3, TypeError, ("3", "function")),
    ("engine", "fastest", ValueError, ("'fastest'", "one of auto")),
]


@table(CRITICAL)
def test_critical_lr(row: Row) -> None:
    name, value, error, texts = row
    world = World()
    with refused(world, error, name, *texts):
        critical_lr(**{**world.whole, "inputs": world.x, "targets": world.y, name: value})


# ------------------------------------------------------------------------------------------------------- refusing steps


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
    world = World("CatapultSGD", momentum=0.9)
    world.steps(before)
    world.optimizer.zero_grad()
    forget(world)
    with refused(world, RuntimeError, *texts):
        world.optimizer.step()
    world.step()  # and the right way works, right after


def test_a_function_called_directly() -> None:
    function = nn.functional.mse_loss
    world = World("CatapultSGD", criterion=function)
    function(world.model(world.x), world.y).backward()
    with refused(world, RuntimeError, "optimizer.criterion(...)", "LossModule"):
        world.optimizer.step()


def test_a_loss_of_something_else_than_the_model() -> None:
    world, other = World("CatapultSGD"), nn.Linear(3, 2)
    world.model(world.x)
    world.criterion(other(world.x), world.y).backward()
    with refused(world, RuntimeError, "criterion", "does not come from the model"):
        world.optimizer.step()


def test_a_batch_changed_in_place_before_the_step() -> None:
    world = World("CatapultSGD")
    world.criterion(world.model(world.x), world.y).backward()
    world.x.mul_(2)
    with refused(world, RuntimeError, "modified in place", "copy"):
        world.optimizer.step()


def test_a_batch_with_a_nan_at_the_first_step() -> None:
    world = World("CatapultSGD")
    world.y[0, 0] = NAN
    world.criterion(world.model(world.x), world.y).backward()
    with refused(world, RuntimeError, "NaN or inf"):
        world.optimizer.step()


def test_a_batch_with_a_nan_later_is_undone() -> None:
    """Not an error, as a divergence is not: the weights go back to their average instead of to NaN."""
    world = World("CatapultSGD", net(3, 4, 2), momentum=0.9)
    first = world.weights()
    world.step()
    assert not torch.equal(world.weights(), first)
    world.step(world.x, world.y * NAN)
    assert torch.equal(world.weights(), first)
    world.steps(5)
    assert world.finite()


@pytest.mark.parametrize("bad", [nn.MSELoss(reduction="none"), lambda out, y: 1.0], ids=["none", "float"])
def test_a_criterion_without_a_scalar_is_refused_where_it_is_called(bad: Any) -> None:
    world = World("CatapultSGD", criterion=bad)
    outputs = world.model(world.x)
    with refused(world, ValueError, "criterion", "scalar"):
        world.criterion(outputs, world.y)


@pytest.mark.parametrize("with_model", [False, True])
def test_sparse_gradients(with_model: bool) -> None:
    data = torch.tensor([0, 1, 1, 2, 0]), torch.randn(5, 2)
    world = World("", nn.Sequential(nn.Embedding(5, 2, sparse=True)), data)
    world.optimizer = CatapultSGD(world.model.parameters(), **(world.whole if with_model else {}))
    world.backward()
    with refused(world, RuntimeError, "sparse", "(5, 2)", "sparse=False"):
        world.optimizer.step()


def test_a_loss_that_is_not_a_scalar_in_the_models_output() -> None:
    world = World()
    world.optimizer = CatapultSGD(world.model.parameters(), model=world.model, criterion=None)
    before = world.weights()
    with pytest.raises(ValueError, match=r"criterion=None.*scalar loss.*pass outputs="):
        world.model(world.x)
    assert torch.equal(world.weights(), before)


@pytest.mark.parametrize("value", ["low", None, torch.ones(2), [1.0]], ids=str)
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("face", FACES)
def test_metrics(face: str, value: Any, log: bool, tmp_path: Path) -> None:
    world = World(face, log=tmp_path / "run.jsonl" if log else None)
    world.step()
    with refused(world, TypeError, "val_loss", str(value), "a number"):
        world.watch.log_metrics(val_loss=value)


# -------------------------------------------------------------------------------------- whatever else can be called


X, Y = torch.ones(4, 3), torch.zeros(4, 1)
GRAPH = dag.fcn([3, 4, 1])
NETWORK = dag.DAGNetwork(GRAPH)
SPLIT = tasks.Split(X, torch.zeros(4, dtype=torch.long))


def linear() -> nn.Module:
    return nn.Linear(3, 1)


def trained(face: str) -> Any:
    """One step made, so that there is a state."""
    training = Training(face, linear(), (X, Y), base=lambda params: SGD(params, lr=0.1))
    training.step()
    return training.watch


def beside(optimizer: Any, face: Any = CatapultLR, **more: Any) -> Any:
    return face(optimizer, model=linear(), criterion=nn.MSELoss(), **more)


def measured(**more: Any) -> Any:
    return critical_lr(**{"model": linear(), "criterion": nn.MSELoss(), "inputs": X, "targets": Y, **more})


def other_params() -> list[nn.Parameter]:
    return list(nn.Linear(7, 1).parameters())


# what is called, and what the message must hold: the argument's name, the value, what is wanted
Call = tuple[Callable[[], Any], str, str, str]
PACKAGE: list[Call] = [
    (lambda: CatapultSGD([]), "parameter", "empty", "empty parameter list"),
    (lambda: trained("CatapultSGD").load_state_dict(torch.optim.SGD(linear().parameters(), lr=0.3).state_dict()),
     "state_dict", "0.3", "model's weights alone"),
    (lambda: trained("CatapultSGD").load_state_dict({"state": {}}), "state_dict", "param_groups", "state_dict()"),
    (lambda: trained("CatapultSGD").add_param_group({"params": other_params()}), "params", "(1, 7)", "pass the model"),
    (lambda: trained("CatapultSGD").attach(model=nn.Linear(7, 1), criterion=nn.MSELoss()), "params", "(1, 3)",
     "pass the model"),
    (lambda: trained("CatapultSGD").step(), "no forward pass", "Linear", "passed as model="),
    (lambda: beside(CatapultSGD(linear().parameters())), "optimizer", "CatapultSGD", "leave CatapultLR out"),
    (lambda: beside(torch.optim.SGD(linear().parameters(), lr=0.0)), "lr", "0.0", "above 0"),
    (lambda: beside(torch.optim.Adam(linear().parameters(), fused=True)), "fused", "Adam", "leave"),
    (lambda: beside(torch.optim.SGD(other_params(), lr=0.1)), "params", "(1, 7)", "pass the model"),
    (lambda: trained("CatapultLR").load_state_dict({"vector": None}), "state_dict", "None", "state_dict() gave"),
    (lambda: trained("CatapultLR").load_state_dict({**trained("CatapultLR").state_dict(), "average": [X]}),
     "average", "1 tensors", "another model"),
    (lambda: beside(torch.optim.SGD(linear().parameters(), lr=0.1), CatapultMonitor, every=None), "every", "None",
     "whole number >= 1"),
    (lambda: beside(torch.optim.LBFGS(linear().parameters())), "optimizer", "LBFGS", "Adam"),
    (lambda: measured(criterion=nn.L1Loss()), "criterion", "L1Loss", "MSELoss"),
    (lambda: measured(inputs=X * NAN), "not finite", "NaN", "batch or the weights"),
    (lambda: LossModule("mse"), "function", "'mse'", "callable"),
    (lambda: read_log("no/such/run.jsonl"), "no/such/run.jsonl", "no such file", "file"),
    (lambda: read_log(None), "path", "None", "a path"),
    (lambda: load_factory("train"), "train", "module:function", "module:function"),
]  # fmt: skip
ANALYSIS: list[Call] = [
    (lambda: ntk.ntk(nn.ReLU(), X), "model", "no parameter", "unfreeze"),
    (lambda: ntk.ntk(linear(), torch.ones(0, 3)), "inputs", "(0, 3)", "at least one sample"),
    (lambda: ntk.ntk(linear(), X, memory=0), "memory", "0", "positive"),
    (lambda: ntk.ntk(linear(), [1.0]), "inputs", "list", "tensor"),
    (lambda: ntk.eigenspaces(torch.ones(2, 3)), "kernel", "(2, 3)", "square"),
    (lambda: ntk.eigenspaces(torch.full((2, 2), NAN)), "kernel", "finite", "diverged"),
    (lambda: ntk.loss_in_eigenspace(torch.ones(3), ntk.eigenspaces(torch.eye(2)), 1), "residual", "3", "2"),
    (lambda: ntk.loss_in_eigenspace(torch.ones(2), ntk.eigenspaces(torch.eye(2)), 5), "s", "5", "2"),
    (lambda: ntk.critical_rate(torch.eye(2), samples=0), "samples", "0", ">= 1"),
    (lambda: ntk.critical_rates(linear(), X, torch.zeros(5, 1)), "targets", "(5, 1)", "(4, 1)"),
    (lambda: ntk.match_rate([1.0, 2.0], [1.0, 1.0], 0.1), "losses", "2 and 2", "one more than rates"),
    (lambda: agop.agop(linear(), [[1.0]]), "inputs", "list", "floating-point tensor"),
    (lambda: agop.agop(linear(), X, batch_size=0), "batch_size", "0", "at least 1"),
    (lambda: agop.alignment(torch.eye(2), torch.eye(3)), "g", "(2, 2)", "(3, 3)"),
    (lambda: agop.alignment(torch.zeros(2, 2), torch.eye(2)), "g", "zero", "zero"),
    (lambda: tasks.rank(5), "k", "5", "[2, 3, 4]"),
    (lambda: tasks.rank(2, n_train=10.0), "n_train", "10.0", "integer"),
    (lambda: tasks.rank(2, noise=NAN), "noise", "nan", "finite"),
    (lambda: tasks.full_rank(d=0), "d", "0", "at least 1"),
    (lambda: datasets.Data().load("imagenet"), "data set", "'imagenet'", "there are cifar10"),
    (lambda: datasets.Data("no/such/folder").load("mnist"), "no/such/folder", "mnist", "download"),
    (lambda: datasets.with_label_noise(SPLIT, 1.5), "fraction", "1.5", "[0, 1]"),
    (lambda: networks.mlp(3, 0, 2), "width", "0", "at least 1"),
    (lambda: networks.mlp(3, 4, 2, parameterization="mup"), "parameterization", "'mup'", "ntk"),
    (lambda: networks.cnn(3, 4, 2, size=-1), "size", "-1", "at least 1"),
    (lambda: networks.wide_resnet(3, depth=11), "depth", "11", "6"),
    (lambda: networks.vit(3, 32, width=10, heads=3), "width", "10", "heads"),
    (lambda: networks.vit(3, 30, patch=4), "size", "30", "patch"),
    (lambda: networks.NTKLinear(0, 1), "in_features", "0", "at least 1"),
    (lambda: networks.ntk_mlp(2, 2, 2, activation="relu"), "activation", "'relu'", "module"),
    (lambda: networks.scale_weights_(linear(), NAN), "sigma", "nan", "finite"),
    (lambda: nqm.QuadraticModel("net"), "module", "str", "nn.Module"),
    (lambda: nqm.TwoLayerReLU(0, 3), "d", "0", "at least 1"),
    (lambda: nqm.GeneralQuadraticModel(torch.ones(2, 3), torch.ones(2), 1.0), "sigma", "(2,)", "shape"),
    (lambda: nqm.regime(-1.0, 1.0), "eta", "-1.0", "positive"),
    (lambda: nqm.observe([1.0, 2.0], [1.0]), "losses", "2", "as many"),
    (lambda: nqm.phase_diagram([1.0], [0]), "m", "0", "at least 1"),
    (lambda: nqm.equilibria(eta=1.0, y=1.0, c=0.0), "c", "0.0", "positive"),
    (lambda: nqm.scalar_trajectory(1.0, 1.0, eta=1.0, y=0.0, c=1.0, steps=-1), "steps", "-1", "at least 0"),
    (lambda: nqm.two_layer_start(0), "m", "0", "at least 1"),
    (lambda: nqm.jacobian(linear().requires_grad_(False), X), "model", "frozen", "frozen"),
    (lambda: dag.fcn([3]), "sizes", "[3]", "at least an input and an output"),
    (lambda: dag.DAG(np.eye(3)), "adjacency", "ndarray", "scipy.sparse"),
    (lambda: dag.DAG(sp.csr_array((2, 2))), "adjacency", "0", "at least 1 edge"),
    (lambda: dag.drop_edges(GRAPH, 1.0), "p", "1.0", "probability"),
    (lambda: dag.with_skips(GRAPH, back=9), "back", "9", "neurons to connect"),
    (lambda: dag.conv1d(4, [1, 2], 2), "window", "2", "odd"),
    (lambda: dag.DAGNetwork(GRAPH, "relu"), "activation", "'relu'", "functions of a tensor"),
    (lambda: NETWORK(torch.zeros(5, 2)), "x", "(5, 2)", "3 columns"),
    (lambda: dag.hessian_norm(NETWORK, torch.zeros(5, 3)), "sample", "(5, 3)", "one input"),
    (lambda: dag.hessian_norm(NETWORK, torch.zeros(3), tol=-1.0), "tol", "-1.0", "at least"),
    (lambda: dag.pl_star(NETWORK, X, torch.zeros(5, 1)), "targets", "(5, 1)", "(4, 1)"),
    (lambda: dag.log_log_slope([1.0, 2.0], [1.0]), "x and y", "(2,), (1,)", "3 or more points"),
    (lambda: dag.log_log_slope([1.0, -2.0, 3.0], [1.0, 1.0, 1.0]), "x", "-2.0", "positive"),
]  # fmt: skip


# what is typed, the exit code, and what stands on the error output; {tmp} is an empty folder but for what follows
CommandRow = tuple[list[str], int, str]
COMMANDS: list[CommandRow] = [
    ([], 2, "COMMAND"),
    (["reprot"], 2, "invalid choice: 'reprot'"),
    (["report"], 2, "RUN"),
    (["report", "{tmp}/none.jsonl"], 2, "none.jsonl: no such file"),
    (["report", "{tmp}/empty"], 2, "empty: no run logs (*.jsonl) in this folder"),
    (["report", "{tmp}/notes.jsonl"], 2, "notes.jsonl: is not a catapult_opt run log"),
    (["report", "{tmp}/newer.jsonl"], 2, "version 9 of the format"),
    (["report", "{tmp}/zero.jsonl"], 2, "zero.jsonl: is empty"),
    (["report", "{tmp}/notes.jsonl", "--json"], 2, "notes.jsonl: is not a catapult_opt run log"),
    (["report", "x", "--sort", "colour"], 2, "invalid choice: 'colour'"),
    (["report", "x", "--json", "--csv"], 2, "not allowed with"),
    (["report", "x", "--watch", "0"], 2, "0 is not between 0.05 and 86400 seconds"),
    (["report", "x", "--watch", "soon"], 2, "'soon' is not a number of seconds"),
    (["plot"], 2, "RUN"),
    (["plot", "{tmp}/none.jsonl"], 2, "none.jsonl: no such file"),
    (["plot", "{tmp}/good.jsonl", "-o", "{tmp}/picture.xyz"], 2, "picture.xyz: cannot be written"),
    (["plot", "{tmp}/good.jsonl", "-o", "{tmp}/good.jsonl/picture.png"], 2, "picture.png: cannot be written"),
    (["critical-lr"], 2, "FACTORY"),
    (["critical-lr", "train"], 2, "module:function"),
    (["critical-lr", "no_such_module:setup"], 2, "no_such_module"),
    (["critical-lr", "json:no_such_function"], 2, "no_such_function"),
    (["critical-lr", "json:dumps"], 2, "json:dumps must be a function without arguments, got dumps(obj"),
    (["critical-lr", "os:getcwd"], 2, "os:getcwd must return (model, criterion, inputs, targets)"),
    (["critical-lr", "setups:no_criterion"], 2, "setups:no_criterion: criterion must be an nn.Module or a callable"),
    (["critical-lr", "setups:l1"], 2, "criterion L1Loss has no second derivative"),
    (["critical-lr", "math:pi"], 2, "pi"),
    (["reproduce"], 2, "`catapult-opt reproduce --list` names them"),
    (["reproduce", "fig-99"], 2, "fig-99"),
    (["reproduce", "fig-4.9", "--quick", "--full"], 2, "not allowed with"),
    (["reproduce", "fig-4.9", "--seeds", "0"], 2, "must be a whole number of at least 1, got '0'"),
    (["reproduce", "fig-4.9", "--seeds", "many"], 2, "must be a whole number of at least 1, got 'many'"),
    (["reproduce", "fig-4.3", "--quick", "--data", "{tmp}/none", "--out", "{tmp}/out"], 2, "none"),
]


SETUPS = """
import torch
from torch import nn
no_criterion = lambda: (nn.Linear(3, 1), "mse", torch.ones(4, 3), torch.ones(4, 1))
l1 = lambda: (nn.Linear(3, 1), nn.L1Loss(), torch.ones(4, 3), torch.ones(4, 1))
"""


@pytest.mark.parametrize("row", [*PACKAGE, *ANALYSIS], ids=lambda row: f"{row[1]}-{row[2]}")
def test_named_with_its_value_and_what_to_do(row: Call) -> None:
    call, name, value, wanted = row
    with pytest.raises((ValueError, TypeError, RuntimeError, OSError)) as caught:
        call()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for text in (name, value, wanted):
        assert text in message


@pytest.mark.parametrize("row", COMMANDS, ids=lambda row: " ".join(row[0]) or "nothing")
def test_exit_codes_of_the_command_line(
    row: CommandRow, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, code, text = row
    header = {"kind": "header", "format": "catapult_opt-run", "version": 1}
    (tmp_path / "empty").mkdir()
    (tmp_path / "zero.jsonl").touch()
    (tmp_path / "notes.jsonl").write_text("some notes\n")
    (tmp_path / "newer.jsonl").write_text(json.dumps({**header, "version": 9}) + "\n")
    (tmp_path / "good.jsonl").write_text(
        json.dumps(header) + "\n" + '{"kind":"step","step":1,"loss":1.0,"effective_lr":0.1}\n'
    )
    (tmp_path / "setups.py").write_text(SETUPS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.delitem(sys.modules, "setups", raising=False)
    if "plot" in arguments:
        pytest.importorskip("matplotlib")
    try:
        status = main([argument.replace("{tmp}", str(tmp_path)) for argument in arguments])
    except SystemExit as exit:
        status = exit.code  # type: ignore[assignment]
    err = capsys.readouterr().err
    assert status == code
    assert text in err
    assert "Traceback" not in err
