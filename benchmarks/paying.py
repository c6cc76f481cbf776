"""What makes a catapult pay: what the policy could see of each one, and what it gained.

    python benchmarks/paying.py --data DIR     # five tasks, three seeds; some minutes on one core
    python benchmarks/paying.py --tasks rank2  # rank tasks need no data

CatapultSGD trains as it does by default. For every catapult (from the step on which the controller sees it until the
loss is back, or patience is out) a copy of the weights at its start is trained on, by the same batches for as many
steps, at 0.8 eta_crit. The gain is log(validation loss of the copy / validation loss after the catapult): above 0 it
paid. At once it is unfair to the catapult, whose training loss has just come back to where it was, while that of the
copy has gone on falling; so the gain that counts is taken after both have trained on for --later steps at 0.8 eta_crit.
Then the rank correlations of that gain with all that could be seen: by task, and over all tasks of the ranks within
each task (tasks differ in everything), also with the catapult's number in its training taken out, as early ones differ
from late ones in everything, too. Bootstrap intervals; those over all tasks draw whole trainings.

Found with the controller of version 0.1.0, whose catapults were counted from the arming on, seeds 0 to 2 (153
catapults in 15 trainings; 18 more were undone), and not repeated with a later one. At once they gain
nothing. Later they pay on rank2 (median log gain 0.11, 86 % of them above 0), nearly all of it the first one of each
training (1.2 to 1.6); there all that tells an early catapult from a late one goes with the gain: the AGOP turned (rank
correlation of its likeness to itself -0.96), a high loss before, lambda down, a short spike. On rank2-b50 they pay a
little (0.04, 83 %), on rank4, horse-truck and mnist-noise not within 100 steps (medians 0.00, 57 to 62 %), and on
these four no quantity has an interval clear of zero. Over all tasks four have, all weak: lambda after / before (-0.22),
steps until back (-0.22), dead units after (-0.19), steps in hot (-0.13). Peak height, the change of the AGOP and the
share in the top eigenspace predict nothing over all tasks. The figures are those of one version of the package: any
change of a measurement sends trainings on other paths. With another the medians were 0.12 on rank2, 0.04 on rank2-b50
and 0.00 to 0.01 on the others (on rank4 300 steps later as little), and of the four only lambda after / before came out
again (-0.26). No rule for when to fire follows from this. It does not show what a series of catapults would come to.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from controls import tracking
from drivers import Setup
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from scipy.stats import bootstrap, rankdata
from tasks import TASKS, Problem, Task, check, criterion, draw
from torch import Tensor, nn

from catapult_opt import CatapultSGD, critical_lr
from catapult_opt.analysis.agop import agop, alignment
from catapult_opt.analysis.datasets import DataError
from catapult_opt.analysis.ntk import eigenspaces, loss_in_eigenspace, ntk
from catapult_opt.runlog import encode

NAMES = ("rank2", "rank4", "rank2-b50", "horse-truck", "mnist-noise")
SEEN = {
    "number": "number in the training",
    "level": "loss before / first loss",
    "peak": "peak / first loss",
    "rise": "peak / loss before",
    "curvature": "lambda after / before",
    "hot": "steps at the raised rate",
    "length": "steps until back",
    "features": "AGOP with itself, after . before",
    "dead": "dead units after",
    "died": "dead units after - before",
    "top": "share of the rise in the top eigenspace",
}
_SAMPLES = 500  # for AGOP, curvature and dead units
_ROWS = 200  # of the tangent kernel: samples times outputs
_TOP = 5  # eigenvectors for each output, as in the thesis
_RESAMPLES = 1000
BELOW = 0.8  # critical rates, at which the copies are trained on
# Phases of the controller: a catapult is under way; its rate is the raised one.
UNDER_WAY = ("spike", "back")
HIGH = ("spike",)
Row = dict[str, Any]
Weights = dict[str, Tensor]


def catapults(problem: Problem, seed: int, later: int, tick: Callable[[], None] = lambda: None) -> list[Row]:
    """One training, and a row for each of its catapults: from where the controller sees it until it is over."""
    task = problem.task
    torch.manual_seed(10_000 + seed)
    model, loss_of = problem.build(), criterion(task)
    torch.manual_seed(seed)
    optimizer = CatapultSGD(model.parameters(), model=model, criterion=loss_of)
    order = list(itertools.islice(problem.batches(seed), task.steps + later))
    rows: list[Row] = []
    losses: list[float] = []
    begun = peak = _weights(model)
    start, highest, high = 0, -math.inf, 0
    for step in range(task.steps):
        weights, before = _weights(model), optimizer.phase in UNDER_WAY
        losses.append(_step(model, loss_of, optimizer, problem, order[step]))
        tick()
        if optimizer.phase in UNDER_WAY and not before:
            start, begun, highest, high = step, weights, -math.inf, 0
        if losses[-1] > highest:
            highest, peak = losses[-1], weights
        high += optimizer.phase in HIGH
        if before and optimizer.phase not in UNDER_WAY:
            row = {"task": task.name, "seed": seed, "step": step, "number": len(rows)}
            row |= _seen(problem, losses, (start, begun), peak, weights, high)
            row |= _gains(problem, begun, weights, order[start:step], order[step : step + later])
            rows.append(row)
    optimizer.detach()
    return rows


def _step(model: nn.Module, loss_of: nn.Module, optimizer: CatapultSGD, problem: Problem, rows: Tensor) -> float:
    optimizer.zero_grad()
    loss = loss_of(model(problem.train.inputs[rows]), problem.train.targets[rows])
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def _weights(model: nn.Module) -> Weights:
    return {name: t.clone() for name, t in model.state_dict().items()}


def at(problem: Problem, weights: Weights) -> nn.Module:
    with torch.random.fork_rng():
        model = problem.build()
    model.load_state_dict(weights)
    return model


def _seen(
    problem: Problem, losses: list[float], begun: tuple[int, Weights], peak: Weights, after: Weights, high: int
) -> Row:
    """All that could be seen of a catapult when it is over, from the training data alone."""
    start, highest = begun[0], max(losses[begun[0] :])
    models = [at(problem, w) for w in (begun[1], after)]
    level = problem.loss(models[0], problem.train)
    x, y = problem.train.inputs[:_SAMPLES], problem.train.targets[:_SAMPLES]
    curvature = [1 / critical_lr(model, criterion(problem.task), x, y).eta_crit for model in models]
    features = [agop(model, x) for model in models]
    dead = [dead_share(model, x) for model in models]
    usable = all(bool(g.isfinite().all()) and bool(g.any()) for g in features)
    return {
        "level": level / losses[0],
        "peak": highest / losses[0],
        "rise": highest / level,
        "curvature": curvature[1] / curvature[0],
        "hot": high,
        "length": len(losses) - 1 - start,
        "features": alignment(*features) if usable else math.nan,
        "dead": dead[1],
        "died": dead[1] - dead[0],
        "top": top_share(problem, models[0], at(problem, peak)),
    }


@torch.no_grad()
def dead_share(model: nn.Module, inputs: Tensor) -> float:
    """Part of the ReLU units that are zero on all the inputs."""
    dead: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _, __, out: dead.append((out <= 0).all(0).flatten().float()))
        for module in model.modules()
        if isinstance(module, nn.ReLU)
    ]
    model(inputs)
    for hook in hooks:
        hook.remove()
    return float(torch.cat(dead).mean()) if dead else 0.0


def top_share(problem: Problem, before: nn.Module, peak: nn.Module) -> float:
    """Share of the rise of the squared error that lies in the top eigenspaces of the kernels; nan without a rise."""
    outputs = problem.train.targets.shape[1]
    x, y = (t[: _ROWS // outputs] for t in (problem.train.inputs, problem.train.targets))
    parts = []
    for model in (before, peak):
        with torch.no_grad():
            residual = model(x) - y
        kernel = ntk(model, x)
        if not bool(kernel.isfinite().all()):
            return math.nan
        parts.append(loss_in_eigenspace(residual, eigenspaces(kernel), _TOP * outputs))
    (top, rest), (top_peak, rest_peak) = parts
    rise = top_peak + rest_peak - top - rest
    return (top_peak - top) / rise if rise > 0 else math.nan


def _gains(problem: Problem, begun: Weights, after: Weights, during: list[Tensor], later: list[Tensor]) -> Row:
    ours, other = at(problem, after), at(problem, begun)
    before = problem.loss(other, problem.val)
    below(problem, other, during)
    now = problem.loss(ours, problem.val), problem.loss(other, problem.val)
    for model in (ours, other):
        below(problem, model, later)
    then = problem.loss(ours, problem.val), problem.loss(other, problem.val)
    return {"plain": math.log(before / now[0]), "gain": math.log(now[1] / now[0]), "later": math.log(then[1] / then[0])}


def below(problem: Problem, model: nn.Module, order: Iterable[Tensor]) -> list[float]:
    """Train on at 0.8 times the critical rate of every step; the rates."""
    order, loss_of = list(order), criterion(problem.task)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        driver = tracking(Setup(model, loss_of, len(order), lr=BELOW))
        rates = []
        for rows in order:
            x, y = problem.train.inputs[rows], problem.train.targets[rows]
            driver.optimizer.zero_grad()
            loss = loss_of(model(x), y)
            loss.backward()
            driver.step(loss.item(), x, y)
            rates.append(driver.rate)
        driver.observer.detach()
    return rates


# --------------------------------------------------------------------------------------------------------- statistics


def correlation(rows: Sequence[Row], key: str, gain: str, without: str | None = None) -> float:
    """Spearman's, of the ranks within each task, perhaps the partial one; nan where a rank does not vary."""
    keys = (key, gain, *([without] if without else []))
    ranks: list[np.ndarray[Any, Any]] = [np.zeros((0, len(keys)))]
    for _, group in _by(rows, "task"):
        values = np.array([[row[k] for k in keys] for row in group])
        values = values[np.isfinite(values).all(1)]
        columns = np.column_stack([rankdata(column) for column in values.T])
        ranks.append((columns - columns.mean(0)) / len(values) if len(values) else columns)
    together = np.concatenate(ranks)
    if len(together) < 4 or not together.std(0).all():
        return math.nan
    r = np.corrcoef(together.T)
    if without is None:
        return float(r[0, 1])
    left = math.sqrt(max(0.0, (1 - r[0, 2] ** 2) * (1 - r[1, 2] ** 2)))
    return float((r[0, 1] - r[0, 2] * r[1, 2]) / left) if left > 1e-9 else math.nan


def interval(units: Sequence[Sequence[Row]], statistic: Callable[[list[Row]], float]) -> tuple[float, float]:
    """95 % percentile bootstrap interval, drawing from the units with replacement; nan for too few of them."""
    if len(units) < 4:
        return math.nan, math.nan
    found = bootstrap(
        (np.arange(len(units)),), lambda drawn: statistic([row for i in drawn for row in units[i]]),
        vectorized=False, n_resamples=_RESAMPLES, method="percentile", rng=np.random.default_rng(0),
    ).bootstrap_distribution  # fmt: skip
    low, high = np.nanquantile(found, [0.025, 0.975]) if np.isfinite(found).any() else (math.nan, math.nan)
    return float(low), float(high)


def _by(rows: Iterable[Row], *keys: str) -> Iterator[tuple[Any, list[Row]]]:
    def key(row: Row) -> tuple[Any, ...]:
        return tuple(row[k] for k in keys)

    return ((k, list(group)) for k, group in itertools.groupby(sorted(rows, key=key), key))


def gains_table(rows: Sequence[Row]) -> Table:
    found = Table(
        title="Catapults, and their median gain in log validation loss over as many steps at 0.8 eta_crit",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    found.add_column("task", no_wrap=True)
    headers = ("catapults", "log fall of val loss", "gain at once", "paid", "gain later", "paid later")
    for header in headers:
        found.add_column(header, justify="right")
    for name, group in [*((key[0], g) for key, g in _by(rows, "task")), ("all", list(rows))]:
        units = [g for _, g in _by(group, "task", "seed")] if name == "all" else [[row] for row in group]
        cells = [_median(group, "plain", units)]
        for key in ("gain", "later"):
            paid = f"{100 * np.mean([row[key] > 0 for row in group]):.0f} %" if group else ""
            cells += [_median(group, key, units), paid]
        found.add_row(name, str(len(group)), *cells)
    return found


def _median(rows: Sequence[Row], key: str, units: Sequence[Sequence[Row]]) -> str:
    if not rows:
        return ""
    low, high = interval(units, lambda drawn: float(np.median([row[key] for row in drawn])))
    spread = f" [{low:+.2f}, {high:+.2f}]" if math.isfinite(low) else ""
    return f"{np.median([row[key] for row in rows]):+.2f}{spread}"


def correlations_table(rows: Sequence[Row]) -> Table:
    title = "Rank correlations of the later gain with what could be seen (bold: interval clear of zero)"
    found = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    tasks = {key[0]: group for key, group in _by(rows, "task")}
    counted = [f"{name} ({len(group)})" for name, group in tasks.items()]
    for header in ("seen", *counted, f"all ({len(rows)})", "all, number taken out", "all, gain at once"):
        found.add_column(header, no_wrap=header == "seen")
    trainings = [group for _, group in _by(rows, "task", "seed")]
    for key, label in SEEN.items():
        cells = [_cell([[row] for row in group], key) for group in tasks.values()]
        more = _cell(trainings, key, without="number"), _cell(trainings, key, "gain")
        found.add_row(label, *cells, _cell(trainings, key), *more)
    return found


def _cell(units: Sequence[Sequence[Row]], key: str, gain: str = "later", without: str | None = None) -> str:
    value = correlation([row for unit in units for row in unit], key, gain, without)
    if not math.isfinite(value):
        return "-"
    low, high = interval(units, lambda rows: correlation(rows, key, gain, without))
    text = f"{value:+.2f} \\[{low:+.2f}, {high:+.2f}]" if math.isfinite(low) else f"{value:+.2f}"
    return f"[bold]{text}[/]" if low > 0 or high < 0 else text


def plot(rows: Sequence[Row], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 8), layout="constrained")
    for ax, (key, label) in zip(figure.subplots(3, 4, sharey=True).flat, SEEN.items(), strict=False):
        for name, group in _by(rows, "task"):
            ax.plot([row[key] for row in group], [row["later"] for row in group], "o", alpha=0.6, label=name[0])
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set(title=label, xscale="log" if key in ("level", "peak", "rise", "curvature") else "linear")
    figure.axes[0].legend(frameon=False)
    figure.axes[-1].set_axis_off()
    figure.supylabel("later gain in log validation loss over 0.8 eta_crit")
    figure.savefig(path, dpi=110)


def study(tasks: Sequence[Task], seeds: Sequence[int], folder: Path | None, later: int, notes: Console) -> list[Row]:
    columns = TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    rows: list[Row] = []
    with Progress(*columns, console=notes) as progress:
        bars = {task: progress.add_task(task.name, total=task.steps * len(seeds), start=False) for task in tasks}
        for task, bar in bars.items():
            progress.start_task(bar)
            for seed in seeds:
                rows += catapults(draw(task, folder, seed), seed, later, lambda bar=bar: progress.advance(bar))  # type: ignore[misc]
            progress.stop_task(bar)
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [name for name, task in TASKS.items() if task.loss == "mse"]
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with the data sets")
    parser.add_argument("--out", type=Path, default=Path("runs/paying"), help="folder (default: %(default)s)")
    parser.add_argument("--tasks", nargs="+", default=NAMES, choices=known, metavar="NAME", help=", ".join(known))
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each task (default: 3)")
    parser.add_argument("--later", type=int, default=100, help="steps after a catapult (default: 100)")
    options = parser.parse_args(arguments)
    if options.seeds < 1 or options.later < 0:
        parser.error(f"--seeds must be at least 1 and --later at least 0, got {options.seeds} and {options.later}")
    torch.set_num_threads(1)
    console, notes = Console(width=None if sys.stdout.isatty() else 180), Console(stderr=True)
    tasks = [TASKS[name] for name in options.tasks]
    try:
        check(tasks, options.data)
    except DataError as error:
        notes.print(f"{error}\nThe rank tasks need no data: --tasks rank2 rank4 rank2-b50", markup=False)
        return 1
    rows = study(tasks, range(options.seeds), options.data, options.later, notes)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "catapults.jsonl").write_text("".join(json.dumps(encode(row)) + "\n" for row in rows))
    console.print(gains_table(rows))
    console.print(correlations_table(rows))
    try:
        plot(rows, options.out / "paying.png")
        pictures = " and paying.png"
    except ImportError:
        pictures = "; no picture without matplotlib (pip install 'catapult_opt[plot]')"
    console.print(f"Wrote catapults.jsonl{pictures} to {options.out}", markup=False, highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
