"""Promise: a wrong argument anywhere in the public surface is refused by an error that names the argument, the value
and what is wanted instead. One table over the package, its analysis and the command line with its exit codes.

That nothing was changed by a refusal is ``test_bad_input.py``'s promise, with many more values per argument.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch import nn

from catapult_opt import (
    CatapultLR,
    CatapultMonitor,
    CatapultPolicy,
    CatapultSGD,
    LossModule,
    critical_lr,
    read_log,
)
from catapult_opt.analysis import agop, dag, datasets, networks, nqm, ntk, tasks
from catapult_opt.cli import main
from catapult_opt.starting_rates import load_factory

NAN, INF = math.nan, math.inf
X, Y = torch.ones(4, 3), torch.zeros(4, 1)


def net() -> nn.Module:
    return nn.Linear(3, 1)


def sgd_face(**more: Any) -> Any:
    model = net()
    return CatapultSGD(model.parameters(), **{"model": model, "criterion": nn.MSELoss(), **more})


def lr_face(optimizer: Any = None, **more: Any) -> Any:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if optimizer is None else optimizer
    return CatapultLR(optimizer, **{"model": model, "criterion": nn.MSELoss(), **more})


def monitor(optimizer: Any = None, **more: Any) -> Any:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if optimizer is None else optimizer
    return CatapultMonitor(optimizer, **{"model": model, "criterion": nn.MSELoss(), **more})


def measured(**more: Any) -> Any:
    return critical_lr(**{"model": net(), "criterion": nn.MSELoss(), "inputs": X, "targets": Y, **more})


def trained(kind: Callable[..., Any]) -> Any:
    """One step made, so that there is a state."""
    model, criterion = net(), nn.MSELoss()
    if kind is CatapultSGD:
        optimizer = face = CatapultSGD(model.parameters(), model=model, criterion=criterion)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        face = kind(optimizer, model=model, criterion=criterion)
    criterion(model(X), Y).backward()
    optimizer.step()
    return face


def other_params() -> list[nn.Parameter]:
    return list(nn.Linear(7, 1).parameters())


GRAPH = dag.fcn([3, 4, 1])
NETWORK = dag.DAGNetwork(GRAPH)
SPLIT = tasks.Split(X, torch.zeros(4, dtype=torch.long))

# what is called, and what the message must hold: the argument's name, the value, what is wanted
Row = tuple[Callable[[], Any], str, str, str]
PACKAGE: list[Row] = [
    (lambda: sgd_face(model=3), "model", "int", "nn.Module"),
    (lambda: sgd_face(model=nn.ReLU()), "model", "no parameter", "unfreeze"),
    (lambda: sgd_face(model=nn.Linear(7, 1)), "params", "(1, 3)", "pass the model that holds it"),
    (lambda: sgd_face(criterion="mse"), "criterion", "'mse'", "callable"),
    (lambda: sgd_face(lr=-1.0), "lr", "-1.0", ">= 0"),
    (lambda: sgd_face(lr="fast"), "lr", "'fast'", "a number"),
    (lambda: sgd_face(momentum=NAN), "momentum", "nan", "finite"),
    (lambda: sgd_face(weight_decay=-0.1), "weight_decay", "-0.1", ">= 0"),
    (lambda: sgd_face(nesterov=True), "nesterov", "momentum=0.0", "momentum > 0"),
    (lambda: sgd_face(maximize=True), "maximize", "True", "minimise the negated loss"),
    (lambda: sgd_face(fused=True), "fused", "True", "foreach=True"),
    (lambda: sgd_face(policy=2.0), "policy", "2.0", "CatapultPolicy"),
    (lambda: sgd_face(every=0), "every", "0", "whole number >= 1"),
    (lambda: sgd_face(overhead=-0.05), "overhead", "-0.05", "such as 0.05"),
    (lambda: sgd_face(overhead=True), "overhead", "True", "share of the running time"),
    (lambda: sgd_face(overhead=5), "overhead", "5", "such as 0.05 for 5 %"),
    (lambda: sgd_face(engine="quick"), "engine", "'quick'", "finite-difference"),
    (lambda: sgd_face(log=7), "log", "7", "a path"),
    (lambda: sgd_face(outputs=len), "outputs", "len", "criterion is None"),
    (lambda: sgd_face(criterion=None, outputs=3), "outputs", "3", "function of the model's output"),
    (lambda: sgd_face(grad_scaler=1024.0), "grad_scaler", "1024.0", "scale method"),
    (lambda: CatapultSGD([]), "parameter", "empty", "empty parameter list"),
    (lambda: CatapultSGD(net().parameters(), policy=CatapultPolicy()), "policy", "model", "pass model="),
    (lambda: CatapultSGD(net().parameters(), every=2), "every", "2", "pass model="),
    (lambda: CatapultSGD(net().parameters(), engine="forward"), "engine", "'forward'", "pass model="),
    (lambda: trained(CatapultSGD).load_state_dict(torch.optim.SGD(net().parameters(), lr=0.3).state_dict()),
     "state_dict", "0.3", "model's weights alone"),
    (lambda: trained(CatapultSGD).load_state_dict({"state": {}}), "state_dict", "param_groups", "state_dict()"),
    (lambda: trained(CatapultSGD).log_metrics(val_loss="low"), "val_loss", "'low'", "a number"),
    (lambda: trained(CatapultSGD).add_param_group({"params": other_params()}), "params", "(1, 7)", "pass the model"),
    (lambda: trained(CatapultSGD).attach(model=nn.Linear(7, 1), criterion=nn.MSELoss()), "params", "(1, 3)",
     "pass the model"),
    (lambda: trained(CatapultSGD).step(), "no forward pass", "Linear", "passed as model="),
    (lambda: lr_face(optimizer="sgd"), "optimizer", "str", "torch.optim.Optimizer"),
    (lambda: lr_face(optimizer=CatapultSGD(net().parameters())), "optimizer", "CatapultSGD", "leave CatapultLR out"),
    (lambda: lr_face(optimizer=torch.optim.Rprop(net().parameters())), "optimizer", "Rprop", "Adam"),
    (lambda: lr_face(optimizer=torch.optim.SGD(net().parameters(), lr=0.0)), "lr", "0.0", "above 0"),
    (lambda: lr_face(optimizer=torch.optim.Adam(net().parameters(), fused=True)), "fused", "Adam", "leave"),
    (lambda: lr_face(optimizer=torch.optim.SGD(other_params(), lr=0.1)), "params", "(1, 7)", "pass the model"),
    (lambda: lr_face(policy="default"), "policy", "'default'", "CatapultPolicy"),
    (lambda: lr_face(every=1.5), "every", "1.5", "whole number"),
    (lambda: lr_face(overhead=INF), "overhead", "inf", "such as 0.05"),
    (lambda: lr_face(engine=None), "engine", "None", "one of auto"),
    (lambda: lr_face(criterion=3), "criterion", "3", "callable"),
    (lambda: lr_face(model=None), "model", "NoneType", "nn.Module"),
    (lambda: lr_face(log=b"run"), "log", "b'run'", "a path"),
    (lambda: lr_face(grad_scaler="yes"), "grad_scaler", "'yes'", "scale method"),
    (lambda: trained(CatapultLR).load_state_dict({"vector": None}), "state_dict", "None", "state_dict() gave"),
    (lambda: trained(CatapultLR).load_state_dict({**trained(CatapultLR).state_dict(), "average": [X]}),
     "average", "1 tensors", "another model"),
    (lambda: trained(CatapultLR).log_metrics(val_loss=None), "val_loss", "None", "a number"),
    (lambda: monitor(optimizer=[1]), "optimizer", "list", "torch.optim.Optimizer"),
    (lambda: monitor(optimizer=torch.optim.LBFGS(net().parameters())), "optimizer", "LBFGS", "SGD"),
    (lambda: monitor(every=0), "every", "0", "whole number >= 1"),
    (lambda: monitor(every=None), "every", "None", "whole number >= 1"),
    (lambda: monitor(overhead="5%"), "overhead", "'5%'", "such as 0.05"),
    (lambda: monitor(model="net"), "model", "str", "nn.Module"),
    (lambda: monitor(criterion=[nn.MSELoss()]), "criterion", "MSELoss", "callable"),
    (lambda: monitor(engine="hessian"), "engine", "'hessian'", "one of auto"),
    (lambda: CatapultPolicy(kappa=0.5), "kappa", "0.5", "above 1"),
    (lambda: CatapultPolicy(cool=1.5), "cool", "1.5", "at most 1"),
    (lambda: CatapultPolicy(total_steps=0), "total_steps", "0", "whole number >= 1"),
    (lambda: CatapultPolicy(smoothing=2.5), "smoothing", "2.5", "whole number"),
    (lambda: CatapultPolicy(caution=-1), "caution", "-1", ">= 0"),
    (lambda: CatapultPolicy(settle="late"), "settle", "'late'", "finite number"),
    (lambda: measured(model=[net()]), "model", "list", "nn.Module"),
    (lambda: measured(curvature="fisher"), "curvature", "'fisher'", "'ggn' or 'hessian'"),
    (lambda: measured(engine="slow"), "engine", "'slow'", "one of auto"),
    (lambda: measured(tol=-1.0), "tol", "-1.0", ">= 0"),
    (lambda: measured(max_matvecs=0), "max_matvecs", "0", ">= 1"),
    (lambda: measured(outputs="first"), "outputs", "'first'", "function"),
    (lambda: measured(criterion=nn.MSELoss(reduction="none")), "criterion", "(4, 1)", "reduction="),
    (lambda: measured(criterion=nn.L1Loss()), "criterion", "L1Loss", "MSELoss"),
    (lambda: measured(criterion=lambda out, y: y.sum()), "criterion", "does not depend", "parameters"),
    (lambda: measured(criterion=None), "criterion=None", "Tensor", "outputs=lambda"),
    (lambda: measured(inputs=X * NAN), "not finite", "NaN", "batch or the weights"),
    (lambda: LossModule("mse"), "function", "'mse'", "callable"),
    (lambda: read_log("no/such/run.jsonl"), "no/such/run.jsonl", "no such file", "file"),
    (lambda: read_log(None), "path", "None", "a path"),
    (lambda: load_factory("train"), "train", "module:function", "module:function"),
]  # fmt: skip
ANALYSIS: list[Row] = [
    (lambda: ntk.ntk(nn.ReLU(), X), "model", "no parameter", "unfreeze"),
    (lambda: ntk.ntk(net(), torch.ones(0, 3)), "inputs", "(0, 3)", "at least one sample"),
    (lambda: ntk.ntk(net(), X, memory=0), "memory", "0", "positive"),
    (lambda: ntk.ntk(net(), [1.0]), "inputs", "list", "tensor"),
    (lambda: ntk.eigenspaces(torch.ones(2, 3)), "kernel", "(2, 3)", "square"),
    (lambda: ntk.eigenspaces(torch.full((2, 2), NAN)), "kernel", "finite", "diverged"),
    (lambda: ntk.loss_in_eigenspace(torch.ones(3), ntk.eigenspaces(torch.eye(2)), 1), "residual", "3", "2"),
    (lambda: ntk.loss_in_eigenspace(torch.ones(2), ntk.eigenspaces(torch.eye(2)), 5), "s", "5", "2"),
    (lambda: ntk.critical_rate(torch.eye(2), samples=0), "samples", "0", ">= 1"),
    (lambda: ntk.critical_rates(net(), X, torch.zeros(5, 1)), "targets", "(5, 1)", "(4, 1)"),
    (lambda: ntk.match_rate([1.0, 2.0], [1.0, 1.0], 0.1), "losses", "2 and 2", "one more than rates"),
    (lambda: agop.agop(net(), [[1.0]]), "inputs", "list", "floating-point tensor"),
    (lambda: agop.agop(net(), X, batch_size=0), "batch_size", "0", "at least 1"),
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
    (lambda: networks.scale_weights_(net(), NAN), "sigma", "nan", "finite"),
    (lambda: nqm.QuadraticModel("net"), "module", "str", "nn.Module"),
    (lambda: nqm.TwoLayerReLU(0, 3), "d", "0", "at least 1"),
    (lambda: nqm.GeneralQuadraticModel(torch.ones(2, 3), torch.ones(2), 1.0), "sigma", "(2,)", "shape"),
    (lambda: nqm.regime(-1.0, 1.0), "eta", "-1.0", "positive"),
    (lambda: nqm.observe([1.0, 2.0], [1.0]), "losses", "2", "as many"),
    (lambda: nqm.phase_diagram([1.0], [0]), "m", "0", "at least 1"),
    (lambda: nqm.equilibria(eta=1.0, y=1.0, c=0.0), "c", "0.0", "positive"),
    (lambda: nqm.scalar_trajectory(1.0, 1.0, eta=1.0, y=0.0, c=1.0, steps=-1), "steps", "-1", "at least 0"),
    (lambda: nqm.two_layer_start(0), "m", "0", "at least 1"),
    (lambda: nqm.jacobian(net().requires_grad_(False), X), "model", "frozen", "frozen"),
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


def test_there_are_a_hundred() -> None:
    assert len(PACKAGE) + len(ANALYSIS) + len(COMMANDS) >= 100


@pytest.mark.parametrize("number", range(len(PACKAGE) + len(ANALYSIS)))
def test_named_with_its_value_and_what_to_do(number: int) -> None:
    call, name, value, wanted = [*PACKAGE, *ANALYSIS][number]
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
