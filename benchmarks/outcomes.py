"""What every optimizer reached on the tasks of the generalization benchmark, and what that comes to over all tasks.

Outcomes are read from the records of the runs, or from the published file of results.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from contenders import BASELINES, CONTENDERS, Contender
from paired import Estimate, geometric_mean, ratio
from protocol import FOLLOWED, Plan, Record, Results, best_rate, is_interior, setting
from tasks import Task


@dataclass
class Outcome:
    """What an optimizer reached on a task, by seed; infinite where the run failed."""

    name: str
    label: str
    kind: str  # of its contender
    best: dict[int, float] = field(default_factory=dict)  # metric at the best validation loss
    last: dict[int, float] = field(default_factory=dict)  # and at the last step
    seconds: dict[int, float] = field(default_factory=dict)  # CPU seconds of the whole training
    lr: float | None = None
    interior: bool = True  # is lr inside the grid that was tried?
    runs: list[Record] = field(default_factory=list)

    @property
    def failures(self) -> int:
        return sum(math.isinf(value) for value in self.last.values())

    def add(self, record: Record) -> None:
        seed, failed = record["seed"], record["failed"]
        self.runs.append(record)
        self.best[seed] = math.inf if failed else record["best"]["value"]
        self.last[seed] = math.inf if failed else record["last"]["value"]
        self.seconds[seed] = record["seconds"]

    def within(self, seconds: dict[int, float]) -> dict[int, float]:
        """The metric at the best validation loss reached in that time, by seed; infinite if there was none."""
        return {r["seed"]: _at(r, seconds[r["seed"]]) for r in self.runs if r["seed"] in seconds}


def _at(record: Record, seconds: float) -> float:
    reached = [e for e in record["evaluations"] if e["seconds"] <= seconds and math.isfinite(e["val"])]
    if record["failed"] or not reached:
        return math.inf
    return float(min(reached, key=lambda e: e["val"])["value"])  # evaluated, as it was the best so far


@dataclass
class Found:
    """A task and the outcomes on it, in the order of the contenders."""

    name: str
    metric: str
    loss: str
    batch: int | None
    base: str  # the optimizer whose rate ours drives, and whose tuned rows it is compared with: "sgd" or "adamw"
    outcomes: dict[str, Outcome]

    @property
    def ours(self) -> list[Outcome]:
        return [o for o in self.outcomes.values() if o.kind == "catapult"]

    def lowest(self, kinds: Sequence[str], at: str = "best") -> Outcome | None:
        """The lowest median on the report seeds, at the best validation loss or the last step: in their favour."""
        members = [o for o in self.outcomes.values() if o.kind in kinds]
        return min(members, key=lambda o: statistics.median(getattr(o, at).values()), default=None)


def find(plan: Plan, task: Task, results: Results) -> Found:
    """Every contender's runs on the report seeds, a tuned one's at its best rate.

    A run in which more than one kind of weights was evaluated makes an outcome for each.
    """
    out: dict[str, Outcome] = {}
    for contender in CONTENDERS.values():
        main = Outcome(contender.name, contender.label, contender.kind)
        records = results.of(setting(task, contender, plan.policy))
        if contender.tuned:
            scored = plan.scores(task, contender.name, results)
            if not scored:
                continue
            best = best_rate(scored)
            main.lr, main.interior = best if best is not None else min(scored), is_interior(scored)
        for record in records:
            if record["seed"] in plan.report_seeds and (not contender.tuned or record["lr"] == main.lr):
                main.add(record)
        if main.runs:
            out[main.name] = main
            out |= {o.name: o for o in _other_weights(contender, main)}
    return Found(task.name, task.metric, task.loss, task.batch, task.base, out)


def _other_weights(contender: Contender, main: Outcome) -> list[Outcome]:
    names = list(dict.fromkeys(view for record in main.runs for view in record.get("views", {})))
    out = [Outcome(f"{contender.name}-{n}", f"{contender.label}, {n} weights", contender.kind) for n in names]
    for name, outcome in zip(names, out, strict=True):
        for record in main.runs:
            if name in record.get("views", {}):
                outcome.add({**record, **record["views"][name]})
    return out


@dataclass(frozen=True)
class Line:
    """One of our rows against a reference, over all tasks that have both."""

    mean: Estimate  # geometric, of the ratios ours / reference
    worst: Estimate  # the highest ratio,
    task: str  # and where
    tasks: int


# What ours is compared with: of the task, and at "best" or "last".
Reference = Callable[[Found, str], Outcome | None]


def tuned(found: Found, at: str) -> Outcome | None:
    """The best tuned SGD; tuned AdamW where ours drives that."""
    return found.lowest([found.base], at)


def untuned(found: Found, at: str) -> Outcome | None:
    return found.lowest(["untuned"], at)


def named(name: str) -> Reference:
    return lambda found, _: found.outcomes.get(name)


def line(tasks: Sequence[Found], ours: str, reference: Reference, at: str) -> Line | None:
    """None where no task has both."""
    ratios: dict[str, Estimate] = {}
    for found in tasks:
        mine, theirs = found.outcomes.get(ours), reference(found, at)
        if mine is not None and theirs is not None:
            estimate = ratio(getattr(mine, at), getattr(theirs, at))
            if estimate is not None:
                ratios[found.name] = estimate
    if not ratios:
        return None
    worst = max(ratios, key=lambda name: ratios[name].value)
    return Line(geometric_mean([e.value for e in ratios.values()]), ratios[worst], worst, len(ratios))


REFERENCES: dict[str, Reference] = {"best tuned SGD": tuned, "best untuned peer": untuned}


def lines(tasks: Sequence[Found]) -> list[tuple[str, str, Line | None, Line | None]]:
    """Every row of ours against both references: (row, reference, at the best validation loss, at the last step)."""
    labels = {o.name: o.label for found in tasks for o in found.ours}
    return [
        (label, said, line(tasks, name, reference, "best"), line(tasks, name, reference, "last"))
        for name, label in labels.items()
        for said, reference in REFERENCES.items()
    ]


def lines_against_each(tasks: Sequence[Found]) -> list[tuple[str, str, Line | None, Line | None]]:
    """The same of our main row against every baseline by itself."""
    others = {o.name: o.label for found in tasks for o in found.outcomes.values() if o.kind in BASELINES}
    return [
        (label, name, line(tasks, FOLLOWED, named(name), "best"), line(tasks, FOLLOWED, named(name), "last"))
        for name, label in others.items()
    ]


def told(found: Found) -> dict[str, Any]:
    """For the published file; null for a divergence."""
    rows = [
        {
            "name": o.name, "label": o.label, "kind": o.kind, "lr": o.lr, "interior": o.interior,
            **{at: {str(s): _finite(v) for s, v in sorted(getattr(o, at).items())} for at in ("best", "last")},
            "seconds": {str(s): round(v, 3) for s, v in sorted(o.seconds.items())},
        }
        for o in found.outcomes.values()
    ]  # fmt: skip
    about = {"name": found.name, "metric": found.metric, "loss": found.loss, "batch": found.batch, "base": found.base}
    return {**about, "outcomes": rows}


def read(content: dict[str, Any]) -> Found:
    """What `told` wrote."""
    outcomes = {}
    for row in content["outcomes"]:
        values = {at: {int(s): math.inf if v is None else v for s, v in row[at].items()} for at in ("best", "last")}
        seconds = {int(s): v for s, v in row["seconds"].items()}
        about = {key: row[key] for key in ("name", "label", "kind", "lr", "interior")}
        outcomes[row["name"]] = Outcome(**about, **values, seconds=seconds)
    return Found(**{key: content[key] for key in ("name", "metric", "loss", "batch", "base")}, outcomes=outcomes)


def _finite(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None
