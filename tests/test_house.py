"""Promise: the house stays one that a reader finds the way in: imports run one way, rooms and classes are small.

Oracle: the source itself, read by `ast`, against the map that the documentation shows.
"""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted((ROOT / "catapult_opt").rglob("*.py"))
MAP = ROOT / "docs" / "figures" / "house.py"
# The public faces take what torch's optimizers take, and how to measure.
FACES = {"CatapultSGD", "CatapultLR", "CatapultMonitor", "CatapultPolicy"}


def the_map() -> Any:
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("house", MAP)
    assert spec is not None and spec.loader is not None
    house = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(house)
    return house


def test_every_module_is_on_the_map_and_imports_run_one_way() -> None:
    the_map().check()


def test_the_map_would_see_an_import_that_runs_upwards(monkeypatch: pytest.MonkeyPatch) -> None:
    house = the_map()
    right = house.imports()
    monkeypatch.setattr(house, "imports", lambda: right | {("policy", "controller")})
    with pytest.raises(AssertionError, match=r"upwards: \[\('policy', 'controller'\)\]"):
        house.check()
    monkeypatch.setattr(house, "imports", lambda: right | {("memory", "policy"), ("policy", "memory")})
    with pytest.raises(AssertionError, match="import each other"):
        house.check()


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_classes_and_constructors_are_small(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.ClassDef):
            continue
        assert (node.end_lineno or 0) - node.lineno < 250, f"class {node.name}"
        for f in node.body:
            if isinstance(f, ast.FunctionDef) and f.name == "__init__" and node.name not in FACES:
                arguments = [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs]
                assert len(arguments) - 1 <= 8, f"{node.name}.__init__"


def test_nothing_but_the_command_line_imports_the_analysis() -> None:
    for path in MODULES:
        if path.stem not in ("cli", "commands"):
            assert "catapult_opt.analysis" not in _code(path), path


def _code(path: Path) -> str:
    """The imports of a module, also those made by name."""
    nodes = ast.walk(ast.parse(path.read_text()))
    imports = [node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom, ast.Call))]
    return "\n".join(ast.unparse(node) for node in imports)
