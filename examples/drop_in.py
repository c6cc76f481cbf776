"""The same training loop with SGD, Adam and CatapultSGD: one line changed.

Full-batch training on the thesis' rank-2 task f*(x) = x1 x2 (2000 noisy samples in 100 dimensions; two-layer ReLU net
of width 1024, no biases) from the same weights. SGD and Adam get the best of a grid of constant rates, chosen by the
test loss on this very task; CatapultSGD is given none, and is evaluated by its averaged weights. See what an untuned
rate does with --sgd-lr 3 (half the critical rate) or --adam-lr 0.03.

    python examples/drop_in.py                 # about a minute
    python examples/drop_in.py --quick         # under 30 seconds: smaller net and task, so other numbers

Leaves in --out a run log per optimizer (`catapult-opt report` reads them), and drop_in.png where matplotlib is
installed. Logs of an earlier call in the same folder are replaced.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn

from catapult_opt import CatapultMonitor, CatapultSGD, read_log
from catapult_opt.analysis import tasks
from catapult_opt.analysis.agop import agop, alignment
from catapult_opt.analysis.networks import ntk_mlp
from catapult_opt.progress import BarsOrLines
from catapult_opt.report import render, summarize
from catapult_opt.runlog import RunLog

EVALUATE_EVERY = 10
Contender = tuple[torch.optim.Optimizer, Any]  # the optimizer, and who records its metrics


@dataclass(frozen=True)
class Setting:
    """Sizes of the task, the net and the training."""

    d: int
    width: int
    n_train: int
    n_eval: int
    steps: int
    sgd_lr: float
    adam_lr: float
    overhead: float | None = None  # of CatapultSGD


# Best of SGD at 0.5 to 2.5 times the critical rate (from 2 on it diverges) and of Adam from 0.001 to 3 in half decades.
FULL = Setting(d=100, width=1024, n_train=2000, n_eval=5000, steps=500, sgd_lr=10.5, adam_lr=1.0)
QUICK = Setting(d=40, width=256, n_train=500, n_eval=1000, steps=300, sgd_lr=9.0, adam_lr=1.0)


def sgd(model: nn.Module, criterion: nn.Module, setting: Setting, log: Path) -> Contender:
    optimizer = torch.optim.SGD(model.parameters(), lr=setting.sgd_lr)
    return optimizer, CatapultMonitor(optimizer, model=model, criterion=criterion, every=2, log=log)


def adam(model: nn.Module, criterion: nn.Module, setting: Setting, log: Path) -> Contender:
    optimizer = torch.optim.Adam(model.parameters(), lr=setting.adam_lr)
    return optimizer, CatapultMonitor(optimizer, model=model, criterion=criterion, every=2, log=log)


def catapult_sgd(model: nn.Module, criterion: nn.Module, setting: Setting, log: Path) -> Contender:
    optimizer = CatapultSGD(model.parameters(), model=model, criterion=criterion, overhead=setting.overhead, log=log)
    return optimizer, optimizer  # keeps its own log


CONTENDERS = {"SGD": sgd, "Adam": adam, "CatapultSGD": catapult_sgd}


def train(name: str, setting: Setting, seed: int, log: Path, tick: Callable[[str], None]) -> None:
    """The loop, the same for all: nothing in it knows which optimizer it has."""
    task = tasks.rank(2, setting.n_train, setting.n_eval, setting.n_eval, d=setting.d, seed=seed)
    model = ntk_mlp(setting.d, setting.width, depth=2, generator=torch.Generator().manual_seed(10_000 + seed))
    criterion = nn.MSELoss()
    torch.manual_seed(seed)  # CatapultSGD starts its first measurement from a random vector
    optimizer, recorder = CONTENDERS[name](model, criterion, setting, log)
    for step in range(1, setting.steps + 1):
        optimizer.zero_grad()
        loss = criterion(model(task.train.inputs), task.train.targets)
        loss.backward()
        optimizer.step()
        if step % EVALUATE_EVERY == 0:
            with averaged(optimizer):
                metrics = evaluate(model, criterion, task)
            recorder.log_metrics(**metrics)
            tick(f"train {loss.item():8.2e}  test {metrics['test_loss']:.3f}  AGOP {metrics['agop_alignment']:.3f}")
    recorder.detach()


def averaged(optimizer: torch.optim.Optimizer) -> AbstractContextManager[None]:
    """What CatapultSGD is to be evaluated by: the mean of the weights of calm steps."""
    return optimizer.averaged() if isinstance(optimizer, CatapultSGD) else nullcontext()


@torch.no_grad()
def evaluate(model: nn.Module, criterion: nn.Module, task: tasks.RegressionTask) -> dict[str, float]:
    return {
        "val_loss": float(criterion(model(task.val.inputs), task.val.targets)),
        "test_loss": float(criterion(model(task.test.inputs), task.test.targets)),
        "agop_alignment": _alignment(model, task),
    }


def _alignment(model: nn.Module, task: tasks.RegressionTask) -> float:
    features = agop(model, task.train.inputs)
    return alignment(features, task.egop) if bool(features.isfinite().all()) else math.nan  # diverged


def train_all(setting: Setting, seed: int, out: Path, console: Console) -> dict[str, RunLog]:
    columns = TextColumn("{task.description:>11}"), BarColumn(), TextColumn("{task.fields[state]}"), TimeElapsedColumn()
    paths = {name: out / f"{name}.jsonl" for name in CONTENDERS}
    with BarsOrLines(*columns, console=console) as progress:
        bars = {name: progress.add_task(name, start=False, total=setting.steps, state="waiting") for name in CONTENDERS}
        for name, bar in bars.items():
            paths[name].unlink(missing_ok=True)  # a run log is never written over
            progress.start_task(bar)
            train(name, setting, seed, paths[name], partial(_tick, progress, bar))
            progress.stop_task(bar)
    return {name: read_log(path) for name, path in paths.items()}


def _tick(progress: BarsOrLines, bar: TaskID, state: str) -> None:
    progress.update(bar, advance=EVALUATE_EVERY, state=state)


def table(logs: dict[str, RunLog], setting: Setting) -> Table:
    """Every optimizer at its best validation loss."""
    rates = {"SGD": f"{setting.sgd_lr:g}", "Adam": f"{setting.adam_lr:g}", "CatapultSGD": "found"}
    result = Table(title="At the best validation loss", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    result.add_column("optimizer")
    for header in ("learning rate", "step", "test loss", "AGOP alignment", "catapults"):
        result.add_column(header, justify="right")
    for name, log in logs.items():
        run = summarize(log)
        found = ["diverged", "", ""]
        if run.best_step is not None:
            found = [str(run.best_step), f"{run.test_value:.3f}", f"{run.agop:.3f}"]
        result.add_row(name, rates[name], *found, str(run.catapults))
    return result


def plot(logs: dict[str, RunLog], path: Path, title: str) -> None:
    """Training loss, test loss and AGOP alignment of all; the rate of CatapultSGD against the critical one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    figure.suptitle(title)
    (training, test), (features, rates) = figure.subplots(2, 2)
    for (name, log), color in zip(logs.items(), ("#edae49", "#00798c", "#d1495b"), strict=True):
        training.semilogy(log.column("step"), log.column("loss"), color=color, linewidth=1, label=name)
        for ax, key in ((test, "test_loss"), (features, "agop_alignment")):
            values = log.metric(key)
            ax.plot(list(values), list(values.values()), color=color, label=name)
    training.set(title="training loss: the spikes are catapults", ylim=(1e-6, None))
    training.legend(frameon=False)
    test.set(title="test loss", ylim=(0, 2))
    features.set(title="AGOP alignment", xlabel="step", ylim=(0, 1.02))
    log = logs["CatapultSGD"]
    rates.semilogy(log.column("step"), log.column("effective_lr"), color="#d1495b", label="its learning rate")
    measured = [(record["step"], record["eta_crit"]) for record in log.measured]
    rates.semilogy(*zip(*measured, strict=True), color="black", linewidth=1, label="critical learning rate")
    rates.set(title="CatapultSGD", xlabel="step")
    rates.legend(frameon=False)
    for ax in (training, test, features, rates):
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/drop_in"), help="folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of data and weights (default: %(default)s)")
    parser.add_argument("--sgd-lr", type=float, help=f"learning rate of SGD (default: {FULL.sgd_lr:g}, tuned)")
    parser.add_argument("--adam-lr", type=float, help=f"learning rate of Adam (default: {FULL.adam_lr:g}, tuned)")
    parser.add_argument("--overhead", type=float, help="share of the time CatapultSGD may measure for, such as 0.05")
    parser.add_argument("--quick", action="store_true", help="under 30 seconds; not a comparison")
    args = parser.parse_args(argv)

    console = Console()
    given = {key: getattr(args, key) for key in ("sgd_lr", "adam_lr", "overhead")}
    chosen = {key: value for key, value in given.items() if value is not None}
    setting = replace(QUICK if args.quick else FULL, **chosen)
    title = f"Rank-2 task, ReLU net of width {setting.width}, full batch, {setting.steps} steps"
    console.print(title, highlight=False)
    if args.quick:
        console.print(
            "--quick: a smaller net on a smaller, easier task: a look at the output, no comparison", style="yellow"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    logs = train_all(setting, args.seed, args.out, console)
    render([summarize(log) for log in logs.values()], list(logs.values()), console)
    console.print(table(logs, setting))
    try:
        plot(logs, args.out / "drop_in.png", title)
        pictures = " and drop_in.png"
    except ImportError:
        pictures = "; no picture without matplotlib (pip install 'catapult_opt[plot]')"
    console.print(f"Wrote run logs{pictures} to {args.out}", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
