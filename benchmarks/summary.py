"""The generalization benchmark's outcomes as tables: of the tasks, of all tasks together, of one task; and a plot."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from outcomes import Found, Line, Outcome, lines, lines_against_each, tuned, untuned
from paired import Comparison, compare
from protocol import FOLLOWED
from rich import box
from rich.table import Table

MARKS = {"win": "[green]+[/]", "tie": "=", "loss": "[red]-[/]"}


def table(tasks: Sequence[Found]) -> Table:
    """A row a task: the best tuned SGD, the best untuned peer, and CatapultSGD against both."""
    out = Table(
        title="Test metric at the best validation loss: median of the report seeds",
        caption="Two marks: against the best tuned SGD (where ours drives AdamW, tuned AdamW), against the best "
        "untuned peer, both chosen on these very seeds. + better, - worse, = the 95 % interval of the paired "
        "difference holds zero. (n): runs that diverged. One mark: against that tuned SGD. Time: CPU seconds over the "
        "tuned SGD's, measuring included.",
        caption_justify="left",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for header in ("task", "metric", "best tuned SGD", "best untuned peer"):
        out.add_column(header)
    for header in ("CatapultSGD", "last step", "raw weights", "in SGD's time", "time"):
        out.add_column(header, justify="right")
    for found in tasks:
        sgd, peer = tuned(found, "best"), untuned(found, "best")
        main, raw = found.outcomes.get(FOLLOWED), found.outcomes.get(f"{FOLLOWED}-raw")
        out.add_row(
            found.name, found.metric, _named(sgd), _named(peer), _cell(main, sgd, peer),
            _last(main, tuned(found, "last")), _cell(raw, sgd, peer), *_timed(main, sgd),
        )  # fmt: skip
    return out


def total(tasks: Sequence[Found]) -> Table:
    """Geometric means over the tasks: each of our rows against the best tuned SGD and the best untuned peer."""
    return _lines(
        "Over all tasks: our median / that of the reference",
        "Geometric mean with its 95 % bootstrap interval over the tasks (below 1: ours is better), and the worst task.",
        ("ours", "against"),
        [(ours, reference, best, last) for ours, reference, best, last in lines(tasks)],
    )


def against_each(tasks: Sequence[Found]) -> Table:
    """The same against every single baseline."""
    rows = [(label, "", best, last) for label, _, best, last in lines_against_each(tasks)]
    return _lines("CatapultSGD's median / that of each baseline", "", ("against", ""), rows)


def _lines(
    title: str, caption: str, headers: tuple[str, str], rows: list[tuple[str, str, Line | None, Line | None]]
) -> Table:
    out = Table(title=title, caption=caption, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD)
    for header in (*headers, "tasks", "best validation", "worst task", "last step", "worst task"):
        out.add_column(header)
    for first, second, best, last in rows:
        out.add_row(first, second, *cells_of(best, last))
    return out


def cells_of(best: Line | None, last: Line | None) -> tuple[str, ...]:
    """Tasks, mean and worst at the best validation loss, mean and worst at the last step."""
    tasks = "0" if best is None else str(best.tasks)
    return (tasks, *(cell for found in (best, last) for cell in _described_line(found)))


def _described_line(found: Line | None) -> tuple[str, str]:
    if found is None:
        return "", ""
    mean, worst = found.mean, found.worst
    shown = f"{mean.value:.2f}" + ("" if math.isnan(mean.low) else f" ({mean.low:.2f} to {mean.high:.2f})")
    limits = "" if math.isnan(worst.low) else f" ({worst.low:.2f} to {worst.high:.2f})"
    return shown, f"{worst.value:.2f}{limits} {found.task}"


def number(value: float) -> str:
    return "diverged" if math.isinf(value) else f"{value:.3g}" if value < 10 else f"{value:.1f}"


def _named(outcome: Outcome | None) -> str:
    if outcome is None:
        return "not run"
    return f"{number(statistics.median(outcome.best.values()))} {outcome.label}{_failures(outcome)}"


def _failures(outcome: Outcome) -> str:
    return f" ({outcome.failures})" if outcome.failures else ""


def _cell(ours: Outcome | None, *others: Outcome | None) -> str:
    if ours is None:
        return "not run"
    marks = "".join(_mark(None if o is None else compare(ours.best, o.best)) for o in others)
    return f"{number(statistics.median(ours.best.values()))}{_failures(ours)} {marks}"


def _mark(comparison: Comparison | None) -> str:
    return "?" if comparison is None else MARKS[comparison.verdict]


def _last(ours: Outcome | None, sgd: Outcome | None) -> str:
    if ours is None or sgd is None:
        return ""
    return f"{number(statistics.median(ours.last.values()))} {_mark(compare(ours.last, sgd.last))}"


def _timed(ours: Outcome | None, sgd: Outcome | None) -> tuple[str, str]:
    """In the time of the tuned SGD with the same seed, and how much longer all steps take."""
    if ours is None or sgd is None:
        return "", ""
    values = ours.within(sgd.seconds)
    factors = [ours.seconds[s] / sgd.seconds[s] for s in values]
    if not values:
        return "", ""
    middle = statistics.median(values.values())
    shown = number(middle) if math.isfinite(middle) else "none"
    return f"{shown} {_mark(compare(values, sgd.best))}", f"{statistics.median(factors):.1f}x"


def details(found: Found) -> Table:
    """A row an optimizer: both values, the difference to CatapultSGD with its interval, failures, time."""
    ours = found.outcomes.get(FOLLOWED)
    out = Table(title=f"{found.name}: {found.metric}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    out.add_column("optimizer")
    for header in (
        "rate", "at best validation: median", "IQR", "AGOP", "last step", "diverged",
        "CatapultSGD minus this", "95 % interval", "", "catapults", "CPU s",
    ):  # fmt: skip
        out.add_column(header, justify="right")
    kind = None
    for outcome in found.outcomes.values():
        if kind is not None and outcome.kind != kind:
            out.add_section()
        kind = outcome.kind
        same = ours is None or ours is outcome
        out.add_row(
            outcome.label,
            *_described(outcome),
            *_compared(None if same else compare(ours.best, outcome.best)),
            *_effort(outcome),
        )
    return out


def _described(outcome: Outcome) -> Iterator[str]:
    yield "" if outcome.lr is None else f"{outcome.lr:.3g}{'' if outcome.interior else ' (edge)'}"
    low, high = quartiles(list(outcome.best.values()))
    yield number(statistics.median(outcome.best.values()))
    yield f"{number(low)} to {number(high)}"
    aligned = [r["best"]["agop"] for r in outcome.runs if "agop" in r["best"] and math.isfinite(r["best"]["agop"])]
    yield f"{statistics.median(aligned):.2f}" if aligned else ""
    yield number(statistics.median(outcome.last.values()))
    yield f"{outcome.failures} of {len(outcome.last)}" if outcome.failures else ""


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


def plot(tasks: Sequence[Found], path: Path) -> None:
    """Every optimizer's median over the best tuned SGD's, a row a task; bars: quartiles of CatapultSGD."""
    from matplotlib.figure import Figure

    kinds = {
        "sgd": ("#9aa5b1", "SGD, tuned"),
        "adamw": ("#66a182", "AdamW, tuned"),
        "untuned": ("#edae49", "untuned"),
        "control": ("#7b6d8d", "controls"),
        "catapult": ("#d1495b", "CatapultSGD"),
    }
    figure = Figure(figsize=(9, 1.5 + 0.42 * len(tasks)), layout="constrained")
    ax = figure.subplots()
    drawn = set()
    for row, found in enumerate(tasks):
        reference = tuned(found, "best")
        if reference is None:
            continue
        unit = statistics.median(reference.best.values())
        for outcome in found.outcomes.values():
            color, label = kinds[outcome.kind]
            low, high = (v / unit for v in quartiles(list(outcome.best.values())))
            middle = statistics.median(outcome.best.values()) / unit
            if not math.isfinite(middle):
                continue
            main = outcome.name == FOLLOWED
            if main and math.isfinite(high):
                ax.plot([low, high], [row, row], color=color, linewidth=3, alpha=0.4)
            said, order = None if outcome.kind in drawn else label, 3 if main else 2
            drawn.add(outcome.kind)
            ax.plot(middle, row, "o", color=color, markersize=9 if main else 5, label=said, zorder=order)
    ax.axvline(1, color="#9aa5b1", linewidth=1)
    ax.set(xscale="log", yticks=range(len(tasks)), yticklabels=[found.name for found in tasks])
    ax.set_xlabel("test metric at the best validation loss / that of the best tuned SGD (left is better)")
    ax.invert_yaxis()
    ax.legend(frameon=False, loc="best")
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
