"""The schedule made by hand beside CatapultSGD's own: same start, rates by the table, a verdict both ways."""

import copy

import pytest
import torch
from torch import nn

from catapult_opt import CatapultPolicy
from catapult_opt.analysis.reproduce import ARTEFACTS, automatic
from catapult_opt.analysis.reproduce.artefact import Data
from catapult_opt.analysis.reproduce.feature_tasks import task_and_model

ARTEFACT = next(artefact for artefact in ARTEFACTS if artefact.name == "automatic-4.8")
SPEC = {"n": 60, "width": 32, "depth": 2, "lr": 1.0, "rates": [3.0, 2.0], "at": [4, 7], "steps": 10}
SETTING = {"d": 10, "n_eval": 50, "evaluate_every": 4, "measure_every": 3, "seeds": 1, "tasks": {"rank-2": SPEC}}


@pytest.fixture(scope="module")
def results():
    torch.manual_seed(0)
    return {case["method"]: automatic._run(SETTING, case, Data()) for case in ARTEFACT.cases(SETTING)}


def test_the_hand_made_schedule_is_gradient_descent_by_the_table(results):
    task, model = task_and_model(SETTING, "rank-2", 0, Data())
    losses = []
    for lr in [1.0] * 4 + [3.0] * 3 + [2.0] * 3:
        loss = nn.functional.mse_loss(model(task.train.inputs), task.train.targets)
        losses.append(float(loss.detach()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
                p -= lr * g
    found = results[automatic.HAND]
    assert found["curves"]["lr"] == [1.0] * 4 + [3.0] * 3 + [2.0] * 3
    assert found["curves"]["loss"] == pytest.approx(losses, rel=1e-4)
    last = nn.functional.mse_loss(model(task.test.inputs), task.test.targets).item()
    assert found["last_test_loss"] == pytest.approx(last, rel=1e-4)


def test_both_start_alike_and_report_what_they_were_at_the_best_validation_loss(results):
    theirs, ours = results[automatic.HAND]["curves"], results[automatic.OURS]["curves"]
    assert theirs["loss"][0] == ours["loss"][0]
    policy = CatapultPolicy()
    part = policy.start * (1 + policy.climb)  # it begins below the critical rate
    assert part < 1 and ours["lr"][0] == pytest.approx(part * ours["eta_crit"][0], rel=1e-3)
    for found in results.values():
        curves = found["curves"]
        assert curves["step"] == [0, 4, 8, 10]
        best = curves["step"].index(found["best_step"])
        assert found["val_loss"] == pytest.approx(min(curves["val"]), rel=1e-5)
        assert found["test_loss"] == pytest.approx(curves["test"][best], rel=1e-5)


def records(ours, diverged=()):
    """Of the schedule, 0.5 on every seed, and these of CatapultSGD."""
    other = {"last_test_loss": 0.6, "alignment": 0.9, "catapults": 3}

    def result(method, seed, loss):
        end = float("inf") if seed in diverged and method == automatic.HAND else 0.01
        return {"test_loss": loss, "train_loss": end, **other}

    return [
        {"case": {"task": "rank-2", "method": method, "seed": seed}, "result": result(method, seed, loss)}
        for seed, value in enumerate(ours)
        for method, loss in ((automatic.HAND, 0.5), (automatic.OURS, value))
    ]


def test_the_verdict_goes_by_the_fresh_seeds_and_names_those_that_are_worse():
    judge = ARTEFACT.judge
    assert judge({}, records([0.9] * 3 + [0.1] * 5)).outcome == "holds"
    assert judge({}, records([0.1] * 3 + [0.9] * 5)).outcome == "fails"
    part = judge({}, records([0.1] * 3 + [0.1, 0.9, 0.1, float("nan"), 0.1]))
    assert part.outcome == "holds in part"
    assert "not better on seeds 4, 6" in part.why
    assert "lower on 3 of 5 seeds (and on 3 of the 3 that the policy was made with)" in part.measured
    assert judge({}, records([0.1])).outcome == "holds"  # no fresh seed: by all
    assert "diverges" in part.measured and "where the schedule" not in part.measured
    steady = judge({}, records([0.1] * 3 + [0.1, 0.2, 0.2, 0.2, 0.2], diverged=[0, 3])).measured
    assert "diverges on 1 of 5; CatapultSGD test loss" in steady
    assert steady.endswith("where the schedule does not diverge, 0.500 ± 0.000 against 0.200 ± 0.000")


def test_the_picture_has_a_column_for_each(results):
    figure = pytest.importorskip("matplotlib.figure").Figure(layout="constrained")
    cases = ARTEFACT.cases(SETTING)
    ARTEFACT.draw([{"case": case, "result": copy.deepcopy(results[case["method"]])} for case in cases], figure)
    assert len(figure.axes) == 8
    assert len(figure.axes[0].lines[0].get_ydata()) == 10
