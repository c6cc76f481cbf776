"""examples/quadratic_model.py runs as it stands and shows the three regimes."""

import math
from pathlib import Path

import pytest
from scripts import run_here


@pytest.fixture(scope="module")
def rows():
    script = Path(__file__).parents[2] / "examples" / "quadratic_model.py"
    result = run_here(script)
    assert result.returncode == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    table = {
        (line[1], line[0]): [float(v) for v in line[2:]] for line in lines if len(line) == 5 and line[0][0].isdigit()
    }
    assert len(table) == 9, result.stdout
    return table


def test_below_the_critical_rate_all_three_agree(rows):
    first, highest, last = rows["f", "0.9"]
    assert last < 0.01 * first == 0.01 * highest
    for name in ("f_lin", "f_quad"):
        assert rows[name, "0.9"] == pytest.approx([first, highest, last], rel=0.2)


def test_above_it_f_and_f_quad_catapult_and_f_lin_diverges(rows):
    for name in ("f", "f_quad"):
        first, highest, last = rows[name, "1.5"]
        assert highest > 10 * first > 100 * last
    assert math.isinf(rows["f_lin", "1.5"][1])


def test_above_twice_the_critical_rate_f_quad_diverges(rows):
    assert math.isinf(rows["f_quad", "2.5"][1])
    assert rows["f", "2.5"][2] < rows["f", "2.5"][0]
