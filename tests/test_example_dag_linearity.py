"""examples/dag_linearity.py runs as a user runs it, and shows what it says."""

import csv
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from catapult_opt.analysis.dag import log_log_slope

SCRIPT = Path(__file__).parent.parent / "examples" / "dag_linearity.py"


def run(*args):
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("dag_linearity")
    return out, run("--quick", "--out", out, "--seeds", 2)


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


def test_bad_arguments_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    main = importlib.import_module("dag_linearity").main

    def exits(*args):
        with pytest.raises(SystemExit) as caught:
            main(list(args))
        return caught.value.code, capsys.readouterr()

    status, shown = exits("--seeds", "0", "--out", str(tmp_path / "out"))
    assert status == 2
    assert "must be at least 1, got 0" in shown.err
    assert not (tmp_path / "out").exists()
    status, shown = exits("--help")
    assert status == 0
    assert "--quick" in shown.out
