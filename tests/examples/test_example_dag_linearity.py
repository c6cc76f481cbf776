"""examples/dag_linearity.py runs as a user runs it, and shows what it says."""

import csv
from pathlib import Path

import pytest
from scripts import run_here

from catapult_opt.analysis.dag import log_log_slope

SCRIPT = Path(__file__).parents[2] / "examples" / "dag_linearity.py"


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("dag_linearity")
    result = run_here(SCRIPT, "--quick", "--out", out, "--seeds", 2)
    assert result.returncode == 0
    return out, result


def test_wide_networks_become_linear_and_the_narrow_one_does_not(quick):
    out, _ = quick
    rows = list(csv.DictReader((out / "linearity.csv").open()))
    assert len(rows) == 3 * 4 * 2

    def slope(name, key):
        mine = [row for row in rows if row["architecture"] == name]
        return log_log_slope([float(r["width"]) for r in mine], [float(r[key]) for r in mine]).value

    for key in ("kernel_change", "hessian", "deviation"):
        for name in ("FCN", "half DenseNet"):
            assert slope(name, key) < -0.25
            assert slope("narrow layer", key) > slope(name, key) + 0.2


def test_it_prints_a_table_and_leaves_pictures(quick):
    out, result = quick
    for words in ("kernel change", "half DenseNet", "95 % intervals", f"to {out}"):
        assert words in result.stdout
    assert "\x1b" not in result.stdout, "colour codes in a pipe"
    assert "Warning" not in result.stderr
    pytest.importorskip("matplotlib")
    for name in ("graphs.png", "linearity.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
        assert name in result.stdout


def test_bad_arguments_are_named(tmp_path):
    result = run_here(SCRIPT, "--seeds", "0", "--out", tmp_path / "out")
    assert result.returncode == 2
    assert "must be at least 1, got 0" in result.stderr
    assert not (tmp_path / "out").exists()
    result = run_here(SCRIPT, "--help")
    assert result.returncode == 0
    assert "--quick" in result.stdout
