"""Catapults in gradient descent happen in the top eigenspace of the tangent kernel: Figures 4.2 to 4.4, C.2 to C.7.

The learning rates that the thesis prints belong to inputs and networks whose scale it does not print: critical rates of
3.6 and 4.5 for its 5-layer networks on CIFAR-2 are not those of Appendix C.6's formulas with standardised pixels. So
rates are taken as multiples of the critical rate, the same multiples as the thesis'.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from ..ntk import critical_rate, ntk
from .artefact import Artefact, Case, Data, Record, Result, Setting, Verdict, mean_sd
from .tracing import Trace, examples, network, trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ARTEFACTS"]

SCALED = "Rates are the thesis' multiples of the critical rate, as the scale of its inputs is not printed."


def problem_of(setting: Setting, case: Case) -> Setting:
    return next(p for p in setting["problems"] if p["label"] == case["problem"])


def cases(setting: Setting) -> list[Case]:
    return [{"problem": p["label"], "seed": seed} for p in setting["problems"] for seed in range(setting["seeds"])]


def labels(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(record["case"]["problem"] for record in records))


def values(records: Sequence[Record], label: str, key: str) -> list[Any]:
    return [record["result"][key] for record in records if record["case"]["problem"] == label]


def graded(passed: Sequence[bool], measured: str, failures: Sequence[str], note: str = "") -> Verdict:
    """holds if all passed, in part if at least half, else fails."""
    why = " ".join([*dict.fromkeys(failures), note]).strip()
    if all(passed):
        return Verdict("holds", measured, why)
    return Verdict("holds in part" if sum(passed) * 2 >= len(passed) else "fails", measured, why)


# ----------------------------------------------------------------------------------------------------------- one spike


def _run_spike(setting: Setting, case: Case, data: Data) -> Result:
    problem = problem_of(setting, case)
    (train,) = examples(problem, setting["n"], case["seed"], data)
    model = network(problem, train, case["seed"])
    eta_crit = critical_rate(ntk(model, train.inputs), len(train))
    found = trace(model, train, [problem["multiple"] * eta_crit] * problem["steps"], top=problem["top"])
    return {"eta_crit": eta_crit, "lr": problem["multiple"] * eta_crit, **spike(found), "curves": found.curves}


def spike(found: Trace) -> Result:
    """The first catapult in numbers: from the lowest loss before its peak, to the first step back at that level."""
    loss = np.array(found.loss)
    n_finite = int(np.isfinite(loss).sum())
    super_critical = [lr > rate for lr, rate in zip(found.lr, found.rate, strict=False)]
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
    passed, failures, texts = [], [], []
    for label in labels(records):
        for record in (r["result"] for r in records if r["case"]["problem"] == label):
            checks = {
                "no spike of at least 20 %": record["peak"] >= 1.2 * record["before"],
                "the loss does not come back": record["returned"],
                "less than 90 % of the rise lies in the top eigenspace": record["top_share"] >= 0.9,
                "the rest of the loss rises by more than 25 %": record["rest_rise"] <= 0.25,
                "the kernel's norm does not fall": record["norm_ratio"] < 1,
            }
            passed.append(all(checks.values()))
            failures += [f"{label}: {text}." for text, ok in checks.items() if not ok]
        texts.append(
            f"{label}: critical rate {mean_sd(values(records, label, 'eta_crit'), 1)}, loss "
            f"{mean_sd(values(records, label, 'before'))} to {mean_sd(values(records, label, 'peak'))}, "
            f"{mean_sd([100 * v for v in values(records, label, 'top_share')], 0)} % of the rise in the top "
            f"eigenspace, rest rises by at most {mean_sd([100 * v for v in values(records, label, 'rest_rise')], 0)} "
            f"%, norm times {mean_sd(values(records, label, 'norm_ratio'))}"
        )
    return graded(passed, "; ".join(texts), failures, SCALED)


def draw_traces(records: list[Record], figure: Figure) -> None:
    """Loss and its parts over the norm of the kernel and the critical rate, one column a problem (first seed)."""
    shown = {label: next(r for r in records if r["case"]["problem"] == label) for label in labels(records)}
    figure.set_size_inches(4.5 * len(shown), 6)
    for column, (label, record) in zip(figure.subplots(2, len(shown), squeeze=False).T, shown.items(), strict=True):
        curves = record["result"]["curves"]
        parts = {"loss": r"$\mathcal{L}$", "top": r"$\mathcal{L}_{\leq s}$", "rest": r"$\mathcal{L}_{>s}$"}
        for key, name in parts.items():
            column[0].semilogy(curves[key], label=name, linewidth=1)
        column[0].set(title=label, xlabel="step")
        column[0].legend(frameon=False)
        column[1].plot(curves["norm"], color="tab:purple", label=r"$\|K\|_2$")
        column[1].set(xlabel="step", yscale="log")
        other = column[1].twinx()
        other.plot(curves["lr"], "k", linewidth=1, label=r"$\eta$")
        other.plot(curves["rate"], color="tab:red", linewidth=1, label=r"$\eta_{crit}$")
        other.set_yscale("log")
        column[1].legend(frameon=False, loc="upper left")
        other.legend(frameon=False, loc="upper right")


def _problem(network: str, dataset: str, multiple: Any, **changes: Any) -> dict[str, Any]:
    classes = {"cifar10": [7, 9], "svhn": [0, 2], "rank-2": []}[dataset]
    width = {"fcn-2": 1024, "fcn-5": 1024, "cnn-5": 512, "wrn-10": 10, "vit-4": 192, "myrtle-5": 256}[network]
    name = {"cifar10": "CIFAR-2", "svhn": "SVHN-2", "rank-2": "rank-2 task"}[dataset]
    fixed = {"label": f"{network} on {name}", "network": network, "dataset": dataset, "classes": classes}
    return {**fixed, "width": width, "image_size": 32, "multiple": multiple, "steps": 40, "top": 5, **changes}


def _scaled(full: Setting, quick: dict[str, dict[str, Any]], recorded: dict[str, dict[str, Any]]) -> dict[str, Setting]:
    """The three scales: changes by network."""

    def changed(changes: dict[str, dict[str, Any]], **more: Any) -> Setting:
        problems = [{**p, **changes.get(p["network"], {})} for p in full["problems"]]
        return {**full, "problems": problems, **more}

    return {"full": full, "recorded": changed(recorded), "quick": changed(quick, seeds=1, n=min(full["n"], 32))}


_SMALL: dict[str, dict[str, Any]] = {
    "fcn-5": {"image_size": 16},
    "cnn-5": {"width": 128, "image_size": 8, "steps": 18},
    "wrn-10": {"width": 2, "image_size": 8, "steps": 18},
}
_TINY: dict[str, dict[str, Any]] = {
    "fcn-2": {"width": 512, "image_size": 8},
    "fcn-5": {"width": 512, "image_size": 8, "steps": 20},
    "cnn-5": {"width": 64, "image_size": 8, "steps": 12},
    "wrn-10": {"width": 0.5, "image_size": 8, "steps": 12},
}
_SPIKE_FULL: Setting = {
    "n": 128, "seeds": 3,
    "problems": [_problem("fcn-5", "cifar10", 1.67), _problem("cnn-5", "cifar10", 1.78)],
}  # fmt: skip
_SPIKE: dict[str, Any] = {
    "claim": "Above the critical rate the loss has a spike in the top-5 eigenspace of the tangent kernel, and falls "
    "almost monotonically in its complement; the norm of the kernel ends lower.",
    "scales": _scaled(_SPIKE_FULL, _TINY, _SMALL),
    "cases": cases,
    "run": _run_spike,
    "judge": _judge_spike,
    "draw": draw_traces,
}
_C3: Setting = {
    "n": 128, "seeds": 3,
    "problems": [_problem("fcn-5", "svhn", 1.76), _problem("cnn-5", "svhn", 1.88)],
}  # fmt: skip
_C4: Setting = {
    "n": 128, "seeds": 3,
    "problems": [_problem("fcn-5", "rank-2", 2.63), _problem("wrn-10", "cifar10", 2.0)],
}  # fmt: skip


_ALL = list(range(10))
_C5: Setting = {
    "n": 128, "seeds": 3,
    "problems": [
        _problem("fcn-5", "cifar10", 2.94, label="fcn-5 on CIFAR-10", classes=_ALL, top=50),
        _problem("cnn-5", "cifar10", 5.0, label="cnn-5 on CIFAR-10", classes=_ALL, top=50),
    ],
}  # fmt: skip
_FOUR: dict[str, Any] = {"classes": [0, 2, 7, 9], "top": 20, "image_size": 8}
_C5_SCALES = _scaled(
    _C5,
    {"fcn-5": {**_FOUR, "width": 64, "steps": 8}, "cnn-5": {**_FOUR, "width": 16, "steps": 6}},
    {"fcn-5": {**_FOUR, "width": 256, "steps": 25}, "cnn-5": {**_FOUR, "width": 64, "steps": 15}},
)
_C5_SCALES["recorded"] = {**_C5_SCALES["recorded"], "n": 64, "seeds": 2}


# -------------------------------------------------------------------------------------------------------- many spikes


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
    if not loss[peak] >= 1.2 * loss[start]:
        return None
    back = next((t for t in range(peak, len(loss)) if loss[t] <= loss[start]), None)
    return None if back is None else (start, back)


def _share(found: Trace) -> float:
    """Share of all rises of the loss that lies in the top eigenspace."""
    loss, top = np.diff(found.loss), np.diff(found.top)
    up = loss > 0
    return float(top[up].sum() / loss[up].sum()) if up.any() else 0.0


def _judge_schedule(setting: Setting, records: list[Record]) -> Verdict:
    passed, failures, texts = [], [], []
    for label in labels(records):
        results = [r["result"] for r in records if r["case"]["problem"] == label]
        for result in results:
            checks = {
                "not every increase of the rate makes a spike that comes back": all(result["spikes"]),
                "the kernel's norm is not lower after every spike": all(result["norm_falls"]),
                "the kernel's norm does not end below where it started": result["norms"][-1] < result["norms"][0],
                "training diverges": not result["diverged"],
            }
            passed.append(all(checks.values()))
            failures += [f"{label}: {text}." for text, ok in checks.items() if not ok]
        counts = [sum(result["spikes"]) for result in results]
        ratios = [result["norms"][-1] / result["norms"][0] for result in results]
        texts.append(
            f"{label}: {mean_sd(counts, 1)} catapults of {len(results[0]['spikes'])} rates, norm times "
            f"{mean_sd(ratios)}, loss {mean_sd([r['first'] for r in results])} to "
            f"{mean_sd([r['final'] for r in results], 3)}"
        )
    return graded(passed, "; ".join(texts), failures, SCALED)


def _judge_top(setting: Setting, records: list[Record]) -> Verdict:
    passed, failures, texts = [], [], []
    for label in labels(records):
        share, rest = values(records, label, "top_share"), values(records, label, "rest_ratio")
        passed += [s >= 0.9 and r <= 1.25 for s, r in zip(share, rest, strict=True)]
        if not all(passed[-len(share) :]):
            failures.append(f"{label}: under 90 % of the rises in the top eigenspace, or the rest rises by a quarter.")
        texts.append(
            f"{label}: {mean_sd([100 * s for s in share], 0)} % of the rises in the top-10 eigenspace, the rest at "
            f"most {mean_sd(rest)} of its first value"
        )
    return graded(passed, "; ".join(texts), failures, SCALED)


def _judge_alone(setting: Setting, records: list[Record]) -> Verdict:
    passed, failures, texts = [], [], []
    for label in labels(records):
        alone = values(records, label, "alone_diverged")
        good = [not diverged for diverged in values(records, label, "diverged")]
        passed += [a and g for a, g in zip(alone, good, strict=True)]
        if not all(alone):
            failures.append(f"{label}: the last rate alone does not diverge on every seed.")
        if not all(good):
            failures.append(f"{label}: the raised rates diverge too.")
        texts.append(
            f"{label}: the last rate from the start diverges on {sum(alone)} of {len(alone)} seeds, raised to it on "
            f"{len(good) - sum(good)}"
        )
    note = "The thesis' rates are those it prints for this figure, beyond the last ones of Figure 4.4 (15 and 20)."
    return graded(passed, "; ".join(texts), failures, f"{SCALED} {note}")


_SCHEDULE_FULL: Setting = {
    "n": 128, "seeds": 3,
    "problems": [
        _problem("fcn-5", "cifar10", [1.67, 2.78, 4.17], at=[15, 60], steps=110, top=10, alone=40),
        _problem("cnn-5", "cifar10", [1.78, 3.33, 4.44], at=[10, 40], steps=80, top=10, alone=40),
    ],
}  # fmt: skip
_SCHEDULE: dict[str, Any] = {
    "scales": _scaled(
        _SCHEDULE_FULL,
        {
            "fcn-5": {**_TINY["fcn-5"], "at": [10, 20], "steps": 30, "alone": 20},
            "cnn-5": {**_TINY["cnn-5"], "at": [4, 8], "steps": 12, "alone": 10},
        },
        {
            "fcn-5": {"image_size": 16},
            "cnn-5": {"width": 128, "image_size": 8, "at": [8, 20], "steps": 34, "alone": 12},
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
        _problem("fcn-5", "cifar10", [1.67, 2.78, 4.17, 7.0, 11.0, 16.7], at=[15, 60, 110, 160, 210], steps=260, top=10,
                 alone=40),
        _problem("cnn-5", "cifar10", [1.78, 3.33, 4.44, 6.5, 8.9], at=[10, 40, 80, 120], steps=160, top=10, alone=40),
    ],
}  # fmt: skip
_ALONE_SCALES = _scaled(
    _ALONE_FULL,
    {
        "fcn-5": {**_TINY["fcn-5"], "at": [5, 10, 15, 20, 25], "steps": 30, "alone": 10},
        "cnn-5": {**_TINY["cnn-5"], "at": [3, 6, 9, 12], "steps": 14, "alone": 6},
    },
    {
        "fcn-5": {"width": 512, "image_size": 16, "at": [15, 35, 55, 75, 95], "steps": 120, "alone": 30},
        "cnn-5": {"width": 64, "image_size": 8, "at": [8, 20, 32, 44], "steps": 56, "alone": 12},
    },
)

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
        **{**_SPIKE, "scales": _scaled(_C3, _TINY, _SMALL)},
    ),
    Artefact(
        name="fig-c.4",
        title="A catapult in the top eigenspace: FCN on the rank-2 task, Wide ResNet on CIFAR-2",
        source="Figure C.4",
        printed="critical rates 1.9 (FCN) and 1.5 (WRN), rates 5 and 3",
        **{**_SPIKE, "scales": _scaled(_C4, _TINY, _SMALL)},
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
