"""The generalization benchmark's records as a table of tasks, a table of one task's contenders, and a plot."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from contenders import BASELINES, CONTENDERS
from paired import Comparison, compare
from protocol import FOLLOWED, Plan, Record, Results, best_rate, is_interior, setting
from rich import box
from rich.table import Table
from tasks import Task

MARKS = {"win": "[green]+[/]", "tie": "=", "loss": "[red]-[/]"}


@dataclass
class Outcome:
    """What a contender reached on a task, by seed; infinite where the run failed."""

    name: str
    best: dict[int, float] = field(default_factory=dict)  # metric at the best validation loss
    last: dict[int, float] = field(default_factory=dict)  # and at the last step
    seconds: dict[int, float] = field(default_factory=dict)  # CPU seconds of the whole training
    runs: list[Record] = field(default_factory=list)
    lr: float | None = None
    interior: bool = True  # is lr inside the grid that was tried?

    @property
    def failures(self) -> int:
        return sum(r["failed"] for r in self.runs)

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


def outcomes(plan: Plan, task: Task, results: Results) -> dict[str, Outcome]:
    """Every contender's runs on the report seeds, a tuned one's at its best rate."""
    out = {}
    for name, contender in CONTENDERS.items():
        outcome = Outcome(name)
        records = results.of(setting(task, contender, plan.policy))
        if contender.tuned:
            scored = plan.scores(task, name, results)
            if not scored:
                continue
            best = best_rate(scored)
            outcome.lr, outcome.interior = best if best is not None else min(scored), is_interior(scored)
        for record in records:
            if record["seed"] in plan.report_seeds and (not contender.tuned or record["lr"] == outcome.lr):
                outcome.add(record)
        if outcome.runs:
            out[name] = outcome
    return out


def best_of(found: dict[str, Outcome], kinds: Sequence[str]) -> Outcome | None:
    """The lowest median at the best validation loss on the report seeds: a choice in favour of the baselines."""
    members = [o for o in found.values() if CONTENDERS[o.name].kind in kinds]
    return min(members, key=lambda o: statistics.median(o.best.values()), default=None)


def table(plan: Plan, results: Results) -> Table:
    """A row a task: the best tuned SGD, the best of all baselines, and CatapultSGD against both."""
    found = {task: outcomes(plan, task, results) for task in plan.tasks}
    present = {name for members in found.values() for name in members}
    ours = [c for c in CONTENDERS.values() if c.kind == "catapult" and (c.name in present or c.name == FOLLOWED)]
    out = Table(
        title="Test metric at the best validation loss: median of the report seeds",
        caption="Two marks: against the best tuned SGD, against the best of all baselines (chosen on these very "
        "seeds). + better, - worse, = the 95 % interval of the paired difference holds zero. (n): runs that diverged. "
        "One mark: against that tuned SGD. Time: CPU seconds over the tuned SGD's, measuring included.",
        caption_justify="left",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for header in ("task", "metric", "best tuned SGD", "best baseline"):
        out.add_column(header)
    label = CONTENDERS[FOLLOWED].label
    for header in (*(c.label for c in ours), f"{label}, last step", f"{label} in SGD's time", "time"):
        out.add_column(header, justify="right")
    for task in plan.tasks:
        members = found[task]
        sgd, baseline, main = best_of(members, ["sgd"]), best_of(members, BASELINES), members.get(FOLLOWED)
        cells = [_cell(members.get(c.name), sgd, baseline) for c in ours]
        out.add_row(task.name, task.metric, _named(sgd), _named(baseline), *cells, _last(main, sgd), *_timed(main, sgd))
    return out


def _number(value: float) -> str:
    return "diverged" if math.isinf(value) else f"{value:.3g}" if value < 10 else f"{value:.1f}"


def _named(outcome: Outcome | None) -> str:
    if outcome is None:
        return "not run"
    return f"{_number(statistics.median(outcome.best.values()))} {CONTENDERS[outcome.name].label}{_failures(outcome)}"


def _failures(outcome: Outcome) -> str:
    return f" ({outcome.failures})" if outcome.failures else ""


def _cell(ours: Outcome | None, *others: Outcome | None) -> str:
    if ours is None:
        return "not run"
    marks = "".join(_mark(None if o is None else compare(ours.best, o.best)) for o in others)
    return f"{_number(statistics.median(ours.best.values()))}{_failures(ours)} {marks}"


def _mark(comparison: Comparison | None) -> str:
    return "?" if comparison is None else MARKS[comparison.verdict]


def _last(ours: Outcome | None, sgd: Outcome | None) -> str:
    if ours is None or sgd is None:
        return ""
    return f"{_number(statistics.median(ours.last.values()))} {_mark(compare(ours.last, sgd.last))}"


def _timed(ours: Outcome | None, sgd: Outcome | None) -> tuple[str, str]:
    """In the time of the tuned SGD with the same seed, and how much longer all steps take."""
    if ours is None or sgd is None:
        return "", ""
    values = ours.within(sgd.seconds)
    factors = [ours.seconds[s] / sgd.seconds[s] for s in values]
    if not values:
        return "", ""
    middle = statistics.median(values.values())
    shown = _number(middle) if math.isfinite(middle) else "none"
    return f"{shown} {_mark(compare(values, sgd.best))}", f"{statistics.median(factors):.1f}x"


def details(plan: Plan, task: Task, results: Results) -> Table:
    """A row a contender: both values, the difference to CatapultSGD with its interval, failures, time."""
    found = outcomes(plan, task, results)
    ours = found.get(FOLLOWED)
    out = Table(title=f"{task.name}: {task.metric}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    out.add_column("optimizer")
    for header in (
        "rate", "at best validation: median", "IQR", "AGOP", "last step", "diverged",
        f"{CONTENDERS[FOLLOWED].label} minus this", "95 % interval", "", "catapults", "CPU s",
    ):  # fmt: skip
        out.add_column(header, justify="right")
    kind = None
    for name, contender in CONTENDERS.items():
        if name not in found:
            continue
        if kind is not None and contender.kind != kind:
            out.add_section()
        kind, outcome = contender.kind, found[name]
        same = ours is None or ours is outcome
        out.add_row(
            contender.label,
            *_described(outcome),
            *_compared(None if same else compare(ours.best, outcome.best)),
            *_effort(outcome),
        )
    return out


def _described(outcome: Outcome) -> Iterator[str]:
    yield "" if outcome.lr is None else f"{outcome.lr:.3g}{'' if outcome.interior else ' (edge)'}"
    low, high = quartiles(list(outcome.best.values()))
    yield _number(statistics.median(outcome.best.values()))
    yield f"{_number(low)} to {_number(high)}"
    aligned = [r["best"]["agop"] for r in outcome.runs if "agop" in r["best"] and math.isfinite(r["best"]["agop"])]
    yield f"{statistics.median(aligned):.2f}" if aligned else ""
    yield _number(statistics.median(outcome.last.values()))
    yield f"{outcome.failures} of {len(outcome.runs)}" if outcome.failures else ""


def _compared(comparison: Comparison | None) -> tuple[str, str, str]:
    if comparison is None:
        return "", "", ""
    interval = f"{comparison.low:+.2g} to {comparison.high:+.2g}"
    return f"{comparison.median:+.2g}", interval, MARKS[comparison.verdict]


def _effort(outcome: Outcome) -> tuple[str, str]:
    counts = [r["catapults"] for r in outcome.runs if r["catapults"] is not None]
    return f"{statistics.median(counts):g}" if counts else "", f"{statistics.median(outcome.seconds.values()):.2f}"


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Lower and upper, without interpolation towards an infinite value."""
    low, high = np.quantile(values, [0.25, 0.75], method="closest_observation")
    return float(low), float(high)


def plot(plan: Plan, results: Results, path: Path) -> None:
    """Every contender's median over the best tuned SGD's, a row a task; bars: quartiles of CatapultSGD."""
    from matplotlib.figure import Figure

    colors = {"sgd": "#9aa5b1", "adamw": "#66a182", "untuned": "#edae49", "control": "#7b6d8d", "catapult": "#d1495b"}
    names = {
        "sgd": "SGD, tuned",
        "adamw": "AdamW, tuned",
        "untuned": "untuned",
        "control": "controls",
        "catapult": "CatapultSGD",
    }
    figure = Figure(figsize=(9, 1.5 + 0.42 * len(plan.tasks)), layout="constrained")
    ax = figure.subplots()
    drawn = set()
    for row, task in enumerate(plan.tasks):
        found = outcomes(plan, task, results)
        sgd = best_of(found, ["sgd"])
        if sgd is None:
            continue
        unit = statistics.median(sgd.best.values())
        for name, outcome in found.items():
            kind = CONTENDERS[name].kind
            low, high = (v / unit for v in quartiles(list(outcome.best.values())))
            middle = statistics.median(outcome.best.values()) / unit
            if not math.isfinite(middle):
                continue
            main = name == FOLLOWED
            if main and math.isfinite(high):
                ax.plot([low, high], [row, row], color=colors[kind], linewidth=3, alpha=0.4)
            label = names[kind] if kind not in drawn else None
            drawn.add(kind)
            ax.plot(
                middle, row, "o", color=colors[kind], markersize=9 if main else 5, label=label, zorder=3 if main else 2
            )
    ax.axvline(1, color="#9aa5b1", linewidth=1)
    ax.set(xscale="log", yticks=range(len(plan.tasks)), yticklabels=[t.name for t in plan.tasks])
    ax.set_xlabel("test metric at the best validation loss / that of the best tuned SGD (left is better)")
    ax.invert_yaxis()
    ax.legend(frameon=False, loc="best")
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
