"""Several catapults by raising the rate: Figures 4.4, C.6 and C.7."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from ..ntk import critical_rate, ntk
from .artefact import Artefact, Case, Data, Record, Result, Setting, Verdict, mean_sd
from .catapults import TINY, descent_problem, scaled
from .problems import BESIDE, FITTED, SCALED, cases, draw_traces, fitted_verdict, labels, problem_of, values, values_of
from .tracing import SPIKE, Trace, examples, network, trace

if TYPE_CHECKING:
    pass

__all__ = ["ARTEFACTS"]


def _run_schedule(setting: Setting, case: Case, data: Data) -> Result:
    """The rate is raised at the problem's steps; then once more from the start with the last rate alone."""
    problem = problem_of(setting, case)
    (train,) = examples(problem, setting["n"], case["seed"], data)
    model = network(problem, train, case["seed"])
    eta_crit = critical_rate(ntk(model, train.inputs), len(train))
    lrs = [eta_crit * problem["multiple"][sum(t >= s for s in problem["at"])] for t in range(problem["steps"])]
    found = trace(model, train, lrs, top=problem["top"])
    again = network(problem, train, case["seed"])
    constant = trace(again, train, [lrs[-1]] * problem["alone"], top=problem["top"])
    spikes, falls = _spikes(found, problem["at"])
    growth = max(constant.loss) / constant.loss[0] if np.isfinite(constant.loss).all() else float("inf")
    rest = np.array(found.rest)
    return {
        "eta_crit": eta_crit,
        "spikes": spikes,
        "norm_falls": falls,
        "norms": [found.norm[min(s, len(found.norm) - 1)] for s in (0, *problem["at"], len(found.norm) - 1)],
        "diverged": found.diverged,
        "final": found.loss[-1],
        "first": found.loss[0],
        "top_share": _share(found),
        "rest_ratio": float(np.max(rest) / rest[0]),
        "alone_diverged": constant.diverged,
        "alone_growth": growth,
        "alone_final": constant.loss[-1],
        "curves": found.curves,
    }


def _spikes(found: Trace, at: Sequence[int]) -> tuple[list[bool], list[bool]]:
    """For every rate: whether the loss has a spike, and whether the kernel's norm is lower after it than before."""
    spikes, lower = [], []
    for first, stop in zip([0, *at], [*at, len(found.loss)], strict=True):
        ends = _between(found.loss[first:stop])
        spikes.append(ends is not None)
        lower.append(ends is not None and found.norm[first + ends[1]] < found.norm[first + ends[0]])
    return spikes, lower


def _between(loss: Sequence[float]) -> tuple[int, int] | None:
    """From the lowest loss before the peak to the first step back at it; None without a rise by 20 % and a return."""
    if len(loss) < 2:
        return None
    peak = int(np.argmax([x / low for x, low in zip(loss, accumulate(loss, min), strict=True)]))
    start = int(np.argmin(loss[: peak + 1]))
    if not loss[peak] > SPIKE * loss[start]:
        return None
    back = next((t for t in range(peak, len(loss)) if loss[t] <= loss[start]), None)
    return None if back is None else (start, back)


def _share(found: Trace) -> float:
    """Share of all rises of the loss that lies in the top eigenspace."""
    loss, top = np.diff(found.loss), np.diff(found.top)
    up = loss > 0
    return float(top[up].sum() / loss[up].sum()) if up.any() else 0.0


def _judge_schedule(setting: Setting, records: list[Record]) -> Verdict:
    panels, texts = {}, []
    for label in labels(records):
        rows = values_of(records, label)
        panels[label] = {
            "every increase of the rate makes a spike that comes back": [all(r["spikes"]) for r in rows],
            "the kernel's norm is lower after every spike": [
                all(falls for falls, spike in zip(r["norm_falls"], r["spikes"], strict=True) if spike) for r in rows
            ],
            "the kernel's norm ends below where it started": [r["norms"][-1] < r["norms"][0] for r in rows],
            "training does not diverge": [not r["diverged"] for r in rows],
        }
        ratios = [r["norms"][-1] / r["norms"][0] for r in rows]
        texts.append(
            f"{label}: {mean_sd([sum(r['spikes']) for r in rows], 1)} catapults of {len(rows[0]['spikes'])} rates, "
            f"norm times {mean_sd(ratios)}, loss {mean_sd([r['first'] for r in rows])} to "
            f"{mean_sd([r['final'] for r in rows], 3)}"
        )
    return fitted_verdict(panels, "; ".join(texts))


def _judge_top(setting: Setting, records: list[Record]) -> Verdict:
    panels, texts = {}, []
    for label in labels(records):
        share, rest = values(records, label, "top_share"), values(records, label, "rest_ratio")
        panels[label] = {
            "at least 90 % of the rises lie in the top eigenspace": [s >= 0.9 for s in share],
            "the rest stays below 1.25 of its first value": [r <= 1.25 for r in rest],
        }
        texts.append(
            f"{label}: {mean_sd([100 * s for s in share], 0)} % of the rises in the top-10 eigenspace, the rest at "
            f"most {mean_sd(rest)} of its first value"
        )
    return fitted_verdict(panels, "; ".join(texts))


def _judge_alone(setting: Setting, records: list[Record]) -> Verdict:
    panels, texts = {}, []
    for label in labels(records):
        alone, raised = values(records, label, "alone_diverged"), values(records, label, "diverged")
        panels[label] = {
            "the last rate alone diverges": alone,
            "raised to it, training does not": [not diverged for diverged in raised],
        }
        texts.append(
            f"{label}: the last rate from the start diverges on {sum(alone)} of {len(alone)} seeds, raised to it on "
            f"{sum(raised)}"
        )
    note = "The thesis' rates are those it prints for this figure, beyond the last ones of Figure 4.4 (15 and 20)."
    return fitted_verdict(panels, "; ".join(texts), f"{SCALED} {note}")


_SCHEDULE_FULL: Setting = {
    "n": 128, "seeds": 3,
    "problems": [
        # With biases the loss takes longer to come back after the last increase.
        descent_problem("fcn-5", "cifar10", [1.67, 2.78, 4.17], at=[15, 60], steps=250, top=10, alone=40, **FITTED),
        descent_problem(
            "fcn-5", "cifar10", [1.67, 2.78, 4.17], at=[15, 60], steps=110, top=10, alone=40,
            label=f"fcn-5 on CIFAR-2{BESIDE}",
        ),
        descent_problem("cnn-5", "cifar10", [1.78, 3.33, 4.44], at=[10, 40], steps=80, top=10, alone=40, **FITTED),
    ],
}  # fmt: skip


_SCHEDULE: dict[str, Any] = {
    "scales": scaled(
        _SCHEDULE_FULL,
        {
            "fcn-5": {**TINY["fcn-5"], "at": [10, 20], "steps": 30, "alone": 20},
            "cnn-5": {**TINY["cnn-5"], "at": [4, 8], "steps": 12, "alone": 10},
        },
        {
            "cnn-5": {"width": 64, "image_size": 8, "at": [8, 20], "steps": 34, "alone": 12},
        },
    ),
    "cases": cases,
    "run": _run_schedule,
    "draw": draw_traces,
}


# Figure C.7 prints rates of 60 and 40 "at convergence", where Figure 4.4 ends at 15 and 20: raised further for it.
_ALONE_FULL: Setting = {
    "n": 128, "seeds": 3,
    "problems": [
        descent_problem(
            "fcn-5", "cifar10", [1.67, 2.78, 4.17, 7.0, 11.0, 16.7], at=[15, 60, 110, 160, 210], steps=260, top=10,
            alone=40, **FITTED,
        ),
        descent_problem(
            "cnn-5", "cifar10", [1.78, 3.33, 4.44, 6.5, 8.9], at=[10, 40, 80, 120], steps=160, top=10, alone=40,
            **FITTED,
        ),
    ],
}  # fmt: skip


_ALONE_SCALES = scaled(
    _ALONE_FULL,
    {
        "fcn-5": {**TINY["fcn-5"], "at": [5, 10, 15, 20, 25], "steps": 30, "alone": 10},
        "cnn-5": {**TINY["cnn-5"], "at": [3, 6, 9, 12], "steps": 14, "alone": 6},
    },
    {
        "fcn-5": {"at": [15, 35, 55, 75, 95], "steps": 120, "alone": 30},
        "cnn-5": {"width": 64, "image_size": 8, "at": [8, 20, 32, 44], "steps": 56, "alone": 12},
    },
)

ARTEFACTS = (
    Artefact(
        name="fig-4.4",
        title="Several catapults by raising the rate",
        source="Figure 4.4 and Appendix C.6",
        claim="Every increase of the rate above the present critical one makes another catapult, each leaving the norm "
        "of the tangent kernel lower.",
        printed="FCN: rates 6, 10, 15 from steps 0, 15, 60; CNN: 8, 15, 20 from steps 0, 10, 40",
        judge=_judge_schedule,
        **_SCHEDULE,
    ),
    Artefact(
        name="fig-c.6",
        title="Several catapults in the top-10 eigenspace",
        source="Figure C.6 (the setting of Figure 4.4)",
        claim="The spikes of several catapults lie in the top-10 eigenspace of the tangent kernel; in its complement "
        "the loss falls.",
        printed="",
        judge=_judge_top,
        shares="fig-4.4",
        **_SCHEDULE,
    ),
    Artefact(
        name="fig-c.7",
        title="The last rate from the start diverges",
        source="Figure C.7 (the tasks of Figure 4.4)",
        claim="Gradient descent diverges if started with the rate that it reaches after several catapults.",
        printed="rates 60 (FCN) and 40 (CNN)",
        judge=_judge_alone,
        **{**_SCHEDULE, "scales": _ALONE_SCALES},
    ),
)
