"""What the generalization benchmark makes of its runs: ratios, geometric means, intervals and the page, by hand."""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from generalization import main  # noqa: E402
from outcomes import Found, Outcome, line, lines, lines_against_each, named, read, told, tuned, untuned  # noqa: E402
from page import markdown  # noqa: E402
from paired import geometric_mean, interval, ratio  # noqa: E402

sys.path.remove(str(BENCHMARKS))

INF = math.inf


def test_interval_of_a_median_is_that_of_all_resamples() -> None:
    """Of five values there are 5^5 resamples; the interval of random ones ends at the same values."""
    values = [0.3, -1.2, 2.5, 0.9, -0.1]
    every = [np.median(draw) for draw in itertools.product(values, repeat=5)]
    assert interval(values) == tuple(np.quantile(every, [0.025, 0.975]))
    assert interval([0.7]) == (0.7, 0.7)


def test_interval_covers_the_median_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = [low <= 0 <= high for low, high in (interval(rng.standard_normal(10)) for _ in range(200))]
    assert 0.90 <= np.mean(hits) <= 0.99


def test_geometric_mean_by_hand() -> None:
    found = geometric_mean([1.0, 4.0])
    # A resample is one of (1, 1), (1, 4), (4, 1), (4, 4): each end has a quarter of them.
    assert (found.value, found.low, found.high) == pytest.approx((2, 1, 4))
    assert geometric_mean([0.5, 2.0, 1.0, 1.0]).value == pytest.approx(1)
    alone = geometric_mean([0.8])
    assert alone.value == pytest.approx(0.8) and math.isnan(alone.low)


def test_interval_of_a_geometric_mean_is_that_of_all_resamples_of_the_tasks() -> None:
    ratios = [0.5, 0.8, 1.1, 0.9, 0.6]
    every = [np.exp(np.mean(np.log(draw))) for draw in itertools.product(ratios, repeat=5)]
    found = geometric_mean(ratios)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(every, [0.025, 0.975])), rel=0.02)


def test_ratio_of_medians_resamples_the_seeds_of_both_together() -> None:
    # Resamples: the first pair twice 1 / 2, both 2 / 2.5, the second twice 3 / 3. Unpaired, 1 / 3 would be among them.
    found = ratio({1: 1.0, 2: 3.0}, {1: 2.0, 2: 3.0, 9: 7.0})
    assert (found.value, found.low, found.high) == pytest.approx((0.8, 0.5, 1))
    assert ratio({1: 1.0}, {2: 1.0}) is None


@pytest.mark.parametrize(("ours", "theirs", "expected"), [(1, INF, 0.1), (INF, 1, 10), (INF, INF, 1), (0.0, 1.0, 0.1)])
def test_a_divergence_counts_as_ten_times(ours: float, theirs: float, expected: float) -> None:
    seeds = range(3)
    assert ratio(dict.fromkeys(seeds, ours), dict.fromkeys(seeds, theirs)).value == pytest.approx(expected)


def outcome(name: str, kind: str, best: float, last: float, seeds: range = range(60, 64)) -> Outcome:
    """Values whose median is what is given."""
    spread = {s: 1 + (i - 1.5) / 100 for i, s in enumerate(seeds)}
    values = [{s: value * f for s, f in spread.items()} for value in (best, last)]
    return Outcome(name, name.upper(), kind, *values, seconds=dict.fromkeys(seeds, 1.0))


def found(name: str, base: str, *outcomes: Outcome) -> Found:
    return Found(name, "test loss", "mse", None, base, {o.name: o for o in outcomes})


TASKS = [
    found(
        "first", "sgd", outcome("sgd", "sgd", 2.0, 3.0), outcome("momentum", "sgd", 4.0, 2.5),
        outcome("adamw", "adamw", 1.0, 1.0), outcome("dog", "untuned", 5.0, 5.0),
        outcome("catapult", "catapult", 1.0, 2.0), outcome("capped", "control", 0.1, 0.1),
    ),
    found(
        "second", "adamw", outcome("adamw", "adamw", 2.0, 2.0), outcome("sgd", "sgd", 0.1, 0.1),
        outcome("dog", "untuned", 1.0, INF), outcome("catapult", "catapult", 4.0, 5.0),
    ),
    found("third", "sgd", outcome("sgd", "sgd", 1.0, 1.0)),
]  # fmt: skip


def test_references_are_the_lowest_medians_of_their_kind_and_of_the_tasks_base() -> None:
    first, second, _ = TASKS
    assert tuned(first, "best").name == "sgd" and tuned(first, "last").name == "momentum"
    assert tuned(second, "best").name == "adamw"  # what ours drives there
    assert untuned(first, "best").name == "dog"
    assert untuned(TASKS[2], "best") is None


def test_lines_over_the_tasks_that_have_both() -> None:
    best, last = (line(TASKS, "catapult", tuned, at) for at in ("best", "last"))
    assert best.tasks == 2 and best.task == "second"
    assert best.mean.value == pytest.approx(math.sqrt(1 / 2 * 4 / 2))
    assert best.worst.value == pytest.approx(2)
    assert last.mean.value == pytest.approx(math.sqrt(2 / 2.5 * 5 / 2))
    peer = line(TASKS, "catapult", untuned, "last")
    assert peer.mean.value == pytest.approx(math.sqrt(2 / 5 * 0.1)) and peer.task == "first"
    assert line(TASKS, "catapult", named("momentum"), "best").mean.value == pytest.approx(1 / 4)
    assert line(TASKS, "catapult", named("absent"), "best") is None
    assert [(ours, against) for ours, against, *_ in lines(TASKS)] == [
        ("CATAPULT", "best tuned SGD"), ("CATAPULT", "best untuned peer"),
    ]  # fmt: skip
    assert [label for label, *_ in lines_against_each(TASKS)] == ["SGD", "MOMENTUM", "ADAMW", "DOG"]  # no control


def test_file_of_results_gives_back_what_it_was_made_of() -> None:
    for task in TASKS:
        again = read(json.loads(json.dumps(told(task), allow_nan=False)))
        assert (again.name, again.base) == (task.name, task.base)
        for name, o in task.outcomes.items():
            assert again.outcomes[name].best == pytest.approx(o.best)
            assert again.outcomes[name].last == pytest.approx(o.last)
            assert again.outcomes[name].failures == o.failures == (4 if (task.name, name) == ("second", "dog") else 0)


def test_page_is_made_from_the_file_and_shows_what_lost() -> None:
    content = {
        "torch": "2", "python": "3", "tuning_seeds": [40, 41], "report_seeds": [60, 63], "policy": {},
        "tasks": [told(task) for task in TASKS],
    }  # fmt: skip
    page = markdown(json.loads(json.dumps(content)))
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert any(row.startswith("| CATAPULT | best tuned SGD | 2 | 1.00 (0.50 to 2.00) | 2.00 (") for row in rows)
    for task in TASKS:
        part = page.split(f"### {task.name}\n")[1].split("\n### ")[0]
        assert all(f"| {o.label} |" in part for o in task.outcomes.values())
    assert "| DOG |  | 1 (0.985 to 1) | diverged | 4 of 4 | 1.00 |" in page
    assert "| first | squared error, full batch | test loss | 2 (3) SGD | 5 (5) DOG | 1 (2) |  |" in rows


def test_published_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--quick", "--results", str(tmp_path / "runs.jsonl"), "--optimizers", "sgd", "adamw-1e-3", "catapult"]
    assert main([*arguments, "--publish", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "results-benchmark.json").read_text())
    assert [row["name"] for row in content["tasks"][0]["outcomes"]] == ["sgd", "adamw-1e-3", "catapult", "catapult-raw"]
    assert (tmp_path / "results-benchmark.md").read_text() == markdown(content)
    # Ours alone in a file of its own: the baselines are read from the other one, and not run again.
    (tmp_path / "ours.jsonl").touch()
    before = (tmp_path / "runs.jsonl").read_text()
    both = [str(tmp_path / name) for name in ("ours.jsonl", "runs.jsonl")]
    capsys.readouterr()
    assert main(["--quick", "--results", *both, "--optimizers", "sgd", "catapult-T"]) == 0
    assert (tmp_path / "runs.jsonl").read_text() == before
    assert [json.loads(line)["contender"] for line in (tmp_path / "ours.jsonl").read_text().splitlines()] == [
        "catapult-T"
    ] * 2
    assert "best tuned SGD" in capsys.readouterr().out
