"""Artefacts on how a measure of linearity scales with the width of a network: families, slopes, verdicts, panels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..dag import DAG, DAGNetwork, Slope, log_log_slope
from .artefact import Artefact, Case, Data, Outcome, Record, Result, Setting, Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "LABELS",
    "TOLERANCE",
    "Families",
    "Family",
    "Measure",
    "draw_panels",
    "generator",
    "outcome",
    "panel",
    "runs_by_size",
    "slope",
    "width_cases",
    "width_study",
]

# How far from an exponent a fitted slope may be: over two decades of widths, log m alone is worth about this.
TOLERANCE = 0.1

LABELS = {
    "hessian": "Hessian norm",
    "hessian_in_ball": "Hessian norm in the ball",
    "kernel_change": "kernel change",
    "deviation_random": "deviation, random directions",
    "deviation_gradient": "deviation, along the gradient",
    "smallest_change": "change of the smallest eigenvalue in the ball",
    **{f"layer_{i}": f"Hessian norm in layer {i}" for i in range(2, 9)},
}
"""Results that are looked at against the width."""


@dataclass(frozen=True)
class Family:
    """Networks of one kind, one for every size and seed."""

    graph: Callable[[Setting, int, int], DAG]  # setting, neurons per hidden layer, seed
    linear: bool = True  # becomes linear: the measures fall at least as 1/sqrt(m); otherwise they stay
    by_size: bool = False  # m is the number of neurons per hidden layer, not the least in-degree
    output: Callable[[Tensor], Tensor] | None = None  # activation of the outputs, linear without one

    def network(self, setting: Setting, case: Case) -> DAGNetwork:
        dag = self.graph(setting, case["size"], case["seed"])
        own = {} if self.output is None else dict.fromkeys(dag.outputs.tolist(), self.output)
        return DAGNetwork(dag, torch.tanh, neuron_activations=own, generator=generator(1, case))

    def width(self, net: DAGNetwork, case: Case) -> float:
        """m of Definition 2.2.7, or what grows in its place."""
        return float(case["size"] if self.by_size else net.dag.width)


Families = Mapping[str, Family]
Measure = Callable[[Setting, DAGNetwork, Case], Result]


def generator(stream: int, case: Case) -> torch.Generator:
    """A random stream of a case: the same stream for two things would draw weights equal to inputs."""
    return torch.Generator().manual_seed(1_000_000 * stream + case["seed"])


def width_study(
    name: str,
    families: Families,
    measures: Sequence[Measure],
    setting: Setting,
    judge: Callable[[Families, Setting, list[Record]], Verdict] | None = None,
    draw: Callable[[list[Record], Figure], None] | None = None,
    **texts: Any,
) -> Artefact:
    """An artefact whose cases are families of networks at several sizes; every measure gets a network of its own.

    ``setting`` is the recorded and the full one, as the thesis has no experiment of its own; the quick one is smaller.
    """
    return Artefact(
        name=name,
        printed="",
        scales={
            "full": setting,
            "recorded": setting,
            "quick": {**setting, "sizes": setting["sizes"][:4], "seeds": 2},
        },
        cases=partial(width_cases, families),
        run=partial(_run, families, measures),
        judge=partial(judge or judge_slopes, families),
        draw=draw or draw_panels,
        **texts,
    )


def width_cases(families: Families, setting: Setting) -> list[Case]:
    return [
        {"family": family, "size": size, "seed": seed}
        for family in families
        for size in setting["sizes"]
        for seed in range(setting["seeds"])
    ]


def _run(families: Families, measures: Sequence[Measure], setting: Setting, case: Case, data: Data) -> Result:
    family = families[case["family"]]
    result: Result = {}
    for measure in measures:
        net = family.network(setting, case)
        result |= {"width": family.width(net, case), **measure(setting, net, case)}
    return result


# ------------------------------------------------------------------------------------------------------------- verdict


def runs_by_size(records: list[Record], family: str, key: str) -> dict[int, list[tuple[float, float]]]:
    """(width, value) of every run, by the size of the hidden layers."""
    chosen = [r for r in records if r["case"]["family"] == family and key in r["result"]]
    sizes = sorted({r["case"]["size"] for r in chosen})
    return {
        size: [(r["result"]["width"], r["result"][key]) for r in chosen if r["case"]["size"] == size] for size in sizes
    }


def slope(records: list[Record], family: str, key: str, *, wider_half: bool = False) -> Slope:
    """The exponent over the runs whose value is positive and finite, nan if they are too few.

    Of all sizes, or of the larger half of them, at least three.
    """
    runs = runs_by_size(records, family, key)
    first = max(min(len(runs) // 2, len(runs) - 3), 0) if wider_half else 0
    points = [(m, y) for size in list(runs)[first:] for m, y in runs[size] if 0 < y < math.inf]
    if len(points) < 3 or len({m for m, _ in points}) < 2:
        return Slope(math.nan, math.nan, math.nan, math.nan, len(points))
    return log_log_slope([m for m, _ in points], [y for _, y in points])


def judge_slopes(families: Families, setting: Setting, records: list[Record]) -> Verdict:
    """The theorems bound what falls by O(1/sqrt(m)) up to logarithms, so a faster fall is as claimed.

    What stays is looked at in the larger half of the sizes: it is a sum of a part that stays and one that falls.
    """
    texts, right, why = [], [], []
    for name, family in families.items():
        found = {key: slope(records, name, key, wider_half=not family.linear) for key in _keys(records)}
        texts.append(f"{name}: " + ", ".join(f"{LABELS[key]} ~ m^{s}" for key, s in found.items()))
        for key, found_slope in found.items():
            ok = found_slope.value <= -0.5 + TOLERANCE if family.linear else found_slope.value >= -TOLERANCE
            right.append(ok)
            if not ok and family.linear:
                wide = slope(records, name, key, wider_half=True)
                why.append(f"{LABELS[key]} of {name} does not fall as m^-1/2 (over the wider half: m^{wide})")
            elif not ok:
                why.append(f"{LABELS[key]} of {name} is not shown to stay")
    lost = sum(not r["result"].get("converged", True) for r in records)
    why += [f"{lost} of {len(records)} trainings did not converge"] if lost else []
    if any("does not fall" in text for text in why):
        why.append(
            f"a factor sqrt(log m), as the theorems allow, is worth {_root_log(setting['sizes']):.2f} of a slope here"
        )
    found_out = outcome(right)
    return Verdict("holds in part" if lost and found_out == "holds" else found_out, "; ".join(texts), "; ".join(why))


def _root_log(sizes: Sequence[int]) -> float:
    """The slope of sqrt(log m) from the smallest to the largest size."""
    low, high = math.log(min(sizes)), math.log(max(sizes))
    return 0.5 * math.log(high / low) / (high - low)


def outcome(right: Sequence[bool]) -> Outcome:
    """All, some or none of the statements came out."""
    return "holds" if all(right) else "holds in part" if any(right) else "fails"


def _keys(records: list[Record]) -> list[str]:
    return [key for key in LABELS if key in records[0]["result"]]


# -------------------------------------------------------------------------------------------------------------- panels


def draw_panels(records: list[Record], figure: Figure) -> None:
    """A panel for every measure."""
    axes = figure.subplots(1, len(_keys(records)), squeeze=False)[0]
    for ax, key in zip(axes, _keys(records), strict=True):
        panel(ax, records, key)


def panel(ax: Axes, records: list[Record], key: str) -> None:
    """One measure against the width, mean and standard deviation over the seeds, with the slope of each family."""
    for i, family in enumerate(dict.fromkeys(r["case"]["family"] for r in records)):
        runs = [np.asarray(run) for run in runs_by_size(records, family, key).values()]
        if not runs:  # measured on other families only
            continue
        means = np.array([np.nanmean(run, axis=0) for run in runs])
        spread = np.array([np.nanstd(run[:, 1], ddof=1) if len(run) > 1 else 0.0 for run in runs])
        label = f"{family}: {slope(records, family, key).value:.2f}"
        ax.errorbar(means[:, 0], means[:, 1], spread, marker="o", markersize=4, capsize=3, color=f"C{i}", label=label)
        if i == 0:
            ax.plot(means[:, 0], means[0, 1] * (means[:, 0] / means[0, 0]) ** -0.5, "k--", lw=1, label=r"$m^{-1/2}$")
    ax.set_xscale("log", base=2)
    ax.set(yscale="log", xlabel="width m", title=LABELS[key])
    ax.legend(frameon=False, fontsize=8)
