"""The generalization benchmark: its statistics, its grids, its pairing, its controls, and going on after a kill.

Its figures are not tested. Everything here runs on tasks of a few dozen samples.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from contenders import CONTENDERS, code_of  # noqa: E402
from controls import BELOW, RandomSpikes, place  # noqa: E402
from drivers import Driver, Setup  # noqa: E402
from generalization import QUICK_TASK, main, policy_change, seeds  # noqa: E402
from outcomes import find  # noqa: E402
from paired import compare, difference  # noqa: E402
from protocol import Plan, Rates, Record, Results, Run, best_rate, is_interior, next_rates, scores, train  # noqa: E402
from summary import table  # noqa: E402
from tasks import TASKS, Task, criterion, draw  # noqa: E402

from catapult_opt import CatapultPolicy, CatapultSGD, critical_lr  # noqa: E402

sys.path.remove(str(BENCHMARKS))

TASK = dataclasses.replace(QUICK_TASK, name="tiny", steps=12)
INSTALLED = [name for name, c in CONTENDERS.items() if c.missing() is None]


def test_failures_count_as_the_worst() -> None:
    ours, theirs = {s: 1.0 + s / 100 for s in range(10)}, dict.fromkeys(range(10), math.inf)
    assert compare(ours, theirs).verdict == "win"
    assert compare(theirs, ours).verdict == "loss"
    assert compare(theirs, theirs).verdict == "tie"
    assert difference(math.inf, math.inf) == 0
    one_failed = {**{s: 0.9 + s / 100 for s in range(10)}, 3: math.inf}
    assert compare(one_failed, ours).verdict == "win"  # nine of ten better: the median sees through one failure
    assert compare({1: 0.0}, {2: 0.0}) is None


@pytest.mark.parametrize("optimum", [-9, -2, 0, 3, 11])
@pytest.mark.parametrize("edge", [1, 2, 30])  # doublings above the optimum from which on runs fail
def test_grid_is_extended_until_the_optimum_is_inside(optimum: int, edge: int) -> None:
    scored: dict[float, float] = {}
    while rates := next_rates(scored, start=1.3):
        assert not set(rates) & set(scored)
        for lr in rates:
            octaves = math.log2(lr) - optimum
            scored[lr] = math.inf if octaves >= edge else octaves**2
    assert best_rate(scored) == 2.0**optimum
    assert is_interior(scored)
    assert {2.0 ** (optimum - 1), 2.0 ** (optimum + 1)} <= set(scored)
    assert len(scored) <= 6 + abs(optimum)  # and no further


def test_grid_ends_where_everything_fails_or_nothing_matters() -> None:
    for objective in (lambda lr: math.inf, lambda lr: lr, lambda lr: -lr):
        scored: dict[float, float] = {}
        while rates := next_rates(scored, start=1.0):
            scored |= {lr: objective(lr) for lr in rates}
        assert 15 <= len(scored) <= 20
        assert not is_interior(scored)


def test_a_rate_counts_once_all_tuning_seeds_are_there_and_not_if_one_failed() -> None:
    def record(lr: float, seed: int, val: float, failed: bool = False) -> Record:
        return {"lr": lr, "seed": seed, "failed": failed, "best": {"val": val}}

    records = [record(1.0, 0, 0.2), record(1.0, 1, 0.4), record(2.0, 0, 0.1), record(1.0, 7, 9.0)]
    assert scores(records, (0, 1)) == {1.0: pytest.approx(0.3)}
    records.append(record(2.0, 1, 0.1, failed=True))
    assert scores(records, (0, 1)) == {1.0: pytest.approx(0.3), 2.0: math.inf}


def test_same_seed_same_weights_and_order_for_everybody() -> None:
    task = dataclasses.replace(TASK, batch=10, steps=10)
    followed = train(Run(task, "catapult", 3), None)
    seen = set()
    for name in INSTALLED:
        contender = CONTENDERS[name]
        given = contender.follows(followed) if contender.follows else None
        record = train(Run(task, name, 3, 0.05 if contender.tuned else None, given), None)
        seen.add((record["weights"], record["order"]))
    assert seen == {(followed["weights"], followed["order"])}
    other = train(Run(task, "sgd", 4, 0.05), None)
    assert other["weights"] != followed["weights"] and other["order"] != followed["order"]


def test_every_epoch_is_a_new_order_of_all_rows() -> None:
    problem = draw(dataclasses.replace(TASK, batch=10), None, 0)
    batches = [rows for rows, _ in zip(problem.batches(0), range(8), strict=False)]
    epochs = torch.cat(batches[:4]), torch.cat(batches[4:])
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(40))
    assert not torch.equal(*epochs)


def test_a_plain_run_is_torch_by_hand() -> None:
    """Value at the best validation loss and at the last step, of SGD with a cosine, against a loop written out."""
    task = dataclasses.replace(TASK, steps=20)
    record = train(Run(task, "momentum-cosine", 5, 0.1), None)
    problem = draw(task, None, 5)
    torch.manual_seed(10_005)
    model, loss = problem.build(), nn.MSELoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    found = []
    for step in range(20):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * step / 20))
        optimizer.zero_grad()
        loss(model(problem.train.inputs), problem.train.targets).backward()
        optimizer.step()
        with torch.no_grad():
            found.append(
                (float(loss(model(problem.val.inputs), problem.val.targets)),
                 float(loss(model(problem.test.inputs), problem.test.targets)))
            )  # fmt: skip
    assert record["best"]["value"] == pytest.approx(min(found)[1], rel=1e-4)
    assert record["last"]["value"] == pytest.approx(found[-1][1], rel=1e-4)
    assert not record["failed"]


def test_divergence_is_a_failure() -> None:
    record = train(Run(TASK, "sgd", 3, 1e6), None)
    assert record["failed"] and record["steps"] <= TASK.steps


def applied_rates(
    name: str, task: Task, given: Any = None, lr: float | None = None, build: Any = None
) -> list[tuple[float, float, float]]:
    """(rate, critical rate found independently, loss) of every step of a training."""
    problem = draw(task, None, 3)
    torch.manual_seed(10_003)
    model, loss_of = problem.build(), criterion(task)
    torch.manual_seed(3)
    driver = (build or CONTENDERS[name].build)(Setup(model, loss_of, task.steps, 3, lr, given))
    out = []
    for _, rows in zip(range(task.steps), problem.batches(3), strict=False):
        x, y = problem.train.inputs[rows], problem.train.targets[rows]
        critical = _critical(model, loss_of, x, y)
        driver.optimizer.zero_grad()
        loss = loss_of(model(x), y)
        loss.backward()
        before = [p.detach().clone() for p in model.parameters()]
        driver.step(loss.item(), x, y)
        moved = {
            (b - p.detach()).norm().item() / p.grad.norm().item()
            for b, p in zip(before, model.parameters(), strict=True)
        }
        assert max(moved) == pytest.approx(min(moved), rel=0.02)  # one rate
        assert driver.rate == pytest.approx(max(moved), rel=0.02)
        out.append((driver.rate, critical, loss.item()))
    return out


def _critical(model: nn.Module, loss_of: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """2 / lambda_max of the Gauss-Newton matrix, from an explicit Jacobian in float64."""
    params = {name: p.detach().double() for name, p in model.named_parameters()}

    def outputs(p: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, p, (x.double(),)).flatten()

    jacobian = torch.func.jacrev(outputs)(params)
    full = torch.cat([j.flatten(1) for j in jacobian.values()], 1)
    lambda_max = 2 / len(full) * torch.linalg.eigvalsh(full @ full.T)[-1].item()
    return 2 / lambda_max


def test_capped_control_never_goes_above_critical_where_the_controller_does() -> None:
    task = dataclasses.replace(TASK, steps=130, width=16)
    rates = applied_rates("capped", task)
    assert all(rate <= (BELOW + 0.01) * critical for rate, critical, _ in rates)
    assert any(rate >= (BELOW - 0.02) * critical for rate, critical, _ in rates)  # it is the cap that binds
    assert any(rate > 1.02 * critical for rate, critical, _ in applied_rates("catapult", task))


def test_capped_control_without_its_cap_is_catapult_sgd(monkeypatch: pytest.MonkeyPatch) -> None:
    def every_step(setup: Setup) -> Driver:
        optimizer = CatapultSGD(setup.model.parameters(), model=setup.model, criterion=setup.criterion, every=1)
        return Driver(setup.model, optimizer)

    # Measurements to 5 % from other start vectors: later on the two part.
    task = dataclasses.replace(TASK, steps=20, width=24)
    monkeypatch.setattr("controls.BELOW", math.inf)
    uncapped, ours = (applied_rates("capped", task, build=build) for build in (None, every_step))
    assert [r for r, *_ in uncapped] == pytest.approx([r for r, *_ in ours], rel=1e-3)


def test_tracking_is_a_fixed_multiple_of_the_critical_rate() -> None:
    rates = applied_rates("tracking", TASK, lr=0.7)
    assert [rate / critical for rate, critical, _ in rates] == pytest.approx([0.7] * len(rates), rel=0.02)


def test_mean_rate_control_is_the_mean_of_the_rates_applied() -> None:
    followed = train(Run(TASK, "catapult", 3), None)
    rates = [rate for rate, *_ in applied_rates("catapult", TASK)]
    assert followed["mean_rate"] == pytest.approx(np.mean(rates), rel=1e-3)
    given = CONTENDERS["mean-rate"].follows(followed)
    control = {rate for rate, *_ in applied_rates("mean-rate", TASK, given=given)}
    assert control == {followed["mean_rate"]}


def test_random_spikes_are_as_many_and_as_long() -> None:
    lengths = [3, 1, 5, 2]
    for seed in range(20):
        placed = place(lengths, 30, random.Random(seed))
        assert len(placed) == 30
        assert sorted(placed.count(k) for k in range(4)) == sorted(lengths)
        for k in range(4):  # in one piece
            at = [i for i, spike in enumerate(placed) if spike == k]
            assert at == list(range(at[0], at[0] + lengths[k]))
    assert place(lengths, 30, random.Random(0)) != place(lengths, 30, random.Random(1))
    assert place([], 4, random.Random(0)) == [None] * 4
    assert place([4], 4, random.Random(0)) == [0] * 4


def test_random_spikes_raise_the_rate_then_and_only_then() -> None:
    above = {"lengths": [2, 1], "up": 1.5, "down": 0.8}
    rule = RandomSpikes(above, 12, seed=4)
    up = [rule(0.0, 1.0, 1.0) for _ in range(12)]
    assert [rate > 1 for rate in up] == [spike is not None for spike in rule.raised]
    assert set(up) == {1.5, 0.8}
    quenched = RandomSpikes({**above, "lengths": [4]}, 4, seed=4)
    assert [quenched(0.0, 1.0, loss) for loss in (1.0, 2.0, 31.0, 2.0)] == [1.5, 1.5, 0.8, 0.8]
    held = RandomSpikes({**above, "lengths": [3]}, 3, seed=4)
    assert [held(0.0, eta_crit, 1.0) for eta_crit in (1.0, 2.0, 0.5)] == [1.5, 1.5, 0.75]


def test_stays_above_the_critical_rate_are_counted_from_what_was_measured() -> None:
    class Observer:
        last = SimpleNamespace(eta_crit=2.0)

    rates = Rates()
    for rate in (1.0, 3.0, 5.0, 2.0, 4.0, 1.5):
        rates.add(SimpleNamespace(rate=rate, observer=Observer))
    assert rates.mean == 16.5 / 6
    assert rates.above == {"lengths": [2, 1], "up": 2.0, "down": 0.75}
    unmeasured = Rates()
    unmeasured.add(SimpleNamespace(rate=1.0, observer=None))
    assert unmeasured.above is None


def test_controls_take_over_from_the_run_of_the_same_seed() -> None:
    plan = Plan((TASK,), ("random-spikes", "mean-rate"), tuning_seeds=(0,), report_seeds=(3, 4))
    results = MemoryResults()
    assert {run.contender for run in plan.missing(TASK, results)} == {"catapult"}
    for run in plan.missing(TASK, results):
        results.add(fake(run, mean_rate=float(run.seed), above=[run.seed]))
    controls = plan.missing(TASK, results)
    assert {(run.contender, run.seed, str(run.given)) for run in controls} == {
        ("random-spikes", 3, "[3]"), ("random-spikes", 4, "[4]"), ("mean-rate", 3, "3.0"), ("mean-rate", 4, "4.0"),
    }  # fmt: skip


class MemoryResults(Results):
    """Without a file."""

    def __init__(self) -> None:
        self.records = {}

    def add(self, record: Record) -> None:
        self.records[record["key"]] = record


def fake(run: Run, value: float = 1.0, **extra: Any) -> Record:
    entry = {"step": 1, "seconds": 1.0, "val": value, "value": value}
    base = {"key": run.key, "setting": run.setting, "contender": run.contender, "seed": run.seed, "lr": run.lr}
    kept = {
        "views": {},
        "failed": math.isinf(value),
        "best": entry,
        "last": entry,
        "evaluations": [entry],
        "seconds": 2.0,
    }
    return {**base, **kept, "catapults": None, **extra}


def test_plan_tunes_then_reports_and_asks_for_nothing_twice() -> None:
    plan = Plan((TASK,), ("sgd-cosine",))
    results, asked = MemoryResults(), []
    while runs := plan.missing(TASK, results):
        asked += runs
        for run in runs:
            assert run.lr is not None
            # The cosine's best rate is twice the constant's, which is 2^-6.
            best = -5 if run.contender == "sgd-cosine" else -6
            results.add(fake(run, abs(math.log2(run.lr) - best) + 1))
    assert len({run.key for run in asked}) == len(asked)
    reported = {(run.contender, run.lr) for run in asked if run.seed in plan.report_seeds}
    assert reported == {("sgd", 2.0**-6), ("sgd-cosine", 2.0**-5)}
    assert {run.seed for run in asked} == {*plan.tuning_seeds, *plan.report_seeds}
    assert find(plan, TASK, results).outcomes["sgd-cosine"].lr == 2.0**-5


def test_other_policy_or_defaults_or_task_is_another_run() -> None:
    plain = Run(TASK, "catapult", 3)
    assert Run(TASK, "catapult", 3).key == plain.key
    assert Run(TASK, "catapult", 3, policy={"total_steps": 77}).key != plain.key
    assert Run(dataclasses.replace(TASK, steps=13), "catapult", 3).key != plain.key
    assert Run(TASK, "catapult-T", 3).key != plain.key
    assert CONTENDERS["catapult"].settings["policy"] == dataclasses.asdict(CatapultPolicy())
    sgd = Run(TASK, "sgd", 3, 0.1)
    assert Run(TASK, "sgd", 3, 0.1, policy={"total_steps": 77}).key == sgd.key  # does not concern it


def test_code_is_the_same_whatever_is_said_about_it() -> None:
    plain = "def f(x: int) -> int:\n    return x + 1\n"
    told = '"""Module."""\n\ndef f(x: int) -> int:  # a comment\n    """Adds."""\n\n    return x + 1\n'
    assert code_of(told) == code_of(plain)
    assert code_of(plain.replace("+ 1", "+ 2")) != code_of(plain)


def test_missing_data_is_known_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "runs.jsonl"
    assert main(["--tasks", "rank2", "usps-noise", "--data", str(tmp_path), "--results", str(path)]) == 1
    assert not path.exists()
    message = capsys.readouterr().err
    assert "USPS" in message and "--tasks rank2" in message


def test_policy_change_reaches_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    class Told(CatapultSGD):
        def __init__(self, *args: Any, policy: CatapultPolicy, **settings: Any) -> None:
            given.append(policy)
            super().__init__(*args, policy=policy, **settings)

    monkeypatch.setattr("contenders.CatapultSGD", Told)
    problem = draw(TASK, None, 0)
    setup = Setup(problem.build(), criterion(TASK), TASK.steps, policy=dict([policy_change("total_steps=77")]))
    for name in ("catapult", "catapult-T"):
        CONTENDERS[name].build(setup)
    CONTENDERS["catapult-T"].build(dataclasses.replace(setup, policy={}))
    assert given == [CatapultPolicy(total_steps=steps) for steps in (77, 77, 12)]
    with pytest.raises(TypeError, match="kapa"):
        policy_change("kapa=3")


@pytest.mark.parametrize(("text", "expected"), [("3-5", (3, 4, 5)), ("3,7", (3, 7)), ("4", (4,))])
def test_seeds(text: str, expected: tuple[int, ...]) -> None:
    assert seeds(text) == expected


def test_goes_on_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    arguments = [sys.executable, str(BENCHMARKS / "generalization.py"), "--quick", "--results", str(path)]
    process = subprocess.Popen([*arguments, "--optimizers", "sgd"], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while (not path.exists() or path.read_text().count("\n") < 2) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = path.read_text().split("\n")
    assert len(before) >= 3
    with path.open("a") as file:
        file.write('{"key": "torn')  # a line cut off in the middle
    done = {json.loads(line)["key"]: line for line in before if line.endswith("}")}

    assert main(["--quick", "--results", str(path), "--optimizers", "sgd"]) == 0
    after = path.read_text()
    keys = [json.loads(line)["key"] for line in after.splitlines() if line.endswith("}")]
    assert all(line in after for line in done.values())
    assert len(keys) == len(set(keys)) > len(done)  # nothing done twice
    results = Results(path)
    assert set(results.records) == set(keys)
    plan = Plan((QUICK_TASK,), ("sgd",), (40,), (60, 61))
    assert plan.missing(QUICK_TASK, results) == []


def test_table_shows_wins_losses_and_failures(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    tasks = [dataclasses.replace(TASK, name=name) for name in ("won", "lost", "failed")]
    plan, results = Plan(tuple(tasks), ("sgd", "dog", "catapult"), (0,), tuple(range(3, 13))), MemoryResults()
    ours = {"won": 0.5, "lost": 2.0, "failed": math.inf}
    for task in tasks:
        results.add(fake(Run(task, "sgd", 0, 0.5), 1.0))
        for seed in plan.report_seeds:
            results.add(fake(Run(task, "sgd", seed, 0.5), 1.0 + seed / 1000))
            results.add(fake(Run(task, "dog", seed), 0.4 + seed / 1000))
            results.add(fake(Run(task, "catapult", seed), ours[task.name] + seed / 1000))
    console = Console(width=180)
    console.print(table([find(plan, task, results) for task in plan.tasks]))
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert "0.508 +-" in rows["won"]
    assert "2.01 --" in rows["lost"]
    assert "diverged (10) --" in rows["failed"]


def test_equal_time_takes_the_best_validation_loss_reached_by_then() -> None:
    curve = [(1, 1.0, 0.9, 90.0), (2, 2.0, 0.5, 50.0), (3, 3.0, 0.7, None), (4, 4.0, 0.2, 20.0)]
    evaluations = [
        {"step": step, "seconds": seconds, "val": val, **({} if value is None else {"value": value})}
        for step, seconds, val, value in curve
    ]
    plan, results = Plan((TASK,), ("catapult",), report_seeds=(3,)), MemoryResults()
    results.add(fake(Run(TASK, "catapult", 3), evaluations=evaluations))
    outcome = find(plan, TASK, results).outcomes["catapult"]
    assert outcome.within({3: 3.5}) == {3: 50.0}
    assert outcome.within({3: 1.0}) == {3: 90.0}
    assert outcome.within({3: 0.5}) == {3: math.inf}
    assert outcome.within({3: 9.0, 4: 9.0}) == {3: 20.0}


def test_tasks_are_what_they_say() -> None:
    for task in TASKS.values():
        assert task.loss in ("mse", "ce") and task.net in ("ntk", "mlp", "cnn", "tanh", "resnet", "gpt")
        assert task.batch is None or task.batch <= task.train
        if task.synthetic:
            model = draw(dataclasses.replace(task, train=10, val=10, test=10), None, 0).build()
            biases = [p for p in model.parameters() if p.ndim == 1]
            assert bool(biases) == (task.net != "ntk")


def test_critical_lr_of_the_first_step_is_what_the_explicit_jacobian_says() -> None:
    """The oracle of the controls agrees with the package where nothing is rated down."""
    problem = draw(TASK, None, 3)
    torch.manual_seed(0)
    model = problem.build()
    found = critical_lr(model, nn.MSELoss(), problem.train.inputs, problem.train.targets, tol=1e-4)
    explicit = _critical(model, nn.MSELoss(), problem.train.inputs, problem.train.targets)
    assert found.eta_crit == pytest.approx(explicit, rel=1e-3)
