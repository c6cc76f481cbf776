"""Pictures of a run. Needs matplotlib, which is an extra: ``pip install 'catapult_opt[plot]'``.

A long run is drawn from a few thousand points: of each stretch the first, lowest, highest and last one, so that no
spike is lost and the picture is the same.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt

from . import plain
from .runlog import RunLog
from .runlog_columns import Floats, Integers, Records
from .runlog_reader import columns_of
from .sparklines import catapult_peaks, steps_of

try:
    from matplotlib.collections import LineCollection, PolyCollection
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("plotting needs matplotlib: pip install 'catapult_opt[plot]'") from error

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["MOST_RUNS", "plot_lambda", "plot_loss", "plot_rates", "plot_run", "save"]

MOST_RUNS: Final = 12  # side by side: more can hardly be read, and each takes a second or so
_STRETCHES: Final = 2000  # of a line: about the points across a picture
_TITLE: Final = 40  # characters


def plot_loss(log: RunLog, ax: Axes | None = None) -> Axes:
    """The loss over the steps."""
    ax = _axes(ax)
    _plot(ax, columns_of(log.steps), "loss", color="tab:blue")
    return _finish(log, ax, "loss")


def plot_rates(log: RunLog, ax: Axes | None = None) -> Axes:
    """The learning rate against the critical one."""
    ax = _axes(ax)
    _plot_measured(log, ax, "eta_crit", color="tab:red", label=r"$\eta_{crit}$")
    _plot(ax, columns_of(log.steps), "effective_lr", color="black", label=r"$\eta$")
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
    name = plain.name(log.name)
    axes[0].set_title(name if len(name) <= _TITLE else name[:_TITLE] + "...", parse_math=False)
    axes[-1].set_xlabel("step")
    return axes


def save(logs: Sequence[RunLog], target: str | os.PathLike[str] | BinaryIO) -> None:
    """Write a picture with a column of panels per run, without touching pyplot's state or needing a display.

    Args:
        logs: the runs, at least one and at most ``MOST_RUNS``.
        target: a file, whose suffix names the format; PNG without a suffix, and where it is open already.

    Raises:
        ValueError: no or too many runs, or a format that matplotlib does not know; nothing was written.
        OSError: the file cannot be written.
    """
    if not 1 <= len(logs) <= MOST_RUNS:
        raise ValueError(f"logs must be 1 to {MOST_RUNS} runs, got {len(logs)}: draw them in several pictures")
    path = Path(target) if isinstance(target, (str, os.PathLike)) else None
    picture = io.BytesIO()  # whole before anything is written over
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # a box is shown: no news
        warnings.simplefilter("ignore", RuntimeWarning)  # matplotlib's, of numbers near the largest there are
        figure = Figure(figsize=(2 + 6 * len(logs), 7), layout="constrained")
        grid = figure.subplots(len(_PANELS), len(logs), sharex="col", sharey="row", squeeze=False)
        for column, log in enumerate(logs):
            plot_run(log, list(grid[:, column]))
            for ax in grid[:, column] if column else ():
                ax.set_ylabel("")
        figure.savefig(picture, format=path.suffix[1:].lower() if path and path.suffix else "png", dpi=150)
    if path is None:
        target.write(picture.getvalue())  # type: ignore[union-attr]
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture.getvalue())


def _axes(ax: Axes | None) -> Axes:
    return Figure(layout="constrained").subplots() if ax is None else ax


def _plot_measured(log: RunLog, ax: Axes, key: str, **style: Any) -> None:
    records = columns_of(log.steps).having("eta_crit")
    _plot(ax, records, key, marker="." if len(records) < 60 else None, **style)  # few: show where they are


def _plot(ax: Axes, records: Records, key: str, **style: Any) -> None:
    steps, values = records.integers("step", 0), records.numbers(key)
    shown = _outline(values)
    ax.plot(steps[shown], values[shown], linewidth=1, **style)


def _outline(values: Floats) -> npt.NDArray[np.int64]:
    """Places of the values that have to be drawn: all, or of each stretch the first, lowest, highest and last one.

    Of values that are not finite, and leave a gap, each stretch shows one.
    """
    length = -(-len(values) // _STRETCHES)
    if length <= 4:
        return np.arange(len(values))
    count = -(-len(values) // length)
    padded = np.append(values, np.full(count * length - len(values), values[-1])).reshape(count, length)
    finite = np.isfinite(padded)
    inside = [
        np.zeros(count, np.int64),
        np.where(finite, padded, np.inf).argmin(axis=1),
        np.where(finite, padded, -np.inf).argmax(axis=1),
        finite.argmin(axis=1),
        np.full(count, length - 1),
    ]
    places = np.arange(count) * length + np.stack(inside)
    return np.unique(places.clip(max=len(values) - 1))


def _finish(log: RunLog, ax: Axes, label: str) -> Axes:
    """Scale and label of a panel, the super-critical steps shaded, catapults, collapses and restores marked."""
    ax.set_yscale("log", nonpositive="mask")
    ax.set_ylabel(label)
    _shade(ax, _super_critical_spans(log))
    _mark(ax, catapult_peaks(log), color="tab:green", linestyle="--", alpha=0.8, label="catapult")
    _mark(ax, steps_of(log, "collapse"), color="tab:red", linestyle=":", label="collapse")
    _mark(ax, steps_of(log, "restore"), color="black", linestyle=":", label="undone")
    handles = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    if label != "loss":  # the marks are explained once, beside the loss
        handles = {name: handle for name, handle in handles.items() if name.startswith("$")}
    if handles:
        ax.legend(handles.values(), handles.keys(), loc="upper right", fontsize="small")
    return ax


def _shade(ax: Axes, spans: npt.NDArray[np.float64]) -> None:
    """Shade stretches of steps over the full height, all in one collection."""
    if len(spans):
        corners = [[(first, 0), (first, 1), (last, 1), (last, 0)] for first, last in spans.tolist()]
        style: dict[str, Any] = {"color": "tab:orange", "alpha": 0.25, "linewidth": 0, "label": "super-critical"}
        ax.add_collection(PolyCollection(corners, transform=ax.get_xaxis_transform(), **style), autolim=False)


def _mark(ax: Axes, steps: Sequence[int], **style: Any) -> None:
    """A line at each step over the full height, all in one collection."""
    if len(steps):
        places = np.unique(np.asarray(steps, np.int64))
        apart = np.diff(places // _pixel(places), prepend=-1) > 0  # those closer than a point of the picture are one
        lines = [[(step, 0), (step, 1)] for step in places[apart].tolist()]
        collection = LineCollection(lines, linewidths=0.8, transform=ax.get_xaxis_transform(), **style)
        ax.add_collection(collection, autolim=False)


def _super_critical_spans(log: RunLog) -> npt.NDArray[np.float64]:
    """Where every stretch of super-critical steps begins and ends, of shape (stretches, 2); only measured steps.

    Stretches closer than a point of the picture are one.
    """
    measured = columns_of(log.steps).having("eta_crit")
    steps = np.unique(measured.integers("step", 0)[measured.numbers("super_critical") == 1])
    if not len(steps):
        return np.empty((0, 2))
    begins = np.append(True, np.diff(steps) > _pixel(steps))
    first, last = steps[begins], steps[np.append(begins[1:], True)]
    return np.stack([first - 0.5, last + 0.5], axis=1)


def _pixel(steps: Integers) -> int:
    """Steps that a point of the picture stands for, where it shows all of ``steps``, ascending; at least 1."""
    return max(1, int(steps[-1] - steps[0]) // (2 * _STRETCHES))
