"""Catapults in one or both eigendirections: Theorem 3.3.6."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from ..dag import log_log_slope
from ..nqm import (
    one_dimensional_step,
)
from .artefact import Artefact, Case, Data, Record, Result, Setting, Verdict, mean_sd, verdict_on
from .quadratic_theorems import EXPONENT, exact_scales

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ARTEFACTS"]


def _two_directions(m: int, n: int, second: float, seed: int) -> tuple[Any, Any, Any, Any]:
    """x, y, g(0) and K(0) of a two-layer NQM, from weights that are drawn but not kept.

    Samples of one sign see the same neurons, so that K = sum_s kappa_s a_s a_s^T; ``second`` is |a_-|^2 / |a_+|^2,
    about lambda_2 / lambda_1.
    """
    rng = np.random.default_rng([seed, m])
    half = n // 2
    above, below = rng.normal(2, 1, half).clip(0.1), rng.normal(-2, 1, n - half).clip(max=-0.1)
    x = np.concatenate([above, below * math.sqrt(second * (above @ above) / (below @ below))])
    u, v = rng.normal(size=m), rng.choice(np.array([-1.0, 1.0]), m)
    g, kernel = np.zeros(n), np.zeros((n, n))
    for sign in (1, -1):
        a = x * (np.sign(x) == sign)
        active = np.sign(u) == sign
        g += a * float(v[active] @ u[active]) / math.sqrt(m)
        kernel += (float(active.sum()) + float(u[active] @ u[active])) / m * np.outer(a, a)
    return x, np.sign(x), g, kernel


def _directions_cases(setting: Setting) -> list[Case]:
    return [
        {"width": m, "product": product, "seed": seed}
        for m in setting["widths"]
        for product in setting["products"]
        for seed in range(setting["seeds"])
    ]


def _directions_run(setting: Setting, case: Case, data: Data) -> Result:
    x, y, g, kernel = _two_directions(case["width"], setting["n"], setting["second"], case["seed"])
    directions = [x * (x > 0), x * (x < 0)]
    directions = [a / np.linalg.norm(a) for a in directions]
    lam = [float(p @ kernel @ p) for p in directions]
    eta = case["product"] / lam[0]
    losses: list[list[float]] = [[], []]
    for _ in range(setting["steps"] + 1):
        for i, p in enumerate(directions):
            losses[i].append(0.5 * float((g - y) @ p) ** 2)
        with np.errstate(over="ignore", invalid="ignore"):
            g, kernel = one_dimensional_step(g, kernel, x=x, y=y, eta=eta, m=case["width"])
    return {
        "products": [eta * value for value in lam],
        "first": [values[0] for values in losses],
        "peak": [max(values) for values in losses],
        "final": [values[-1] for values in losses],
        "final_products": [eta * float(p @ kernel @ p) for p in directions],
    }


def _judge_directions(setting: Setting, records: list[Record]) -> Verdict:
    one, both = setting["products"]
    shown: dict[str, bool] = {}
    text = []
    for product, expected in ((one, (True, False)), (both, (True, True))):
        rows = [r for r in records if r["case"]["product"] == product]
        for i, catapults in enumerate(expected):
            rise = [r["result"]["peak"][i] / r["result"]["first"][i] for r in rows]
            ends = max(r["result"]["final"][i] for r in rows)
            name = f"eta lambda_1 = {product:g}, p_{i + 1}"
            if catapults:
                slope = log_log_slope(
                    [r["case"]["width"] / math.log(r["case"]["width"]) for r in rows],
                    [r["result"]["peak"][i] for r in rows],
                )
                shown[f"{name} catapults"] = slope.low > EXPONENT and ends < 1 and min(rise) > 1
                shown[f"{name}: lambda falls below 2/eta"] = all(r["result"]["final_products"][i] < 2 for r in rows)
                text.append(f"{name}: exponent of the peak in m / log m {slope}")
            else:
                shown[f"{name} does not"] = max(rise) < 1.05
                text.append(f"{name}: rises by at most {max(rise):.3f} times")
    second = [r["result"]["products"][1] / r["result"]["products"][0] for r in records]
    return verdict_on(shown, f"lambda_2 / lambda_1 {mean_sd(second)}; " + "; ".join(text))


def _draw_directions(records: list[Record], figure: Figure) -> None:
    products = sorted({r["case"]["product"] for r in records})
    for ax, product in zip(figure.subplots(1, len(products), sharey=True), products, strict=True):
        rows = [r for r in records if r["case"]["product"] == product]
        for i in (0, 1):
            ax.loglog(
                [r["case"]["width"] for r in rows], [r["result"]["peak"][i] for r in rows], "o", label=f"p_{i + 1}"
            )
        widths = sorted({r["case"]["width"] for r in rows})
        ax.loglog(widths, [m / math.log(m) for m in widths], "k:", label="m / log m")
        ax.set(title=f"eta lambda_1 = {product:g}", xlabel="width m", ylabel="largest projected loss")
        ax.legend(fontsize="small")


_DIRECTIONS: dict[str, Any] = {
    "products": [2.5, 3.4], "widths": [1000, 10_000, 100_000, 1_000_000], "n": 128, "second": 0.72, "steps": 600,
    "seeds": 5,
}  # fmt: skip

ARTEFACTS = (
    Artefact(
        name="theorem-3.3.6",
        title="Catapults in one or both eigendirections",
        source="Theorem 3.3.6 and Appendix B.12",
        claim="On samples of one dimension the loss catapults along p_i just where eta lambda_i > 2, to a peak of "
        "order at least m (eta lambda_i - 2)^2 / log m, and lambda_i falls.",
        printed="",
        scales=exact_scales(_DIRECTIONS, widths=[1000, 10_000, 100_000]),
        cases=_directions_cases,
        run=_directions_run,
        judge=_judge_directions,
        draw=_draw_directions,
    ),
)
