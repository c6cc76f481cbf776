"""The generalization benchmark's results as a file, and the page of the documentation that is made from that file."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from outcomes import Found, Outcome, lines, lines_against_each, read, told, tuned, untuned
from paired import CLIP
from protocol import FOLLOWED, Plan
from summary import cells_of, number, quartiles

_NAME = "results-benchmark"
_LOSSES = {"mse": "squared error", "ce": "cross-entropy"}
_LINES = ("tasks", "best validation", "worst task", "last step", "worst task")


def publish(plan: Plan, tasks: Sequence[Found], folder: Path) -> tuple[Path, Path]:
    """Write the file of results and the page made from it.

    Returns:
        Where they are.
    """
    file, page = folder / f"{_NAME}.json", folder / f"{_NAME}.md"
    content = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "tuning_seeds": plan.tuning_seeds,
        "report_seeds": plan.report_seeds,
        "policy": plan.policy,
        "tasks": [told(found) for found in tasks],
    }
    file.write_text(json.dumps(content, indent=1) + "\n")
    page.write_text(markdown(json.loads(file.read_text())))
    return file, page


def markdown(content: dict[str, Any]) -> str:
    """The page, from what the file says alone."""
    tasks = [read(task) for task in content["tasks"]]
    first, last = content["report_seeds"][0], content["report_seeds"][-1]
    tuning = ", ".join(str(seed) for seed in content["tuning_seeds"])
    total = [(ours, against, *cells_of(*both)) for ours, against, *both in lines(tasks)]
    single = [(label, *cells_of(*both)) for label, _, *both in lines_against_each(tasks)]
    parts = [
        "# Benchmark",
        f"{len(tasks)} small tasks, each optimizer on the seeds {first} to {last}. SGD and AdamW are tuned: their rate "
        f"is the one of the lowest validation loss on the seeds {tuning}, on a grid of factor 2 that goes on until the "
        "best rate lies inside. CatapultSGD and the peers are used with nothing set. A seed fixes data, initial "
        "weights and the order of the batches for everybody. Numbers are medians over the seeds of the test loss, or "
        "of the test error in per cent: lower is better. *Best validation* is the step with the lowest validation "
        "loss, *last step* is what a user without a validation set gets.",
        "CatapultSGD is evaluated at its averaged weights, and next to them at the raw ones. What it is compared with, "
        "the best tuned SGD (AdamW, where the controller drives AdamW) and the best untuned peer, is chosen for each "
        "task on the reported seeds themselves, so that the comparison is in its favour.",
        f"This page is made from [{_NAME}.json]({_NAME}.json) by `python benchmarks/generalization.py --report "
        f"--publish docs` (torch {content['torch']}, Python {content['python']}).",
        "## Over all tasks",
        "Geometric means of the ratios ours / reference with 95 % bootstrap intervals over the tasks, and the task "
        "with the highest ratio with the interval over its seeds. Below 1 ours is better. A ratio counts as "
        f"{CLIP:g} at most and {1 / CLIP:g} at least, also where a run diverged.",
        _table(("ours", "against", *_LINES), total),
        "CatapultSGD against every single baseline:",
        _table(("against", *_LINES), single),
        "## Task by task",
        "In brackets: at the last step.",
        _table(
            ("task", "trained on", "metric", "best tuned SGD", "best untuned peer", "CatapultSGD", "raw weights"),
            [_row(found) for found in tasks],
        ),
        "## Every optimizer",
        "Quartiles over the seeds in brackets. *(edge)*: the best rate is the lowest or highest that was tried.",
    ]
    for found in tasks:
        parts += [f"### {found.name}", _every_optimizer(found)]
    return "\n\n".join(parts) + "\n"


def _row(found: Found) -> tuple[str, ...]:
    batch = "full batch" if found.batch is None else f"batches of {found.batch}"
    ours, raw = found.outcomes.get(FOLLOWED), found.outcomes.get(f"{FOLLOWED}-raw")
    return (
        found.name, f"{_LOSSES[found.loss]}, {batch}", found.metric,
        _both(tuned(found, "best"), named=True), _both(untuned(found, "best"), named=True), _both(ours), _both(raw),
    )  # fmt: skip


def _both(outcome: Outcome | None, named: bool = False) -> str:
    if outcome is None:
        return ""
    best, last = (number(statistics.median(values.values())) for values in (outcome.best, outcome.last))
    return f"{best} ({last})" + (f" {outcome.label}" if named else "")


def _every_optimizer(found: Found) -> str:
    rows = []
    for outcome in found.outcomes.values():
        low, high = quartiles(list(outcome.best.values()))
        rate = "" if outcome.lr is None else f"{outcome.lr:.3g}{'' if outcome.interior else ' (edge)'}"
        median, last = (number(statistics.median(values.values())) for values in (outcome.best, outcome.last))
        seconds = f"{statistics.median(outcome.seconds.values()):.2f}"
        failed = f"{outcome.failures} of {len(outcome.last)}" if outcome.failures else ""
        spread = f"{median} ({number(low)} to {number(high)})"
        rows.append((outcome.label, rate, spread, last, failed, seconds))
    return _table(("optimizer", "rate", f"best validation: {found.metric}", "last step", "diverged", "CPU s"), rows)


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (headers, ["---"] * len(headers), *rows))
