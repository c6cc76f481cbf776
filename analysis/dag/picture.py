"""A picture of a graph by its layers. Needs matplotlib, which is an extra: ``pip install 'catapult_opt[plot]'``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .graph import DAG, Ids

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_layers"]

_MOST_EDGES = 5000
_COLORS = {"input": "tab:green", "hidden": "tab:blue", "output": "tab:orange"}


def draw_layers(dag: DAG, ax: Axes | None = None, *, highlight: Ids = (), labels: bool | None = None) -> Axes:
    """Draws the vertices in columns by layer, edges as arrows, skip connections dashed.

    Edges that pass over a layer are bent, so that they do not hide behind its vertices.

    Args:
        ax: where to draw; a new figure without one (``draw_layers(dag).figure.savefig(...)``).
        highlight: vertices with a dashed red circle, bottlenecks for instance.
        labels: number the vertices; by default in graphs of up to 40.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: more than 5,000 edges, which no picture shows.

    Source: thesis Figures 2.1 (b) and 2.3.

    >>> from catapult_opt.analysis.dag import fcn
    >>> draw_layers(fcn([3, 4, 1]), highlight=[3]).get_title()
    '3 layers, width 4'
    """
    if dag.num_edges > _MOST_EDGES:
        raise ValueError(f"dag must have at most {_MOST_EDGES} edges to be drawn, got {dag.num_edges}")
    ax = _new_axes() if ax is None else ax
    at = _positions(dag)
    for u, v in dag.edges:
        _arrow(ax, at, u, v, int(dag.layer[v] - dag.layer[u]), color="0.55", linewidth=0.7)
    for u, v in dag.skips:
        _arrow(ax, at, u, v, int(dag.layer[v] - dag.layer[u]), color="tab:purple", linewidth=1.0, linestyle="--")
    roles = {"input": dag.inputs, "output": dag.outputs}
    roles["hidden"] = np.setdiff1d(np.arange(dag.num_vertices), np.concatenate([dag.inputs, dag.outputs]))
    for role, color in _COLORS.items():
        ax.scatter(at[roles[role], 0], at[roles[role], 1], s=160, color=color, edgecolors="white", label=role, zorder=3)
    if len(highlight):
        marked = at[np.asarray(highlight)]
        ax.scatter(
            marked[:, 0], marked[:, 1], s=380, facecolors="none", edgecolors="tab:red", linestyles="--", zorder=3
        )
    if dag.num_vertices <= 40 if labels is None else labels:
        for v, (x, y) in enumerate(at):
            ax.text(x, y, str(v), color="white", size=7, ha="center", va="center", zorder=4)
    return _finish(ax, dag)


def _new_axes() -> Axes:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'catapult_opt[plot]'") from error
    return Figure(layout="constrained").subplots()


def _positions(dag: DAG) -> npt.NDArray[np.float64]:
    """(n, 2): layer to the right, vertices of a layer spread over the same height, the first on top."""
    at = np.zeros((dag.num_vertices, 2))
    height = max(len(layer) for layer in dag.layers)
    for i, layer in enumerate(dag.layers):
        spread = (np.arange(len(layer)) + 0.5) / len(layer)
        at[layer, 0], at[layer, 1] = i, -height * spread
    return at


def _arrow(ax: Axes, at: npt.NDArray[np.float64], u: int, v: int, span: int, **style: Any) -> None:
    from matplotlib.patches import FancyArrowPatch

    upper = at[u, 1] + at[v, 1] > at[:, 1].min() + at[:, 1].max()  # bend outwards, where there is room
    bend = f"arc3,rad={0.0 if span <= 1 else -0.2 if upper else 0.2}"
    ends: dict[str, Any] = {"posA": tuple(at[u]), "posB": tuple(at[v]), "shrinkA": 6, "shrinkB": 6}
    ax.add_patch(FancyArrowPatch(**ends, arrowstyle="-|>", mutation_scale=7, connectionstyle=bend, **style))


def _finish(ax: Axes, dag: DAG) -> Axes:
    ax.set_xticks(range(dag.depth + 1))
    ax.set_xlabel("layer")
    ax.set_yticks([])
    ax.margins(0.12)
    for side in ("left", "right", "top", "bottom"):
        ax.spines[side].set_visible(False)
    ax.tick_params(length=0)
    ax.set_title(f"{dag.depth + 1} layers, width {dag.width}")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, frameon=False, markerscale=0.6)
    return ax
