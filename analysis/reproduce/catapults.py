"""Catapults in gradient descent happen in the top eigenspace of the tangent kernel: Figures 4.2, 4.3 and C.2 to C.5.

The thesis prints neither the scale of its inputs nor whether there are biases. Its printed critical rates fit biases in
the hidden layers and pixels in [-1, 1] (artefact critical-rates): that is the setting here, and on CIFAR-2 the one of
Section 4.4, without biases, beside it. Rates are taken as multiples of the critical rate, the thesis' multiples.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import numpy as np

from catapult_opt.catapults import is_super_critical

from ..ntk import critical_rate, ntk
from .artefact import Artefact, Case, Data, Record, Result, Setting, Statements, Verdict, mean_sd
from .problems import (
    BESIDE,
    BIASED,
    FITTED,
    cases,
    draw_traces,
    fitted_verdict,
    labels,
    problem,
    problem_of,
    values,
    values_of,
)
from .tracing import SPIKE, Trace, examples, network, trace

__all__ = ["ARTEFACTS", "TINY", "descent_problem", "scaled"]


# ----------------------------------------------------------------------------------------------------------- one spike


def _run_spike(setting: Setting, case: Case, data: Data) -> Result:
    problem = problem_of(setting, case)
    (train,) = examples(problem, setting["n"], case["seed"], data)
    model = network(problem, train, case["seed"])
    eta_crit = critical_rate(ntk(model, train.inputs), len(train))
    found = trace(model, train, [problem["multiple"] * eta_crit] * problem["steps"], top=problem["top"])
    return {
        "outputs": train.targets.shape[1],
        "eta_crit": eta_crit,
        "lr": problem["multiple"] * eta_crit,
        **spike(found),
        "curves": found.curves,
    }


def spike(found: Trace) -> Result:
    """The first catapult in numbers: from the lowest loss before its peak, to the first step back at that level."""
    loss = np.array(found.loss)
    n_finite = int(np.isfinite(loss).sum())
    super_critical = [is_super_critical(*pair) for pair in zip(found.lr, found.rate, strict=False)]
    # The catapult lasts while the rate is above the critical one.
    end = next((t for t, above in enumerate(super_critical) if not above), n_finite - 1)
    peak = int(np.argmax(loss[: max(end, 1) + 1]))
    start = int(np.argmin(loss[: peak + 1]))
    back = next((t for t in range(peak, n_finite) if loss[t] <= loss[start]), None)
    rise = float(loss[peak] - loss[start])
    rest = np.array(found.rest)
    stop = (back if back is not None else n_finite - 1) + 1
    lowest = list(accumulate(rest[:stop], min))
    return {
        "first": float(loss[0]),
        "before": float(loss[start]),
        "peak": float(loss[peak]),
        "peak_step": peak,
        "returned": back is not None,
        "top_share": float((found.top[peak] - found.top[start]) / rise) if rise > 0 else 0.0,
        "rest_rise": float(max(r / low for r, low in zip(rest[:stop], lowest, strict=True)) - 1),
        "norm_ratio": float(found.norm[back if back is not None else n_finite - 1] / found.norm[start]),
        "final": float(loss[-1]),
    }


def _judge_spike(setting: Setting, records: list[Record]) -> Verdict:
    """Of a run without a spike nothing is decided, and the setting beside the fitted one does not decide the figure."""
    panels: dict[str, Statements] = {}
    texts = []
    for label in labels(records):
        rows = values_of(records, label)
        spikes = [r["peak"] > SPIKE * r["before"] for r in rows]
        panels[label] = {
            "a spike of at least a fifth": [flag or None for flag in spikes],
            **{
                text: [test(r) if flag else None for r, flag in zip(rows, spikes, strict=True)]
                for text, test in _OF_A_SPIKE.items()
            },
        }
        k = rows[0]["outputs"]
        rate = mean_sd([k * r["eta_crit"] for r in rows], 1)
        texts.append(
            f"{label}: critical rate {rate}{f' (times the {k} outputs, as printed)' if k > 1 else ''}, loss "
            f"{mean_sd(values(records, label, 'before'))} to {mean_sd(values(records, label, 'peak'))}, "
            f"{mean_sd([100 * v for v in values(records, label, 'top_share')], 0)} % of the rise in the top "
            f"eigenspace, rest rises by at most {mean_sd([100 * v for v in values(records, label, 'rest_rise')], 0)} "
            f"%, norm times {mean_sd(values(records, label, 'norm_ratio'))}"
        )
    return fitted_verdict(panels, "; ".join(texts))


_OF_A_SPIKE: dict[str, Callable[[Result], bool]] = {
    "the loss comes back": lambda r: r["returned"],
    "at least 90 % of the rise lies in the top eigenspace": lambda r: r["top_share"] >= 0.9,
    "the rest of the loss rises by at most 25 %": lambda r: r["rest_rise"] <= 0.25,
    "the kernel's norm ends lower": lambda r: r["norm_ratio"] < 1,
}


_NAMES = {"cifar10": "CIFAR-2", "svhn": "SVHN-2", "rank-2": "rank-2 task"}


def descent_problem(net: str, dataset: str, multiple: Any, **changes: Any) -> dict[str, Any]:
    """A `problem` of gradient descent."""
    label = f"{net} on {_NAMES[dataset]}"
    return problem(
        **{"label": label, "net": net, "dataset": dataset, "multiple": multiple, "steps": 40, "top": 5, **changes}
    )


def scaled(full: Setting, quick: dict[str, dict[str, Any]], recorded: dict[str, dict[str, Any]]) -> dict[str, Setting]:
    """The three scales: changes by network."""

    def changed(changes: dict[str, dict[str, Any]], **more: Any) -> Setting:
        problems = [{**p, **changes.get(p["network"], {})} for p in full["problems"]]
        return {**full, "problems": problems, **more}

    return {"full": full, "recorded": changed(recorded), "quick": changed(quick, seeds=1, n=min(full["n"], 32))}


_SMALL: dict[str, dict[str, Any]] = {
    "cnn-5": {"width": 128, "image_size": 8, "steps": 20},
    "wrn-10": {"width": 2, "image_size": 8, "steps": 18},
}
TINY: dict[str, dict[str, Any]] = {
    "fcn-2": {"width": 512, "image_size": 8},
    "fcn-5": {"width": 512, "image_size": 8, "steps": 20},
    "cnn-5": {"width": 64, "image_size": 8, "steps": 12},
    "wrn-10": {"width": 0.5, "image_size": 8, "steps": 12},
}
_SPIKE_FULL: Setting = {
    "n": 128, "seeds": 3,
    "problems": [
        descent_problem("fcn-5", "cifar10", 1.67, **FITTED),
        descent_problem("fcn-5", "cifar10", 1.67, label=f"fcn-5 on CIFAR-2{BESIDE}"),
        descent_problem("cnn-5", "cifar10", 1.78, **FITTED),
    ],
}  # fmt: skip
_SPIKE: dict[str, Any] = {
    "claim": "Above the critical rate the loss has a spike in the top-5 eigenspace of the tangent kernel, and falls "
    "almost monotonically in its complement; the norm of the kernel ends lower.",
    "scales": scaled(_SPIKE_FULL, TINY, _SMALL),
    "cases": cases,
    "run": _run_spike,
    "judge": _judge_spike,
    "draw": draw_traces,
}
_C3: Setting = {
    "n": 128, "seeds": 3,
    "problems": [descent_problem("fcn-5", "svhn", 1.76, **FITTED), descent_problem("cnn-5", "svhn", 1.88, **BIASED)],
}  # fmt: skip
_C4: Setting = {
    "n": 128, "seeds": 3,
    "problems": [
        descent_problem("fcn-5", "rank-2", 2.63, **BIASED),
        descent_problem("wrn-10", "cifar10", 2.0, **FITTED),
    ],
}  # fmt: skip


_TEN: dict[str, Any] = {"classes": list(range(10)), "top": 50}
_C5: Setting = {
    "n": 128, "seeds": 3,
    "problems": [
        descent_problem("fcn-5", "cifar10", 2.94, label="fcn-5 on CIFAR-10", **_TEN, **FITTED),
        descent_problem("cnn-5", "cifar10", 5.0, label="cnn-5 on CIFAR-10", **_TEN, **BIASED),
    ],
}  # fmt: skip
_FOUR: dict[str, Any] = {"classes": [0, 2, 7, 9], "top": 20, "image_size": 8}
_C5_SCALES = scaled(
    _C5,
    {"fcn-5": {**_FOUR, "width": 64, "steps": 8}, "cnn-5": {**_FOUR, "width": 16, "steps": 6}},
    {"fcn-5": {**_FOUR, "image_size": 32, "steps": 25}, "cnn-5": {**_FOUR, "width": 64, "steps": 15}},
)
_C5_SCALES["recorded"] = {**_C5_SCALES["recorded"], "seeds": 2}


# -------------------------------------------------------------------------------------------------------- many spikes


ARTEFACTS = (
    Artefact(
        name="fig-4.2",
        title="One catapult: loss and norm of the tangent kernel, 5-layer FCN",
        source="Figure 4.2 (the setting of Figure 4.3a)",
        printed="critical rate 3.6, rate 6",
        **{**_SPIKE, "cases": lambda setting: [case for case in cases(setting) if case["problem"].startswith("fcn")]},
        shares="fig-4.3",
    ),
    Artefact(
        name="fig-4.3",
        title="A catapult of gradient descent in the top eigenspace of the tangent kernel, CIFAR-2",
        source="Figure 4.3 and Appendix C.6",
        printed="critical rates 3.6 (FCN) and 4.5 (CNN), rates 6 and 8",
        **_SPIKE,
    ),
    Artefact(
        name="fig-c.2",
        title="Loss and norm of the tangent kernel during a catapult, CIFAR-2",
        source="Figure C.2 (the setting of Figure 4.3)",
        printed="",
        **_SPIKE,
        shares="fig-4.3",
    ),
    Artefact(
        name="fig-c.3",
        title="A catapult in the top eigenspace of the tangent kernel, SVHN-2",
        source="Figure C.3",
        printed="critical rates 3.4 (FCN) and 1.6 (CNN), rates 6 and 3",
        **{**_SPIKE, "scales": scaled(_C3, TINY, _SMALL)},
    ),
    Artefact(
        name="fig-c.4",
        title="A catapult in the top eigenspace: FCN on the rank-2 task, Wide ResNet on CIFAR-2",
        source="Figure C.4",
        printed="critical rates 1.9 (FCN) and 1.5 (WRN), rates 5 and 3",
        **{**_SPIKE, "scales": scaled(_C4, TINY, _SMALL)},
    ),
    Artefact(
        name="fig-c.5",
        title="A catapult in the top eigenspace with several outputs, CIFAR-10",
        source="Figure C.5 and Appendix C.2",
        printed="critical rates 34 (FCN) and 16 (CNN), rates 100 and 80",
        **{
            **_SPIKE,
            "scales": _C5_SCALES,
            "claim": "With k outputs the spike lies in the top-5k eigenspace of the kn x kn tangent kernel.",
        },
    ),
)
