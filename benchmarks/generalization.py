"""Which optimizer generalises best, CatapultSGD untuned or the others tuned: `python benchmarks/generalization.py`.

Tasks (benchmarks/tasks.py) x optimizers (benchmarks/contenders.py) x seeds:

* tuned baselines: the rate of the lowest validation loss (mean of seeds 40 to 42) on a grid of factor 2, which is
  extended until the best rate lies inside;
* peers with nothing set: what people type (AdamW at .001, SGD at .01 with a cosine), Prodigy, D-Adaptation, DoG,
  Schedule-Free, GeN and CDAT. Schedule-Free+ (arXiv 2605.19095) is in no released package, only in its authors'
  repository;
* CatapultSGD with nothing set, at its averaged weights and at the raw ones; where a task's base is AdamW, its
  controller drives that;
* reported on ten fresh seeds (60 to 69). A seed fixes data, initial weights and the order of the batches for
  everybody, so that differences are paired; the table marks whether their bootstrap interval is clear of zero;
* the test metric at the best validation loss (as validation picks the checkpoint) and at the last step. A run that
  diverges counts as worse than any other, and is shown;
* at equal steps, and in the CPU time that the tuned SGD took (measuring counts, evaluating does not);
* over all tasks the geometric mean of ours / best tuned SGD and ours / best untuned peer, and the worst task;
* controls, which leave out a part of what CatapultSGD does: --optimizers controls.

    python benchmarks/generalization.py --data DIR --results runs/all.jsonl        # hours on one core
    python benchmarks/generalization.py --data DIR --results runs/all.jsonl --optimizers baselines
    python benchmarks/generalization.py --data DIR --results runs/ours.jsonl runs/all.jsonl --optimizers catapult
    python benchmarks/generalization.py --results runs/all.jsonl --report --details
    python benchmarks/generalization.py --results runs/all.jsonl --report --publish docs
    python benchmarks/generalization.py --quick                                    # a smoke run, seconds

Every finished run is a line of JSON in the first of the files, and is never done twice: a benchmark that was stopped
goes on where it was. Runs of other settings, or of CatapultSGD with another policy, stay in the file and out of the
table; baselines do not depend on this package, and need not be run again when it changes. The data sets are read by
catapult_opt.analysis.datasets, which says of a missing one how to get it. The peers' packages:
pip install --no-deps -r constraints-bench.txt.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import torch
from contenders import BASELINES, CONTENDERS
from outcomes import find
from page import publish
from protocol import Plan, Record, Results, Run, train
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from summary import against_each, details, plot, table, total
from tasks import DEFAULT, TASKS, Task, check

from catapult_opt import CatapultPolicy
from catapult_opt.analysis.datasets import DataError

# Left out unless asked for: variants that add little, and another base than the task's own.
_EXTRA = ("prodigy-cosine", "schedule-free-sgd", "catapult-adamw")
GROUPS = {
    "baselines": [c.name for c in CONTENDERS.values() if c.kind in BASELINES and c.name not in _EXTRA],
    "catapults": [c.name for c in CONTENDERS.values() if c.kind == "catapult" and c.name not in _EXTRA],
    "controls": [c.name for c in CONTENDERS.values() if c.kind == "control"],
}
QUICK_TASK = dataclasses.replace(TASKS["rank2"], name="quick", width=16, train=40, d=5, steps=30, val=40, test=40)
_WITHOUT_DATA = [task.name for task in DEFAULT if not task.classifies]
Map = Callable[[Callable[[Run], Record], Iterable[Run]], Iterator[Record]]


def run_all(plan: Plan, results: Results, jobs: int, notes: Console) -> None:
    """Run what is missing, task by task; every record is kept as soon as it is there."""
    columns = (
        TextColumn("{task.description:<15}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[state]}"),
    )  # fmt: skip
    with Progress(*columns, console=notes) as progress, workers(jobs) as each:
        for task in plan.tasks:
            bar, done = progress.add_task(task.name, total=None, state=""), 0
            while runs := plan.missing(task, results):
                progress.update(bar, total=done + len(runs))
                for record in each(partial(train, folder=plan.folder), runs):
                    results.add(record)
                    done += 1
                    rate = "" if record["lr"] is None else f" at {record['lr']:.3g}"
                    state = f"{record['contender']}{rate}, seed {record['seed']}"
                    progress.update(bar, completed=done, state=state)
            progress.update(bar, total=max(1, done), completed=max(1, done), state="finished")


@contextlib.contextmanager
def workers(jobs: int) -> Iterator[Map]:
    """`map` in so many processes, of one thread each; what is done first comes first."""
    if jobs == 1:
        yield map
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:

        def each(function: Callable[[Run], Record], runs: Iterable[Run]) -> Iterator[Record]:
            for future in as_completed([pool.submit(function, run) for run in runs]):
                yield future.result()

        try:
            yield each
        finally:
            pool.shutdown(cancel_futures=True)


def chosen_tasks(names: list[str], large: bool) -> tuple[Task, ...]:
    if "all" in names:
        names = list(TASKS)
    tasks = DEFAULT if names == ["default"] else tuple(TASKS[name] for name in names)
    return tuple(task.enlarged() for task in tasks) if large else tasks


def chosen_contenders(names: list[str], notes: Console) -> tuple[str, ...]:
    chosen: list[str] = []
    for name in names:
        chosen += [n for n in GROUPS.get(name, [name]) if n not in chosen]
    for problem in (CONTENDERS[n].missing() for n in chosen):
        if problem:
            notes.print(problem, markup=False)
    return tuple(n for n in chosen if CONTENDERS[n].missing() is None)


def seeds(text: str) -> tuple[int, ...]:
    """60-69 or 60,61,65"""
    first, dash, last = text.partition("-")
    return tuple(range(int(first), int(last) + 1)) if dash else tuple(int(s) for s in text.split(","))


def policy_change(text: str) -> tuple[str, Any]:
    """NAME=VALUE"""
    name, _, value = text.partition("=")
    changed = {name: ast.literal_eval(value)}
    CatapultPolicy(**changed)
    return name, changed[name]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names, contenders = ["default", "all", *TASKS], [*GROUPS, *CONTENDERS]
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with the data sets")
    parser.add_argument(
        "--results", type=Path, nargs="+", default=[Path("runs/generalization.jsonl")], metavar="FILE",
        help="what is finished and what is new; further files are only read (default: runs/generalization.jsonl)",
    )  # fmt: skip
    parser.add_argument("--tasks", nargs="+", default=["default"], choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument(
        "--optimizers", nargs="+", default=["baselines", "catapults"], choices=contenders, metavar="NAME",
        help=f"{', '.join(contenders)} (default: baselines catapults)",
    )  # fmt: skip
    parser.add_argument("--seeds", type=seeds, default=Plan.report_seeds, help="to report on (default: 60-69)")
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side, a core each (default: 1)")
    parser.add_argument("--large", action="store_true", help="nets 4 times as wide, twice the samples and steps")
    parser.add_argument(
        "--policy", nargs="+", type=policy_change, default=[], metavar="NAME=VALUE",
        help="change the settings of CatapultPolicy, such as kappa=3",
    )  # fmt: skip
    parser.add_argument(
        "--quick", action="store_true", help="smoke run on a tiny task: every path, no figure worth quoting"
    )
    parser.add_argument("--report", action="store_true", help="run nothing, show what is there")
    parser.add_argument("--publish", type=Path, metavar="DIR", help="write results and page there, such as docs")
    parser.add_argument("--details", action="store_true", help="also a table for each task, with every optimizer")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    torch.set_num_threads(1)
    # Not a terminal: wide enough for one line a row.
    console, notes = Console(width=None if sys.stdout.isatty() else 180), Console(stderr=True)
    plan = Plan(
        (QUICK_TASK,) if options.quick else chosen_tasks(options.tasks, options.large),
        chosen_contenders(options.optimizers, notes),
        tuning_seeds=(40,) if options.quick else Plan.tuning_seeds,
        report_seeds=(60, 61) if options.quick else options.seeds,
        policy=dict(options.policy),
        folder=options.data,
    )
    path, *others = options.results
    path.parent.mkdir(parents=True, exist_ok=True)
    results = Results(path, others)
    if not options.report:
        try:
            check(plan.tasks, options.data)
            run_all(plan, results, options.jobs, notes)
        except DataError as error:
            notes.print(f"{error}\nWithout any data: --tasks {' '.join(_WITHOUT_DATA)}", markup=False)
            return 1
        except KeyboardInterrupt:
            notes.print("Stopped. The same command goes on from here; --report shows what is there.")
            return 130
    tasks = [found for found in (find(plan, task, results) for task in plan.tasks) if found.outcomes]
    console.print(table(tasks), total(tasks), against_each(tasks))
    for found in tasks if options.details else ():
        console.print(details(found))
    if options.publish:
        file, page = publish(plan, tasks, options.publish)
        console.print(f"written: {file} and {page}", markup=False, highlight=False)
    try:
        plot(tasks, path.with_suffix(".png"))
        picture = f"picture: {path.with_suffix('.png')}"
    except ImportError:
        picture = "no picture without matplotlib (pip install 'catapult_opt[plot]')"
    console.print(f"{len(results.records)} runs in {results.path}; {picture}", markup=False, highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
