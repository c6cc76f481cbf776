"""Relative change of the tangent kernel against the width: Figure 2.2."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from ..dag import (
    DAG,
    densenet,
    drop_edges,
    hessian_norm,
)
from ..datasets import standardized
from .artefact import Artefact, Case, Data, Record, Result, Setting, Verdict, verdict_on
from .linearity import TRAINING, train_kernel_change
from .widths import TOLERANCE, Families, Family, draw_panels, slope, width_cases

if TYPE_CHECKING:
    pass

__all__ = ["ARTEFACTS"]


_TO_FIRST = "inputs feed the first layer"


_TO_ALL = "inputs feed every layer (Eq. A.5)"


def _dropped_densenet(dense_input: bool, setting: Setting, width: int, seed: int) -> DAG:
    return drop_edges(densenet([3072, width, width, 1], dense_input=dense_input), setting["p"], seed)


_FIGURE_2_2: Families = {
    _TO_FIRST: Family(partial(_dropped_densenet, False), by_size=True),
    _TO_ALL: Family(partial(_dropped_densenet, True), by_size=True),
}


def _figure_2_2_cases(setting: Setting) -> list[Case]:
    cases = width_cases(_FIGURE_2_2, setting)
    return [case for case in cases if case["family"] == _TO_FIRST or case["size"] <= setting["largest_to_all"]]


def _run_figure_2_2(setting: Setting, case: Case, data: Data) -> Result:
    images = data.load("cifar10", classes=(0, 2))
    (split,) = standardized(*images.draw(setting["n"], seed=case["seed"]))
    family = _FIGURE_2_2[case["family"]]
    net = family.network(setting, case)
    result = {"width": family.width(net, case), "least_in_degree": net.dag.width}
    if case["family"] == _TO_FIRST:
        result["hessian"] = hessian_norm(net, split.inputs[0].flatten(), tol=setting["tol"]).value
    return {**result, **train_kernel_change(setting, net, split.inputs, split.targets)}


def _judge_figure_2_2(setting: Setting, records: list[Record]) -> Verdict:
    """By the first reading: in the second, the least in-degree is above half the number of inputs at every size.

    The figure shows the kernel's change during training "to simulate the scaling of the spectral norm of the Hessian".
    The theorems bound both by 1/sqrt(m); for the change of the kernel of networks in layers the order is known to be
    1/m (Huang and Yau, 2020), so the bound and the printed slope are judged apart, and the slope of both quantities.
    """
    every = slope(records, _TO_FIRST, "kernel_change")
    wide = slope(records, _TO_FIRST, "kernel_change", wider_half=True)
    hessian = slope(records, _TO_FIRST, "hessian", wider_half=True)
    other = slope(records, _TO_ALL, "kernel_change")
    least = min(r["result"]["least_in_degree"] for r in records if r["case"]["family"] == _TO_ALL)
    lost = sum(not r["result"]["converged"] for r in records)
    measured = (
        f"{_TO_FIRST}: kernel change ~ m^{every}, over the wider half of the sizes m^{wide}; Hessian norm at the first "
        f"weights over the wider half m^{hessian}; {_TO_ALL}: kernel change m^{other}, where the width of Definition "
        f"2.2.7 is {least} and more; {len(records) - lost} of {len(records)} trainings converged"
    )
    shown = {
        "the bound: the change falls at least as 1/sqrt(m)": every.value <= -0.5 + TOLERANCE,
        "the Hessian's norm is close to a multiple of 1/sqrt(m)": abs(hessian.value + 0.5) <= TOLERANCE,
        "the printed slope: the change is close to a multiple of 1/sqrt(m), also over the wider half": all(
            abs(s.value + 0.5) <= TOLERANCE for s in (every, wide)
        ),
        "all trainings converge": lost == 0,
    }
    verdict = verdict_on(shown, measured)
    return verdict if every.value <= -0.5 + TOLERANCE else replace(verdict, outcome="fails")


_FIGURE_SETTING: Setting = {
    **TRAINING, "sizes": [2**i for i in range(1, 13)], "tol": 0.01, "largest_to_all": 512, "p": 0.5, "seeds": 5,
}  # fmt: skip

ARTEFACTS = (
    Artefact(
        name="fig-2.2",
        title="Relative change of the tangent kernel against the width, 3-layer DenseNet without half its edges",
        source="Figure 2.2",
        claim="From initialisation to convergence on 10 points of CIFAR-2, the largest relative change of the tangent "
        "kernel is close to a multiple of 1/sqrt(m) for widths m from 2 to 2^12, and all of them converge.",
        printed="slope -1/2",
        scales={
            "full": _FIGURE_SETTING,
            "recorded": _FIGURE_SETTING,
            "quick": {**_FIGURE_SETTING, "sizes": [4, 16, 64, 256], "seeds": 2, "max_steps": 2000},
        },
        cases=_figure_2_2_cases,
        run=_run_figure_2_2,
        judge=_judge_figure_2_2,
        draw=draw_panels,
    ),
)
