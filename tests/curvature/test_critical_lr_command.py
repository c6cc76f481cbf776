"""Promise: ``catapult-opt critical-lr module:function`` gives each optimizer's critical rate and changes nothing.

Oracle: closed form on a linear model; `critical_lr`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from catapult_opt.cli import main
from catapult_opt.starting_rates import starting_rates

FACTORY = """
import torch
from torch import nn

def setup():
    torch.manual_seed(1)  # of 200 seeds 24 are off by more than .1 %: outputs all alike have no spread to difference by
    return nn.Linear(2, 1), nn.MSELoss(), torch.ones(4, 2), torch.zeros(4, 1)

def alone():
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))
        def forward(self, x, scale):
            return scale * (self.w * x).square().sum()
    return Loss(), None, {"x": torch.ones(3), "scale": 2.0}

def shapes():
    return nn.Linear(2, 1), nn.MSELoss(), torch.ones(4, 3), torch.zeros(4, 1)

def wrong():
    return nn.Linear(2, 1)

def unusable():
    return nn.Linear(2, 1), nn.MSELoss(), torch.ones(4, 2) * float("nan"), torch.zeros(4, 1)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "made_here.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.delitem(sys.modules, "made_here", raising=False)
    return tmp_path


def test_figures_of_a_linear_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """MSE on x = (1, 1) with a bias: lambda = 2 * 3. Adam's first step: P = |g|, g the same in all three."""
    assert main(["critical-lr", "made_here:setup", "--json"]) == 0
    rows = {row["optimizer"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["SGD"]["lambda_max"] == pytest.approx(6.0, rel=1e-3)
    assert rows["SGD"]["eta_crit"] == pytest.approx(1 / 3, rel=1e-3)
    assert rows["SGD, momentum 0.9"]["eta_crit"] == pytest.approx(1.9 / 3, rel=1e-3)
    assert rows["SGD, momentum 0.9, Nesterov"]["eta_crit"] == pytest.approx(3.8 / 2.8 / 6, rel=1e-3)
    assert rows["Adam"]["eta_crit"] == pytest.approx(38 / rows["Adam"]["lambda_max"], rel=1e-6)
    assert rows["SGD"]["start"] == pytest.approx(rows["SGD"]["eta_crit"] / 2)
    assert [name for name, row in rows.items() if row["first_step_only"]] == ["Adam", "AdamW", "RMSprop", "Adagrad"]


def test_table_and_a_model_that_returns_its_loss(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["critical-lr", "made_here:alone"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    (row,) = (line for line in lines if line[:1] == ["SGD"] and len(line) == 4)
    assert [float(x) for x in row[1:]] == pytest.approx([4.0, 0.5, 0.25], rel=1e-3)  # Hessian 2 * 2


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("made_here", "module:function"),
        ("nowhere_at_all:setup", "nowhere_at_all"),
        ("made_here:missing", "missing"),
        ("made_here:wrong", "must return (model, criterion, inputs, targets)"),
        ("made_here:unusable", "NaN"),
        ("made_here:shapes", "made_here:shapes: mat1 and mat2 shapes cannot be multiplied (4x3 and 2x1)"),
        ("made_here.py:setup", "try made_here:setup"),
    ],
)
def test_what_cannot_be_used_is_named(folder: Path, capsys: pytest.CaptureFixture[str], spec: str, said: str) -> None:
    assert main(["critical-lr", spec]) == 2
    assert said in capsys.readouterr().err


def test_nothing_of_the_users_changes() -> None:
    torch.manual_seed(0)
    model, criterion = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1)), nn.MSELoss()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.get_rng_state()
    starting_rates(model, criterion, torch.randn(8, 3, generator=torch.Generator().manual_seed(1)), torch.zeros(8, 1))
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in [*model.modules(), criterion])
