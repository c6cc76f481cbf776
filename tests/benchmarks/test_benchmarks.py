"""The benchmarks run and print their table. Their figures are not tested: a shared machine is no place for that."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
from scripts import run_here

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_curvature_quick(tmp_path: Path) -> None:
    path = tmp_path / "numbers.json"
    arguments = ["--quick", "--no-peers", "--families", "MLP", "CNN", "--json", str(path)]
    run = run_here(BENCHMARKS / "curvature.py", *arguments)
    assert run.returncode == 0, run.stderr
    for row in (
        "curvature product",
        "ours, cold",
        "ours, warm",
        "overhead",
        "median error of eta_crit",
        "held",
        "peak",
    ):
        assert row in run.stdout
    results = json.loads(path.read_text())["results"]
    assert [r["family"] for r in results] == ["MLP", "CNN"]
    for r in results:
        assert r["plain_seconds"] and r["product_seconds"] and r["training_errors"]
        assert set(r["estimates"]) == {"ours, cold", "ours, warm", "ours, cold, exact products"}


def test_absent_package_is_skipped_with_a_line_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setitem(sys.modules, "curvlinops", None)
    said = importlib.import_module("peers").PEERS[0].missing()
    assert "curvlinops" in said and "pip install --no-deps -r constraints-bench.txt" in said
