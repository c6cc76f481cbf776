"""Promise: every test that the documentation's matrix of frameworks and features names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from framework_loop import FEATURES

ROOT = Path(__file__).parents[2]
CELL = re.compile(r"`(test_\w+)::(test_\w+)(?:\[([^\]]+)\])?`")
FRAMEWORKS, FEATURES_OF_THE_MATRIX = 5, 9


def rows() -> list[list[str]]:
    lines = (ROOT / "docs" / "howto" / "frameworks.md").read_text(encoding="utf-8").splitlines()
    start = lines.index("| | PyTorch loop | Lightning | Lightning, manual | HF Trainer | Accelerate |")
    table = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    return table


def test_every_cell_names_a_test_or_says_why_not() -> None:
    table = rows()
    assert len(table) == FEATURES_OF_THE_MATRIX and all(len(row) == 1 + FRAMEWORKS for row in table)
    missing = [cell for row in table for cell in row[1:] if not CELL.fullmatch(cell)]
    assert missing == ["needs a GPU: not tested"] * 2


def test_every_test_named_exists() -> None:
    for row in rows():
        for module, function, parameter in CELL.findall(" ".join(row)):
            [path] = (ROOT / "tests").glob(f"*/{module}.py")
            source = path.read_text(encoding="utf-8")
            found = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
            assert function in found, f"{module}::{function}"
            if parameter:
                decorators = " ".join(ast.unparse(d) for d in found[function].decorator_list)
                assert f"'{parameter}'" in decorators or (parameter in FEATURES and "FEATURES" in decorators), parameter
