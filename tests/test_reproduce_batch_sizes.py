"""Table 4.1 and Figure 4.9 can come out either way, and a tiny run of them runs."""

import pytest

from catapult_opt.analysis.reproduce.artefact import Data
from catapult_opt.analysis.reproduce.batch_sizes import ARTEFACTS

FIGURE, TABLE = ARTEFACTS


def record(size, seed, loss, alignment, share, task="rank-2"):
    result = {"test_loss": loss, "alignment": alignment, "super_critical_share": share}
    return {"case": {"task": task, "batch_size": size, "seed": seed}, "result": result}


def records(*rows):
    return [record(size, seed, loss + seed / 100, a, share) for seed in (0, 1) for size, loss, a, share in rows]


@pytest.mark.parametrize(
    ("rows", "outcome"),
    [
        ([(2000, 0.7, 0.8, 0.0), (50, 0.6, 0.85, 0.1), (5, 0.4, 0.9, 0.5)], "holds"),
        ([(2000, 0.7, 0.8, 0.0), (50, 0.8, 0.85, 0.1), (5, 0.4, 0.9, 0.5)], "holds in part"),
        ([(2000, 0.4, 0.8, 0.0), (50, 0.6, 0.85, 0.1), (5, 0.7, 0.9, 0.5)], "fails"),
        ([(2000, 0.7, 0.9, 0.0), (5, 0.4, 0.8, 0.5)], "fails"),
        ([(2000, 0.7, 0.8, 0.0), (5, float("nan"), float("nan"), 0.5)], "fails"),
    ],
)
def test_verdict_of_made_up_records(rows, outcome):
    assert TABLE.judge({}, records(*rows)).outcome == outcome
    assert FIGURE.judge({"tasks": ["rank-2"]}, records(*rows)).outcome == outcome


def test_a_tiny_run_counts_super_critical_steps():
    setting = {
        **TABLE.scales["quick"], "d": 10, "width": 64, "n_train": 60, "n_eval": 50, "max_steps": 60,
        "evaluate_every": 10, "batch_sizes": [5, 60], "measure_every": 1,
    }  # fmt: skip
    small, full = TABLE.cases(setting)
    results = {case["batch_size"]: TABLE.run(setting, case, Data()) for case in (small, full)}
    assert results[5]["super_critical"] > 0
    assert results[60]["super_critical_share"] == 0
    assert results[5]["lr"] == results[60]["lr"]
    assert 0 < results[5]["alignment"] <= 1
