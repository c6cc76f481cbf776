"""How the generalization benchmark runs: one training, the tuning grid, what to run next, and the file of results.

What is still to be run is always worked out from the records in the file alone, so that a benchmark that was killed
goes on where it was: nothing but the runs in flight is lost.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from contenders import CONTENDERS, Contender, Driver, Setup
from tasks import Problem, Task, criterion, draw
from torch import Tensor, nn

from catapult_opt import critical_lr
from catapult_opt.analysis.agop import agop, alignment

# No other seed from 40 on has been looked at while the package was written, these ten by nobody.
TUNING_SEEDS = (40, 41, 42)
REPORT_SEEDS = tuple(range(60, 70))
FOLLOWED = "catapult"  # whose runs the controls take over from
_EVALUATIONS = 25  # per training
_REACH = 16  # doublings from the first grid at which extending it ends
_GIVEN_UP = 10  # steps in a row with a loss that is not finite
_AGOP_SAMPLES = 500
_OTHER_ORDER = 100_000  # added to a seed: other batches than the training's own

Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One training to be done."""

    task: Task
    contender: str
    seed: int
    lr: float | None = None
    given: Any = None
    policy: dict[str, Any] = field(default_factory=dict)

    @property
    def setting(self) -> str:
        """The same for all runs of a task and contender, whatever the seed and the rate."""
        return setting(self.task, CONTENDERS[self.contender], self.policy)

    @property
    def key(self) -> str:
        return _digest([self.setting, self.seed, self.lr, self.given])


def setting(task: Task, contender: Contender, policy: dict[str, Any]) -> str:
    changes = policy if contender.kind in ("catapult", "control") else {}
    return _digest([_told(task), contender.name, contender.settings, changes])


def _told(task: Task) -> dict[str, Any]:
    """What is not the default, so that a field added to Task leaves the runs of the other tasks what they are."""
    fields = dataclasses.fields(task)
    return {f.name: getattr(task, f.name) for f in fields if getattr(task, f.name) != f.default}


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


class Trajectory:
    """Evaluations along a training: the value at the best validation loss so far, and at the last step."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self.evaluations: list[dict[str, float]] = []  # the test value where validation was at its best so far
        self.best: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self._best_weights: dict[str, Tensor] = {}

    def add(self, model: nn.Module, step: int, seconds: float, last: bool) -> None:
        val = self._problem.loss(model, self._problem.val)
        entry = {"step": step, "seconds": round(seconds, 4), "val": val}
        better = math.isfinite(val) and val < self.best.get("val", math.inf)
        if better or last:
            entry["value"] = self._problem.value(model)
        if better:
            self.best = dict(entry)
            self._best_weights = {name: t.clone() for name, t in model.state_dict().items()}
        if last:
            self.last = dict(entry)
        self.evaluations.append(entry)

    def told(self) -> Record:
        failed = not (self.last and math.isfinite(self.last["val"]))
        return {"failed": failed, "best": self.best, "last": self.last, "evaluations": self.evaluations}

    def align(self, model: nn.Module) -> None:
        """After the training: AGOP alignment of both, on a task whose features are known."""
        if self._problem.egop is None or not self.best or not self.last:
            return
        self.last["agop"] = self._alignment(model)
        best = copy.deepcopy(model)
        best.load_state_dict(self._best_weights)
        self.best["agop"] = self._alignment(best)

    def _alignment(self, model: nn.Module) -> float:
        features = agop(model, self._problem.train.inputs[:_AGOP_SAMPLES])
        usable = bool(features.isfinite().all()) and float(features.abs().max()) > 0
        return alignment(features, self._problem.egop) if usable else math.nan


class Rates:
    """The rates a driver applied: their mean, and how they stood against the critical rate last measured."""

    def __init__(self) -> None:
        self._rates: list[float] = []
        self._relative: list[float] = []  # in critical rates, where there is one

    def add(self, driver: Driver) -> None:
        self._rates.append(driver.rate)
        found = getattr(driver.observer, "last", None)
        if found is not None and math.isfinite(found.eta_crit):
            self._relative.append(driver.rate / found.eta_crit)

    @property
    def mean(self) -> float:
        return sum(self._rates) / max(1, len(self._rates))

    @property
    def above(self) -> Record | None:
        """Lengths in steps of the stays above the critical rate; mean rates there and below, in critical rates.

        None for an optimizer that nobody measures for.
        """
        if not self._relative:
            return None
        lengths = [len(list(group)) for up, group in itertools.groupby(r > 1 for r in self._relative) if up]
        up, down = [r for r in self._relative if r > 1], [r for r in self._relative if r <= 1]
        return {"lengths": lengths, "up": sum(up) / max(1, len(up)), "down": sum(down) / max(1, len(down))}


def train(run: Run, folder: Path | None) -> Record:
    """One training from the seed's data, weights and order of batches; seconds are CPU seconds without evaluations."""
    problem = draw(run.task, folder, run.seed)
    torch.manual_seed(10_000 + run.seed)
    model, loss_of = problem.build(), criterion(run.task)
    weights = _fingerprint(model.parameters())
    torch.manual_seed(run.seed)  # CatapultSGD draws the start of its first measurement
    inputs = torch.split(problem.train.inputs, run.task.batch or run.task.train)
    setup = Setup(
        model, loss_of, run.task.steps, run.seed, run.lr, run.given, run.policy, run.task.base,
        batches=problem.pairs(run.seed + _OTHER_ORDER), sample=inputs,
    )  # fmt: skip
    driver = CONTENDERS[run.contender].build(setup)
    trajectories = {view: Trajectory(problem) for view in driver.views}
    rates, order = Rates(), hashlib.sha256()
    every, bad, seconds, step = max(1, run.task.steps // _EVALUATIONS), 0, 0.0, 0
    for step, rows in zip(range(1, run.task.steps + 1), problem.batches(run.seed), strict=False):
        if step <= _GIVEN_UP:  # no run is shorter
            order.update(rows.numpy().tobytes())
        x, y = problem.train.inputs[rows], problem.train.targets[rows]
        begun = time.process_time()
        driver.optimizer.zero_grad()
        loss = loss_of(model(x), y)
        loss.backward()
        number = loss.item()
        driver.step(number, x, y)
        seconds += time.process_time() - begun
        rates.add(driver)
        bad = 0 if math.isfinite(number) else bad + 1
        if bad >= _GIVEN_UP:
            break
        if step % every == 0 or step == run.task.steps:
            for view, trajectory in trajectories.items():
                with driver.evaluated(view) as evaluated:
                    trajectory.add(evaluated, step, seconds, last=step == run.task.steps)
    first = trajectories[driver.views[0]]
    for view, trajectory in trajectories.items():
        with driver.evaluated(view) as evaluated:
            trajectory.align(evaluated)
    observer = driver.observer
    return {
        "key": run.key,
        "setting": run.setting,
        "task": run.task.name,
        "contender": run.contender,
        "seed": run.seed,
        "lr": run.lr,
        "policy": run.policy,
        "steps": step,
        "seconds": seconds,
        **first.told(),
        "views": {view: t.told() for view, t in trajectories.items() if t is not first},
        "mean_rate": rates.mean,
        "above": rates.above,
        "catapults": getattr(observer, "catapults", None),
        "super_critical": getattr(observer, "super_critical_steps", None),
        "weights": weights,
        "order": order.hexdigest()[:16],
    }


def _fingerprint(parameters: Iterable[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for p in parameters:
        digest.update(p.detach().numpy().tobytes())
    return digest.hexdigest()[:16]


class Results:
    """The records of all finished runs, in a file of JSON lines; only complete lines count.

    Args:
        path: what is new is added to this file.
        others: files that are read only, such as the baselines' that another process is still adding to.
    """

    def __init__(self, path: Path, others: Iterable[Path] = ()) -> None:
        self.path = path
        self.records: dict[str, Record] = {}
        for other in others:
            for line in other.read_text().splitlines():
                self._take(line)
        self._torn = False  # the last line was cut off by a kill
        if path.exists():
            text = path.read_text()
            self._torn = bool(text) and not text.endswith("\n")
            for line in text.splitlines():
                self._take(line)

    def _take(self, line: str) -> None:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            return
        self.records[record["key"]] = record

    def add(self, record: Record) -> None:
        self.records[record["key"]] = record
        with self.path.open("a") as file:
            file.write(("\n" if self._torn else "") + json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._torn = False

    def of(self, setting: str) -> list[Record]:
        return [r for r in self.records.values() if r["setting"] == setting]


def scores(records: Iterable[Record], seeds: Sequence[int]) -> dict[float, float]:
    """For every rate finished on all tuning seeds its mean best validation loss; infinite if any of them failed."""
    by_rate: dict[float, dict[int, float]] = {}
    for r in records:
        if r["lr"] is not None and r["seed"] in seeds:
            value = math.inf if r["failed"] or not r["best"] else r["best"]["val"]
            by_rate.setdefault(r["lr"], {})[r["seed"]] = value
    return {lr: sum(v.values()) / len(v) for lr, v in sorted(by_rate.items()) if len(v) == len(seeds)}


def best_rate(scored: dict[float, float]) -> float | None:
    """The rate of the lowest score (the lower one of two); None without any that did not fail."""
    usable = {lr: score for lr, score in scored.items() if math.isfinite(score)}
    return min(usable, key=lambda lr: (usable[lr], lr)) if usable else None


def next_rates(scored: dict[float, float], start: float) -> list[float]:
    """Rates of the factor-2 grid still to be tried: until both neighbours of the best one are worse.

    A rate at which runs fail ends the grid upwards. Where all fail, the grid goes on downwards.
    """
    centre = 2.0 ** round(math.log2(start))
    if not scored:
        return [centre / 2, centre, centre * 2]
    best = best_rate(scored)
    if best is None:
        lower = min(scored) / 2
        return [lower] if lower >= centre * 2.0**-_REACH else []
    failing = min((lr for lr, score in scored.items() if lr > best and math.isinf(score)), default=math.inf)
    within = [lr for lr in (best / 2, best * 2) if centre * 2.0**-_REACH <= lr <= centre * 2.0**_REACH]
    return [lr for lr in within if lr not in scored and lr < failing]


def is_interior(scored: dict[float, float]) -> bool:
    """Is the best rate neither the lowest nor the highest of the grid (a failing one counts as a higher one)?"""
    best = best_rate(scored)
    return best is not None and min(scored) < best < max(scored)


@dataclass(frozen=True)
class Plan:
    """What is asked for: tasks, contenders, seeds."""

    tasks: tuple[Task, ...]
    contenders: tuple[str, ...]
    tuning_seeds: tuple[int, ...] = TUNING_SEEDS
    report_seeds: tuple[int, ...] = REPORT_SEEDS
    policy: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    def needed(self) -> list[str]:
        """The contenders with those that they build on, which come first."""
        out: list[str] = []
        for name in self.contenders:
            contender = CONTENDERS[name]
            before = [contender.after] if contender.after else [FOLLOWED] if contender.follows else []
            out += [n for n in (*before, name) if n not in out]
        return out

    def scores(self, task: Task, name: str, results: Results) -> dict[float, float]:
        return scores(results.of(setting(task, CONTENDERS[name], self.policy)), self.tuning_seeds)

    def missing(self, task: Task, results: Results) -> list[Run]:
        """What can be run next on this task; empty once all is done."""
        runs = [run for name in self.needed() for run in self._of(task, name, results)]
        return [run for run in runs if run.key not in results.records]

    def _of(self, task: Task, name: str, results: Results) -> Iterator[Run]:
        contender = CONTENDERS[name]
        if contender.kind == "sgd" and task.base != "sgd":
            return  # its rate is not what is tuned on this task
        if contender.tuned:
            yield from self._tuned(task, contender, results)
            return
        for seed in self.report_seeds:
            run = Run(task, name, seed, policy=self._policy(contender))
            if contender.follows:
                followed = results.records.get(Run(task, FOLLOWED, seed, policy=self.policy).key)
                if followed is None:
                    continue
                run = dataclasses.replace(run, given=contender.follows(followed))
            yield run

    def _tuned(self, task: Task, contender: Contender, results: Results) -> Iterator[Run]:
        scored = self.scores(task, contender.name, results)
        start = self._start(task, contender, results)
        if start is None:
            return
        rates, seeds = next_rates(scored, start), self.tuning_seeds
        if not rates:
            best = best_rate(scored)
            # Where every rate failed, the lowest one stands for them.
            rates, seeds = [best if best is not None else min(scored)], self.report_seeds
        for lr in rates:
            yield from (Run(task, contender.name, seed, lr, policy=self._policy(contender)) for seed in seeds)

    def _start(self, task: Task, contender: Contender, results: Results) -> float | None:
        """Where the grid begins; None while the contender it comes after is not tuned."""
        if contender.after:
            scored = self.scores(task, contender.after, results)
            before = self._start(task, CONTENDERS[contender.after], results)
            if before is None or next_rates(scored, before):
                return None
            return best_rate(scored) or before
        assert contender.start is not None
        return contender.start(task.net == "ntk", first_critical_rate(task, self.folder))

    def _policy(self, contender: Contender) -> dict[str, Any]:
        return self.policy if contender.kind in ("catapult", "control") else {}


_CRITICAL: dict[Task, float] = {}


def first_critical_rate(task: Task, folder: Path | None) -> float:
    """At the initial weights, on the first batch of the first tuning seed."""
    if task not in _CRITICAL:
        problem = draw(task, folder, TUNING_SEEDS[0])
        with torch.random.fork_rng():
            torch.manual_seed(10_000 + TUNING_SEEDS[0])
            model = problem.build()
            rows = next(problem.batches(TUNING_SEEDS[0]))
            x, y = problem.train.inputs[rows], problem.train.targets[rows]
            _CRITICAL[task] = critical_lr(model, criterion(task), x, y).eta_crit
    return _CRITICAL[task]
