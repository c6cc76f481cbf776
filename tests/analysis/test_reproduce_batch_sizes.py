"""Table 4.1 and Figure 4.9 can come out either way, and a tiny run of them runs."""

import pytest

from catapult_opt.analysis.reproduce.artefact import Data
from catapult_opt.analysis.reproduce.batch_sizes import ARTEFACTS

KNOWN = {artefact.name: artefact for artefact in ARTEFACTS}
FIGURE, TABLE = KNOWN["fig-4.9"], KNOWN["table-4.1"]


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


def test_the_figure_counts_catapults_and_the_table_does_not():
    rows = [(2000, 0.7, 0.8, 0.2), (50, 0.6, 0.85, 0.1), (5, 0.4, 0.9, 0.5)]
    assert TABLE.judge({}, records(*rows)).outcome == "holds"
    assert FIGURE.judge({"tasks": ["rank-2"]}, records(*rows)).outcome == "holds in part"


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


@pytest.mark.parametrize("name", ["fig-c.19", "fig-c.20"])
def test_validation_losses_can_hold_and_fail(name):
    def with_validation(losses):
        return [
            {"case": {"task": "rank-2", "batch_size": size, "seed": 0}, "result": {"val_loss": loss}}
            for size, loss in zip((2000, 50, 5), losses, strict=True)
        ]

    outcomes = [KNOWN[name].judge({}, with_validation(v)).outcome for v in ((3, 2, 1), (2, 3, 1), (1, 2, 3))]
    assert outcomes == ["holds", "holds in part", "fails"]


def test_parameterisation_and_rate_are_the_setting_s():
    small = {
        "d": 10,
        "width": 64,
        "n_train": 60,
        "n_eval": 50,
        "max_steps": 10,
        "evaluate_every": 5,
        "batch_sizes": [5],
    }
    setting = {**KNOWN["fig-c.18"].scales["quick"], **small}
    result = KNOWN["fig-c.18"].run(setting, {"task": "rank-2", "batch_size": 5, "seed": 0}, Data())
    assert result["lr"] == 0.01
    ntk = KNOWN["fig-c.21"].run(
        {**KNOWN["fig-c.21"].scales["quick"], **small}, {"task": "rank-4", "batch_size": 5, "seed": 0}, Data()
    )
    assert ntk["lr"] > 0.1
