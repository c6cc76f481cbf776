"""Pictures of a run. Needs matplotlib, which is an extra: ``pip install 'catapult_opt[plot]'``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from catapult_opt.report import catapult_peaks
from catapult_opt.runlog import RunLog

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("plotting needs matplotlib: pip install 'catapult_opt[plot]'") from error

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_lambda", "plot_loss", "plot_rates", "plot_run", "save"]


def plot_loss(log: RunLog, ax: Axes | None = None) -> Axes:
    """The loss over the steps."""
    ax = _axes(ax)
    ax.plot(log.column("step"), log.column("loss"), color="tab:blue", linewidth=1)
    return _finish(log, ax, "loss")


def plot_rates(log: RunLog, ax: Axes | None = None) -> Axes:
    """The learning rate against the critical one."""
    ax = _axes(ax)
    _plot_measured(log, ax, "eta_crit", color="tab:red", label=r"$\eta_{crit}$")
    ax.plot(log.column("step"), log.column("effective_lr"), color="black", linewidth=1, label=r"$\eta$")
    return _finish(log, ax, "learning rate")


def plot_lambda(log: RunLog, ax: Axes | None = None) -> Axes:
    """The measured top eigenvalue of the curvature."""
    ax = _axes(ax)
    _plot_measured(log, ax, "lambda_max", color="tab:purple")
    return _finish(log, ax, r"$\lambda_{max}$")


_PANELS = (plot_loss, plot_rates, plot_lambda)


def plot_run(log: RunLog, axes: Sequence[Axes] | None = None) -> Sequence[Axes]:
    """Loss, rates and lambda_max in three panels that share their steps."""
    if axes is None:
        axes = list(Figure(figsize=(8, 7), layout="constrained").subplots(len(_PANELS), sharex=True))
    for panel, ax in zip(_PANELS, axes, strict=True):
        panel(log, ax=ax)
    axes[0].set_title(log.name.replace("$", r"\$"))
    axes[-1].set_xlabel("step")
    return axes


def save(logs: Sequence[RunLog], path: str | os.PathLike[str]) -> None:
    """Write a picture with a column of panels per run, without touching pyplot's state or needing a display."""
    figure = Figure(figsize=(2 + 6 * len(logs), 7), layout="constrained")
    grid = figure.subplots(len(_PANELS), len(logs), sharex="col", sharey="row", squeeze=False)
    for column, log in enumerate(logs):
        plot_run(log, list(grid[:, column]))
        for ax in grid[:, column] if column else ():
            ax.set_ylabel("")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _axes(ax: Axes | None) -> Axes:
    return Figure(layout="constrained").subplots() if ax is None else ax


def _plot_measured(log: RunLog, ax: Axes, key: str, **style: Any) -> None:
    records = log.measured
    marker = "." if len(records) < 60 else None  # few measurements: show where they are
    ax.plot([r["step"] for r in records], [r[key] for r in records], linewidth=1, marker=marker, **style)


def _finish(log: RunLog, ax: Axes, label: str) -> Axes:
    """Scale and label of a panel, the super-critical steps shaded, catapults, collapses and restores marked."""
    collapses, undone = ([r["step"] for r in log.events if r["event"] == event] for event in ("collapse", "restore"))
    ax.set_yscale("log", nonpositive="mask")
    ax.set_ylabel(label)
    for first, last in _super_critical_spans(log):
        ax.axvspan(first - 0.5, last + 0.5, color="tab:orange", alpha=0.25, linewidth=0, label="super-critical")
    for step in catapult_peaks(log):
        ax.axvline(step, color="tab:green", linewidth=0.8, linestyle="--", alpha=0.8, label="catapult")
    for step in collapses:
        ax.axvline(step, color="tab:red", linewidth=0.8, linestyle=":", label="collapse")
    for step in undone:
        ax.axvline(step, color="black", linewidth=0.8, linestyle=":", label="undone")
    handles = {name: handle for handle, name in zip(*ax.get_legend_handles_labels(), strict=True)}  # one a name
    if label != "loss":  # the marks are explained once, beside the loss
        handles = {name: handle for name, handle in handles.items() if name.startswith("$")}
    if handles:
        ax.legend(handles.values(), handles.keys(), loc="upper right", fontsize="small")
    return ax


def _super_critical_spans(log: RunLog) -> list[tuple[int, int]]:
    """First and last step of every stretch of super-critical steps; only steps that were measured."""
    spans: list[tuple[int, int]] = []
    for step in (record["step"] for record in log.measured if record["super_critical"]):
        if spans and spans[-1][1] == step - 1:
            spans[-1] = (spans[-1][0], step)
        else:
            spans.append((step, step))
    return spans
