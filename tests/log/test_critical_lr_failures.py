"""Promise: whatever the user's own code does, ``catapult-opt critical-lr`` says it in one line, with exit status 2.

Oracle for what went wrong: the last line of Python's own traceback.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from catapult_opt.cli import main

FACTORIES = """
import threading
import torch
from torch import nn

x, y = torch.ones(8, 3), torch.zeros(8, 1)

class Own(Exception):
    pass

class Base(BaseException):
    pass

def boom(): raise ValueError("my data is missing")
def key(): return {}["data"]
def own(): raise Own("first line\\nsecond line")
def quits(): raise SystemExit(3)
def base(): raise Base("not even an Exception")
class Mute(ValueError):
    def __str__(self): raise TypeError("no text")
def mute(): raise Mute()
def recursion(): return recursion()
def lists(): return [nn.Linear(3, 1), nn.MSELoss(), x, y]
def nothing(): pass
def two(): return nn.Linear(3, 1), nn.MSELoss()
def swapped(): return nn.MSELoss(), nn.Linear(3, 1), x, y
def no_targets(): return nn.Linear(3, 1), nn.MSELoss(), x
def text(): return nn.Linear(3, 1), "mse", x, y
def several(): return nn.Bilinear(3, 3, 1), nn.MSELoss(), [x, x], y
def locked():
    model = nn.Linear(3, 1)
    model.lock = threading.Lock()
    return model, nn.MSELoss(), x, y
def forward():
    class Model(nn.Linear):
        def forward(self, x): raise KeyError("inside forward")
    return Model(3, 1), nn.MSELoss(), x, y
def backward():
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): return x.clone()
        @staticmethod
        def backward(ctx, g): raise IndexError("inside backward")
    class Model(nn.Linear):
        def forward(self, x): return Function.apply(super().forward(x))
    return Model(3, 1), nn.MSELoss(), x, y
class Returns(nn.Linear):
    def forward(self, x): return {"loss": super().forward(x).mean()}
def dictionary(): return Returns(3, 1), None, x
def many(): return nn.Linear(3, 1), None, x
def unreduced(): return nn.Linear(3, 1), nn.MSELoss(reduction="none"), x, y
def frozen(): return nn.Linear(3, 1).requires_grad_(False), nn.MSELoss(), x, y
def with_arguments(size): pass
thing = 3
def prints():
    print("downloading ...")
    return nn.Linear(3, 1), nn.MSELoss(), x, y
"""
MODULES = {
    "syntax": "def setup(:",
    "raises": "raise RuntimeError('at import')",
    "exits": "import sys; sys.exit(4)",
    "missing": "import nosuchmodule",
    "half": "from made import nosuch",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "made.py").write_text(FACTORIES)
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for name in ("made", *MODULES):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("made:boom", "made:boom failed: ValueError: my data is missing (made.py, line 14)"),
        ("made:key", "made:key failed: KeyError: 'data' (made.py, line 15)"),
        ("made:own", "made.Own: first line second line (made.py, line 16)"),
        ("made:quits", "SystemExit: 3 (made.py, line 17)"),
        ("made:base", "made.Base: not even an Exception"),
        ("made:mute", "Mute: <exception str() failed>"),
        ("made:recursion", "RecursionError: maximum recursion depth exceeded"),
        ("made:lists", "must return (model, criterion, inputs, targets)"),
        ("made:nothing", "it returned a NoneType"),
        ("made:two", "it returned (Linear, MSELoss)"),
        ("made:swapped", "the model (MSELoss) has no parameter that requires a gradient"),
        ("made:no_targets", "must return targets too"),
        ("made:text", "criterion must be an nn.Module or a callable (outputs, targets) -> loss, got 'mse'"),
        ("made:several", "inputs is a list, so one argument: return a tuple for several"),
        ("made:locked", "cannot be copied, which measuring needs: cannot pickle '_thread.lock' object"),
        ("made:forward", "KeyError: 'inside forward' (made.py, line 36)"),
        ("made:backward", "IndexError: inside backward"),
        ("made:dictionary", "with criterion None, must return the loss, a tensor of one number (or have it as .loss)"),
        ("made:many", "needs a model that returns a scalar loss"),
        ("made:unreduced", "reduction"),
        ("made:frozen", "the model (Linear) has no parameter that requires a gradient"),
        ("made:with_arguments", "without arguments, got with_arguments(size)"),
        ("made:thing", "has no function 'thing'"),
        ("made:__name__", "has no function '__name__'"),
        ("syntax:setup", "syntax cannot be imported: SyntaxError: invalid syntax (syntax.py, line 1)"),
        ("raises:setup", "raises cannot be imported: RuntimeError: at import (raises.py, line 1)"),
        ("exits:setup", "exits cannot be imported: SystemExit: 4 (exits.py, line 1)"),
        ("missing:setup", "No module named 'nosuchmodule'"),
        ("half:setup", "cannot import name 'nosuch' from 'made'"),
        ("..made:setup", "'..made' is no name of a module"),
        (".:setup", "'.' is no name of a module"),
        ("a/b:setup", "'a/b' is no name of a module"),
        ("\x1b[31mred:setup", "is no name of a module"),
    ],
)
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_what_fails_is_one_line(
    spec: str, said: str, form: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["critical-lr", spec, *form]) == 2
    out = capsys.readouterr()
    assert out.out == ""
    lines = out.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("catapult-opt: error: ") and said in lines[0]
    assert "\x1b" not in out.err


def test_what_the_factory_prints_does_not_spoil_the_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["critical-lr", "made:prints", "--json"]) == 0
    out = capsys.readouterr()
    assert len(json.loads(out.out)) == 7
    assert out.err == "downloading ...\n"


def test_a_present_folder_that_is_gone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "gone").mkdir()
    os.chdir(folder / "gone")
    (folder / "gone").rmdir()
    assert main(["critical-lr", "made:prints"]) == 2
    assert "the present folder cannot be read (No such file or directory)" in capsys.readouterr().err
