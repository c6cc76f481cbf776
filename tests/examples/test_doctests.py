"""Promise: the examples in docstrings and on the pages of the documentation run.

Pages: the blocks marked `python`, in order, as one program a page; those marked `py` are parts of scripts.
"""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import catapult_opt
import catapult_opt.analysis

ROOT = Path(__file__).parents[2]
MODULES = sorted(
    {
        info.name
        for package in (catapult_opt, catapult_opt.analysis)
        for info in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
        if not info.name.endswith("__main__")
    }
)
PAGES = sorted(p for p in [*ROOT.glob("docs/**/*.md"), ROOT / "README.md"] if "```python\n" in p.read_text())


def test_every_module_is_found() -> None:
    files = {p.stem for folder in ("catapult_opt", "analysis") for p in (ROOT / folder).rglob("*.py")}
    assert files - {"__init__", "__main__"} <= {name.rpartition(".")[2] for name in MODULES}


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name: str) -> None:
    if name.endswith((".plots", ".picture")):
        pytest.importorskip("matplotlib")
    torch.manual_seed(0)
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0, "the examples that failed are printed above"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_pages(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    exec(compile("\n".join(blocks), str(page), "exec"), {"__name__": "page"})
