"""Draws idea.png beside this file, the idea in one look: python docs/figures/idea.py (seconds; needs matplotlib).

Two real trainings from the same weights on the thesis' rank-2 task at small size, full batch, measured on every step:
torch's SGD at a constant rate of 1.5 times the critical one, and `CatapultSGD` with nothing set but the length.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torch import nn

from catapult_opt import CatapultMonitor, CatapultPolicy, CatapultSGD, RunLog, critical_lr, read_log
from catapult_opt.analysis import networks, tasks

STEPS = 300
SHOWN = 24  # steps of the single catapult
RATE, CRITICAL, LOSS = "black", "tab:red", "tab:blue"


def train(make: Callable[[nn.Module, nn.Module, Path], torch.optim.Optimizer], steps: int) -> RunLog:
    data = tasks.rank(2, n_train=256, n_val=1, n_test=1, d=20, seed=0).train
    model = networks.ntk_mlp(20, 512, depth=2, generator=torch.Generator().manual_seed(0))
    criterion = nn.MSELoss()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "run.jsonl")
        optimizer = make(model, criterion, path)
        for _ in range(steps):
            optimizer.zero_grad()
            criterion(model(data.inputs), data.targets).backward()
            optimizer.step()
        return read_log(path)


def constant(model: nn.Module, criterion: nn.Module, path: Path) -> torch.optim.Optimizer:
    data = tasks.rank(2, n_train=256, n_val=1, n_test=1, d=20, seed=0).train
    rate = 1.5 * critical_lr(model, criterion, data.inputs, data.targets).eta_crit
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    CatapultMonitor(optimizer, model=model, criterion=criterion, log=path)
    return optimizer


def catapults(model: nn.Module, criterion: nn.Module, path: Path) -> torch.optim.Optimizer:
    policy = CatapultPolicy(total_steps=STEPS)
    return CatapultSGD(model.parameters(), model=model, criterion=criterion, policy=policy, every=1, log=path)


def draw(loss: Axes, rate: Axes, log: RunLog) -> None:
    steps, rates, critical = log.column("step"), log.column("effective_lr"), log.column("eta_crit")
    loss.plot(steps, log.column("loss"), color=LOSS)
    rate.plot(steps, critical, color=CRITICAL, label=r"critical rate $2/\lambda_{max}$")
    rate.plot(steps, rates, color=RATE, label=r"learning rate $\eta$")
    above = [r > c for r, c in zip(rates, critical, strict=True)]
    rate.fill_between(steps, rates, critical, where=above, color="tab:orange", alpha=0.4, linewidth=0, label="above it")
    for ax in (loss, rate):
        ax.set_yscale("log")
        ax.spines[["top", "right"]].set_visible(False)
    rate.set_xlabel("step")


def main() -> None:
    figure = Figure(figsize=(9.5, 4.6), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", width_ratios=[1, 1.35])
    one, many = train(constant, SHOWN), train(catapults, STEPS)
    for column, log in enumerate((one, many)):
        draw(axes[0, column], axes[1, column], log)
    axes[0, 0].set_title("One catapult: a constant rate above the critical one")
    axes[0, 1].set_title("CatapultSGD: one after the other, then settling")
    axes[0, 0].set_ylabel("training loss")
    axes[1, 0].set_ylabel("rate")
    axes[1, 1].legend(loc="upper left", frameon=False)
    axes[1, 0].set_yticks([5, 10, 20, 30], ["5", "10", "20", "30"])
    axes[1, 0].yaxis.set_minor_formatter(NullFormatter())
    note = {"ha": "center", "fontsize": 9, "textcoords": "offset points"}
    losses = one.column("loss")
    peak = max(range(SHOWN), key=lambda i: losses[i])
    arrow = {"arrowprops": {"arrowstyle": "->", "color": "0.3"}}
    axes[0, 0].annotate("the loss spikes ...", (one.column("step")[peak], losses[peak]), (75, -6), **note, **arrow)
    axes[0, 0].annotate("... and comes back", (one.column("step")[-8], losses[-8]), (0, 22), **note, **arrow)
    crossed = next(i for i, r in enumerate(one.steps) if r["eta_crit"] > r["effective_lr"])
    place = one.column("step")[crossed], one.column("eta_crit")[crossed]
    axes[1, 0].annotate("the curvature falls:\nthe critical rate passes the rate", place, (85, -38), **note, **arrow)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=100)


if __name__ == "__main__":
    main()
