"""Problems (a data set, a network, rates) that the artefacts on catapults share, their scales and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .artefact import Case, Record, Result, Setting, Statements, Verdict, on_panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "BESIDE",
    "BIASED",
    "FITTED",
    "SCALED",
    "cases",
    "draw_traces",
    "fitted_verdict",
    "labels",
    "problem",
    "problem_of",
    "values",
    "values_of",
]


SCALED = "Rates are the thesis' multiples of the critical rate, as the scale of its inputs is not printed."
# The setting of Section 4.3 and Appendix C.2 that its printed critical rates fit (artefact critical-rates): those of
# the FCNs and the Wide ResNet. Two of the CNN's fit standardised pixels.
FITTED: dict[str, Any] = {"bias": "hidden", "pixels": "[-1, 1]"}
BIASED: dict[str, Any] = {"bias": "hidden"}


BESIDE = ", no biases"  # ends the label of a problem in Section 4.4's setting, which is shown beside the fitted one


def fitted_verdict(panels: Mapping[str, Statements], measured: str, note: str = SCALED) -> Verdict:
    """`on_panels` by the fitted setting; how those beside it come out is said."""
    beside = {label: found for label, found in panels.items() if label.endswith(BESIDE)}
    also = [f"Beside it, {label}: {on_panels({label: found}, '').outcome}." for label, found in beside.items()]
    fitted = {label: found for label, found in panels.items() if label not in beside}
    return on_panels(fitted, measured, " ".join([*also, note]))


def problem_of(setting: Setting, case: Case) -> Setting:
    return next(p for p in setting["problems"] if p["label"] == case["problem"])


def cases(setting: Setting) -> list[Case]:
    return [{"problem": p["label"], "seed": seed} for p in setting["problems"] for seed in range(setting["seeds"])]


def labels(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(record["case"]["problem"] for record in records))


def values(records: Sequence[Record], label: str, key: str) -> list[Any]:
    return [record["result"][key] for record in records if record["case"]["problem"] == label]


def values_of(records: Sequence[Record], label: str) -> list[Result]:
    return [record["result"] for record in records if record["case"]["problem"] == label]


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


def problem(label: str, net: str, dataset: str, multiple: Any, **changes: Any) -> dict[str, Any]:
    """A network of the thesis on two classes of a data set, at multiples of the critical rate, in the thesis' size."""
    classes: dict[str, list[int]] = {"cifar10": [7, 9], "svhn": [0, 2]}
    width = {"fcn-2": 1024, "fcn-4": 256, "fcn-5": 1024, "cnn-5": 512, "wrn-10": 10, "vit-4": 192, "myrtle-5": 256}[net]
    fixed = {"label": label, "network": net, "dataset": dataset, "classes": classes.get(dataset, [])}
    return {**fixed, "width": width, "image_size": 32, "multiple": multiple, **changes}
