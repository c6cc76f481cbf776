"""Smaller batches, more catapults, better features: Table 4.1 of the thesis, counted by `CatapultMonitor`.

A two-layer ReLU net learns f*(x) = x1 x2 from 2000 noisy samples in 100 dimensions. Every batch size trains at the same
constant rate, half the critical learning rate of the full training set, so the full batch never sees a catapult; small
batches have lower critical rates of their own, and the smaller they are, the more often the same rate is above them.

    python examples/batch_sizes.py                # 4 batch sizes x 3 seeds, within 3 minutes on 2 cores
    python examples/batch_sizes.py --quick        # under 30 seconds: smaller net and task, so other numbers

Leaves in --out a run log per run (`catapult-opt report` reads them), runs.csv, and batch_sizes.png where matplotlib is
installed. Logs of an earlier call in the same folder are replaced.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from itertools import chain, count, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn

from catapult_opt import CatapultMonitor, critical_lr, read_log
from catapult_opt.analysis import tasks
from catapult_opt.analysis.agop import agop, alignment
from catapult_opt.analysis.networks import ntk_mlp
from catapult_opt.progress import BarsOrLines
from catapult_opt.report import RunSummary, render, summarize, to_csv
from catapult_opt.runlog import RunLog

THESIS = {2000: (0.74, 0.81), 50: (0.71, 0.84), 10: (0.59, 0.89), 5: (0.42, 0.95)}  # Table 4.1: test loss, alignment
TARGET_LOSS = 1e-3  # the thesis stops here (Appendix C.6)
FULL = {"d": 100, "width": 1024, "n_train": 2000, "n_eval": 5000, "max_steps": 10_000, "evaluate_every": 100}
QUICK = {"d": 40, "width": 256, "n_train": 500, "n_eval": 1000, "max_steps": 1500, "evaluate_every": 25}


@dataclass(frozen=True)
class Run:
    """One training run; crosses to a worker process."""

    batch_size: int
    seed: int
    log: Path
    d: int
    width: int
    n_train: int
    n_eval: int
    max_steps: int
    evaluate_every: int
    device: str

    @property
    def name(self) -> str:
        return f"batch {self.batch_size}, seed {self.seed}"

    @property
    def measure_every(self) -> int:
        """One measured step in this many; the full batch is always the same, and its critical rate changes slowly."""
        return 50 if self.batch_size == self.n_train else 10


def train(run: Run) -> None:
    """The training loop: plain `torch.optim.SGD`, with the monitor looking on."""
    task = tasks.rank(2, run.n_train, run.n_eval, run.n_eval, d=run.d, seed=run.seed).to(run.device)
    # Not the task's seed: the same stream of normal numbers would make the first weights equal to the first inputs.
    generator = torch.Generator().manual_seed(10_000 + run.seed)
    model = ntk_mlp(run.d, run.width, depth=2, generator=generator).to(run.device)
    criterion = nn.MSELoss()

    eta = critical_lr(model, criterion, task.train.inputs, task.train.targets).eta_crit / 2
    optimizer = torch.optim.SGD(model.parameters(), lr=eta)
    monitor = CatapultMonitor(optimizer, model=model, criterion=criterion, every=run.measure_every, log=run.log)

    best = math.inf
    for step, batch in enumerate(_batches(run, generator), start=1):
        optimizer.zero_grad()
        loss = criterion(model(task.train.inputs[batch]), task.train.targets[batch])
        loss.backward()
        optimizer.step()
        if step % run.evaluate_every == 0:
            train_loss, val_loss = (_loss(model, criterion, split) for split in (task.train, task.val))
            monitor.log_metrics(train_loss=train_loss, val_loss=val_loss)
            if val_loss < best:
                best = val_loss
                features = alignment(agop(model, task.train.inputs), task.egop)
                monitor.log_metrics(test_loss=_loss(model, criterion, task.test), agop_alignment=features)
            _tell(run, step, train_loss, val_loss)
            if not TARGET_LOSS <= train_loss < math.inf:
                break
    monitor.detach()


def _batches(run: Run, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Indices of `max_steps` batches, the data shuffled anew in every epoch."""
    epochs = (torch.randperm(run.n_train, generator=generator).split(run.batch_size) for _ in count())
    return islice(chain.from_iterable(epochs), run.max_steps)


@torch.no_grad()
def _loss(model: nn.Module, criterion: nn.Module, split: tasks.Split) -> float:
    return float(criterion(model(split.inputs), split.targets))


# ------------------------------------------------------------------------------- many runs at once, with progress bars

_progress: Any = None  # the queue to the main process, set in every worker


def _start_worker(queue: Any) -> None:
    global _progress
    _progress = queue
    torch.set_num_threads(1)  # the runs are the parallelism


def _tell(run: Run, step: int, train_loss: float, val_loss: float) -> None:
    _progress.put((run.name, step, train_loss, val_loss))


def train_all(runs: list[Run], workers: int, console: Console) -> None:
    """Train every run in a pool of processes, the longest (large batches) first, behind one progress bar a run."""
    # glibc hands large tensors back to the system after every step; keeping them makes the full batch a third faster.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**30))
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**30))
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"), TimeElapsedColumn()
    with (
        BarsOrLines(*columns, console=console) as progress,
        ProcessPoolExecutor(workers, context, _start_worker, (queue,)) as pool,
    ):
        bars = {run.name: progress.add_task(run.name, start=False, total=1.0, state="waiting") for run in runs}
        futures: dict[Future[None], Run] = {}
        try:
            for run in sorted(runs, key=lambda run: -run.batch_size):
                futures[pool.submit(train, run)] = run
            running = set(futures)
            while running:
                done, running = wait(running, timeout=0.1)
                while not queue.empty():
                    _show(progress, bars, *queue.get())
                for future in done:
                    future.result()  # a failed run ends the example
                    bar = bars[futures[future].name]
                    progress.update(bar, completed=1.0)
                    progress.stop_task(bar)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _show(
    progress: BarsOrLines, bars: dict[str, TaskID], name: str, step: int, train_loss: float, val_loss: float
) -> None:
    # The run ends at TARGET_LOSS, so that is what the bar measures: orders of magnitude from 1.
    done = math.log(max(min(train_loss, 1.0), TARGET_LOSS)) / math.log(TARGET_LOSS)
    state = f"step {step:5d}  train {train_loss:8.2e}  val {val_loss:.3f}"
    progress.start_task(bars[name])
    progress.update(bars[name], completed=done, state=state)


# ------------------------------------------------------------------------------------------------------- what came out


@dataclass(frozen=True)
class Outcome:
    """All seeds of one batch size, at the best validation loss."""

    batch_size: int
    logs: list[RunLog]
    runs: list[RunSummary]
    test_loss: list[float]  # NaN where a run diverged
    agop: list[float]
    best_step: list[float]
    super_critical: int  # steps with eta - eta_crit(batch) > 1e-8: the thesis' count of catapults in SGD (Section 4.4)
    measured: int  # out of so many that were measured, up to the best validation loss

    @property
    def share(self) -> float:
        return self.super_critical / max(self.measured, 1)


def read(runs: list[Run]) -> list[Outcome]:
    """The outcomes from the run logs, small batches first."""
    return [_outcome(size, [read_log(run.log) for run in runs if run.batch_size == size]) for size in _sizes(runs)]


def _sizes(runs: list[Run]) -> list[int]:
    return sorted({run.batch_size for run in runs})


def _outcome(size: int, logs: list[RunLog]) -> Outcome:
    runs = [summarize(log) for log in logs]
    return Outcome(
        size, logs, runs,
        test_loss=[math.nan if run.test_value is None else run.test_value for run in runs],
        agop=[math.nan if run.agop is None else run.agop for run in runs],
        best_step=[math.nan if run.best_step is None else run.best_step for run in runs],
        super_critical=sum(run.super_critical for run in runs),
        measured=sum(
            run.best_step is None or record["step"] <= run.best_step
            for log, run in zip(logs, runs, strict=True)
            for record in log.measured
        ),
    )  # fmt: skip


def table(outcomes: list[Outcome], quick: bool) -> Table:
    """The outcomes beside Table 4.1."""
    seeds = len(outcomes[0].runs)
    result = Table(
        title=f"At the best validation loss, mean \u00b1 sd of {seeds} seed{'s' * (seeds > 1)}",
        title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False,
    )  # fmt: skip
    headers = "batch\nsize", "best\nstep", "above critical", "test loss", "Table\n4.1", "AGOP\nalignment", "Table\n4.1"
    for header in headers:
        result.add_column(header, justify="right", no_wrap=True)
    for outcome in outcomes:
        known = [] if quick else [f"{value:.2f}" for value in THESIS.get(outcome.batch_size, ())]
        loss, features = known or ("", "")
        above = f"{outcome.super_critical}/{outcome.measured} {outcome.share:4.0%}"
        result.add_row(
            str(outcome.batch_size), f"{np.mean(outcome.best_step):.0f}", above,
            _mean_sd(outcome.test_loss), loss, _mean_sd(outcome.agop), features,
        )  # fmt: skip
    return result


def verdict(outcomes: list[Outcome]) -> str:
    """Whether the order of Table 4.1 came out, seed by seed."""
    seeds = len(outcomes[0].runs)
    losses = sum(_ascending([o.test_loss[seed] for o in outcomes]) for seed in range(seeds))
    features = sum(_ascending([-o.agop[seed] for o in outcomes]) for seed in range(seeds))
    return f"The smaller the batch, the lower the test loss: on {losses} of {seeds} seeds; " + (
        f"the better the AGOP alignment: on {features} of {seeds}."
    )


def _ascending(values: list[float]) -> bool:
    return all(a < b for a, b in pairwise(values))


def _mean_sd(values: list[float]) -> str:
    return f"{np.mean(values):.2f}" + (f" \u00b1 {np.std(values, ddof=1):.2f}" if len(values) > 1 else "")


def plot(outcomes: list[Outcome], path: Path, title: str, quick: bool) -> None:
    """Test loss, AGOP alignment and steps above critical against the batch size; how the first seed got there."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7.5), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplot_mosaic("AABBCC;DDDEEE")
    known = {} if quick else THESIS
    _against_batch_size(
        axes["A"], outcomes, "test loss", [o.test_loss for o in outcomes], {b: v[0] for b, v in known.items()}
    )
    _against_batch_size(
        axes["B"], outcomes, "AGOP alignment", [o.agop for o in outcomes], {b: v[1] for b, v in known.items()}
    )
    colors = [_COLORS[i % len(_COLORS)] for i in range(len(outcomes))]
    _bars(axes["C"], outcomes, colors)
    for outcome, color in zip(outcomes, colors, strict=True):
        log, label = outcome.logs[0], f"batch {outcome.batch_size}"
        losses = log.metric("train_loss")
        axes["D"].semilogy(list(losses), list(losses.values()), color=color, label=label)
        steps = [record["step"] for record in log.measured]
        ratios = [record["effective_lr"] / record["eta_crit"] for record in log.measured]
        axes["E"].plot(steps, ratios, ".", markersize=3, color=color)
    axes["D"].set(title="training loss (first seed)", xlabel="step")
    axes["D"].legend(frameon=False)
    axes["E"].axhline(1, color="black", linewidth=1)
    axes["E"].set(title="learning rate / critical rate of the batch (first seed)", xlabel="step", ylim=(0, None))
    for ax in axes.values():
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


_COLORS = ["#d1495b", "#edae49", "#00798c", "#30638e"]


def _against_batch_size(
    ax: Any, outcomes: list[Outcome], title: str, values: list[list[float]], thesis: dict[int, float]
) -> None:
    positions = range(len(outcomes))
    spread = [np.std(v, ddof=1) if len(v) > 1 else 0.0 for v in values]
    label = "here, mean \u00b1 sd" if len(values[0]) > 1 else "here"
    ax.errorbar(positions, np.mean(values, axis=1), spread, color="#00798c", marker="o", capsize=4, label=label)
    there = {i: thesis[o.batch_size] for i, o in enumerate(outcomes) if o.batch_size in thesis}
    if there:
        style = {"color": "black", "markerfacecolor": "none", "markersize": 9, "label": "thesis, Table 4.1"}
        ax.plot(list(there), list(there.values()), "D", **style)
        ax.legend(frameon=False, loc="lower right")
    ax.set_xticks(positions, [str(o.batch_size) for o in outcomes])
    ax.set(title=title, xlabel="batch size")
    ax.set_ylim(0, max(1.05, ax.get_ylim()[1]))


def _bars(ax: Any, outcomes: list[Outcome], colors: list[str]) -> None:
    positions = range(len(outcomes))
    bars = ax.bar(positions, [100 * o.share for o in outcomes], color=colors, width=0.6)
    ax.bar_label(bars, [f"{o.super_critical} of\n{o.measured}" for o in outcomes], fontsize="small", padding=2)
    ax.set_xticks(positions, [str(o.batch_size) for o in outcomes])
    ax.set(title="steps above critical, % of measured", xlabel="batch size", ylim=(0, 115))


def main(argv: list[str] | None = None) -> None:
    args = _arguments(argv)
    console = Console()
    setting = QUICK if args.quick else FULL
    runs = [
        Run(batch, seed, args.out / f"batch{batch}-seed{seed}.jsonl", device=args.device, **setting)
        for batch in sorted(set(args.batch_sizes))
        for seed in range(args.seeds)
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    for run in runs:  # a run log is never written over
        run.log.unlink(missing_ok=True)
    title = f"Rank-2 task, ReLU net of width {setting['width']}, SGD at half the full batch's critical rate"
    console.print(title, highlight=False)
    if args.quick:
        console.print("--quick: a smaller task and net; the numbers are not the thesis'", style="yellow")
    train_all(runs, 1 if args.device.startswith("cuda") else min(args.workers, len(runs)), console)

    outcomes = read(runs)
    logs = [log for outcome in outcomes for log in outcome.logs]
    summaries = [summary for outcome in outcomes for summary in outcome.runs]
    render(summaries, logs, console)
    console.print(table(outcomes, args.quick))
    console.print("above critical: steps with \u03b7 > \u03b7_crit of their own batch, of the steps that were measured")
    console.print(verdict(outcomes), highlight=False)
    (args.out / "runs.csv").write_text(to_csv(summaries))
    try:
        plot(outcomes, args.out / "batch_sizes.png", title, args.quick)
        pictures = " and batch_sizes.png"
    except ImportError:
        pictures = "; no picture without matplotlib (pip install 'catapult_opt[plot]')"
    console.print(f"Wrote run logs, runs.csv{pictures} to {args.out}", markup=False, highlight=False, soft_wrap=True)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=_positive, metavar="N", help="runs per batch size (default: 3, with --quick 1)")
    parser.add_argument(
        "--batch-sizes", type=_positive, nargs="+", metavar="B", help="default: 5 10 50 and all samples"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/batch_sizes"), help="folder (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")
    parser.add_argument("--workers", type=_positive, default=os.cpu_count(), help="processes (default: one a core)")
    parser.add_argument("--quick", action="store_true", help="under 30 seconds; not the thesis' numbers")
    args = parser.parse_args(argv)
    n_train = (QUICK if args.quick else FULL)["n_train"]
    args.seeds = args.seeds or (1 if args.quick else 3)
    args.batch_sizes = args.batch_sizes or [5, 10, 50, n_train]
    if max(args.batch_sizes) > n_train:
        parser.error(f"--batch-sizes: {max(args.batch_sizes)} is more than the {n_train} training samples")
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device: {args.device} cannot be used: {str(error).splitlines()[0]}")
    return args


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


if __name__ == "__main__":
    main()
