"""The theorems of chapter 3 as measurements: regimes, peaks, equilibria, divergence, Proposition B.13.1."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..dag import Slope, log_log_slope
from ..nqm import (
    GeneralQuadraticModel,
    equilibria,
    observe,
    phase_diagram,
    regime,
    scalar_trajectory,
    two_layer_start,
)
from .artefact import Artefact, Case, Data, Record, Result, Setting, Verdict, mean_sd, verdict_on

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ARTEFACTS", "EXPONENT", "exact_scales"]

EXPONENT = 0.9  # "of order at least x": the fitted exponent's confidence interval lies above this


# ----------------------------------------------------------------- one sample: the phase diagram (3.3.1, B.3.1, B.7.1)


def _phase_cases(setting: Setting) -> list[Case]:
    return [{"width": width, "seed": seed} for width in setting["widths"] for seed in range(setting["seeds"])]


def _phase_run(setting: Setting, case: Case, data: Data) -> Result:
    diagram = phase_diagram(
        setting["products"], [case["width"]], seeds=[case["seed"]], y=setting["y"], steps=setting["steps"]
    )
    return {
        "products": setting["products"],
        "predicted": [row[0] for row in diagram.predicted],
        "observed": [row[0][0] for row in diagram.observed],
        **{key: getattr(diagram, key)[:, 0, 0].tolist() for key in ("first", "peak", "final", "final_kernel")},
    }


def _cells(records: list[Record]) -> list[dict[str, Any]]:
    """One row a run: width, product and what was seen."""
    keys = ("products", "predicted", "observed", "first", "peak", "final", "final_kernel")
    return [
        {"width": r["case"]["width"], "seed": r["case"]["seed"], **dict(zip(keys, values, strict=True))}
        for r in records
        for values in zip(*(r["result"][key] for key in keys), strict=True)
    ]


def _peak_slopes(cells: list[dict[str, Any]]) -> tuple[dict[float, Slope], Slope | None]:
    """Exponents of the peak in m / log m for each product, and in eta lambda - 2 at the largest width."""
    caught = [c for c in cells if c["predicted"] == c["observed"] == "catapult"]
    by_product: dict[float, Slope] = {}
    for product in sorted({c["products"] for c in caught}):
        rows = [c for c in caught if c["products"] == product]
        if len({c["width"] for c in rows}) > 2:
            x = [c["width"] / math.log(c["width"]) for c in rows]
            by_product[product] = log_log_slope(x, [c["peak"] for c in rows])
    largest = max(c["width"] for c in cells)
    near = [c for c in caught if c["width"] == largest and c["products"] <= 3]
    if len({c["products"] for c in near}) < 3:
        return by_product, None
    return by_product, log_log_slope([c["products"] - 2 for c in near], [c["peak"] for c in near])


def _matches(cells: list[dict[str, Any]], kind: str) -> tuple[bool, str]:
    decided = [c for c in cells if c["predicted"] == kind]
    right = sum(c["observed"] == kind for c in decided)
    return bool(decided) and right == len(decided), f"{kind} {right}/{len(decided)}"


def _judge_phase(setting: Setting, records: list[Record]) -> Verdict:
    cells = _cells(records)
    monotone, catapult = _matches(cells, "monotone"), _matches(cells, "catapult")
    slopes, in_delta = _peak_slopes(cells)
    final = [c["final_kernel"] for c in cells if c["observed"] == "catapult"]
    ends = [c["final"] for c in cells if c["observed"] == "catapult"]
    shown = {
        "monotone below 2/lambda": monotone[0],
        "catapult between 2/lambda and 4/lambda": catapult[0],
        "peak of at least the order m / log m": bool(slopes) and all(s.low > EXPONENT for s in slopes.values()),
        "loss of order 1 after it, eta lambda below 2": bool(final) and max(final) < 2 and max(ends) < 1,
    }
    text = ", ".join(f"{product:g}: {slope}" for product, slope in slopes.items())
    delta = f"; in eta lambda - 2 (up to 1, m = {max(c['width'] for c in cells):,}): {in_delta}" if in_delta else ""
    final_text = f"; eta lambda at the end {min(final):.2f} to {max(final):.2f}" if final else ""
    measured = f"as predicted: {monotone[1]}, {catapult[1]}; exponent of the peak in m / log m at eta lambda {text}"
    return verdict_on(shown, measured + delta + final_text)


def _judge_divergence(setting: Setting, records: list[Record]) -> Verdict:
    shown, text = _matches(_cells(records), "divergent")
    return Verdict("holds" if shown else "fails", f"as predicted: {text}", "" if shown else "some did not diverge")


def _draw_phase(records: list[Record], figure: Figure) -> None:
    cells = _cells(records)
    widths = sorted({c["width"] for c in cells})
    left, right = figure.subplots(1, 2)
    colors = {"monotone": "#30638e", "catapult": "#edae49", "divergent": "#d1495b"}
    for kind, color in colors.items():
        rows = [c for c in cells if c["observed"] == kind]
        left.scatter([c["products"] for c in rows], [c["width"] for c in rows], color=color, label=kind, marker="s")
    for threshold in (2, 4):
        left.axvline(threshold, color="black", linewidth=1, linestyle=":")
    left.set(yscale="log", xlabel="eta lambda_0", ylabel="width m", title="what was observed")
    left.margins(y=0.2)  # room for the legend above the points
    left.legend(fontsize="small", loc="upper center", ncols=3)
    for product in sorted({c["products"] for c in cells if c["observed"] == "catapult"}):
        means = [
            [c["peak"] for c in cells if (c["products"], c["width"]) == (product, m) and c["observed"] == "catapult"]
            for m in widths
        ]
        right.loglog(widths, [np.mean(v) if v else np.nan for v in means], "o-", label=f"{product:g}")
    right.loglog(widths, [m / math.log(m) for m in widths], "k:", label="m / log m")
    right.set(xlabel="width m", ylabel="largest loss", title="peak, by eta lambda_0")
    right.legend(fontsize="small")


# ------------------------------------------------------------------------------------------- equilibria (Theorem 3.3.4)


def _equilibria_cases(setting: Setting) -> list[Case]:
    return [
        {"width": width, "product": product, "seed": seed}
        for width in setting["widths"]
        for product in setting["products"]
        for seed in range(setting["seeds"])
    ]


def _equilibria_run(setting: Setting, case: Case, data: Data) -> Result:
    m, y = case["width"], setting["y"]
    g, lam = two_layer_start(m, seed=case["seed"])
    eta = case["product"] / lam
    run = scalar_trajectory(g, lam, eta=eta, y=y, c=1 / m, steps=setting["steps"])
    at_zero, *others = equilibria(eta=eta, y=y, c=1 / m, products=[eta * float(run.lam[-1])])
    return {
        "loss": float(run.loss[-1]),
        "v": eta * float(run.lam[-1]),
        "epsilon": math.log(m) / math.sqrt(m),
        "eigenvalues": sorted(float(value.real) for value in at_zero.eigenvalues),
        "others": [point.spectral_radius for point in others],
    }


def _judge_equilibria(setting: Setting, records: list[Record]) -> Verdict:
    results = [r["result"] for r in records]
    inside = [0 < r["v"] < 2 for r in results]
    constant = min(min(r["v"], 2 - r["v"]) / r["epsilon"] for r in results)
    apart = [abs(r["eigenvalues"][0] - (1 - r["v"])) + abs(r["eigenvalues"][1] - 1) < 1e-6 for r in results]
    shown = {
        "every run ends at zero loss": all(r["loss"] < 1e-12 for r in results),
        "with eta lambda in (0, 2)": all(inside),
        "where the Jacobian's eigenvalues are 1 - eta lambda and 1": all(apart),
        "every other fixed point is unstable": all(min(r["others"]) > 1 for r in results),
    }
    v = [r["v"] for r in results]
    least = min(min(r["others"]) for r in results)
    measured = (
        f"{len(results)} runs: eta lambda at the end {min(v):.3f} to {max(v):.3f}, inside (0, 2) in {sum(inside)}; all "
        f"are in [epsilon, 2 - epsilon] with epsilon = {constant:.2f} log m / sqrt(m), the constant being left open by "
        f"the thesis; least spectral radius of the other fixed points {least:.4f}"
    )
    return verdict_on(shown, measured)


def _draw_equilibria(records: list[Record], figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    for width in sorted({r["case"]["width"] for r in records}):
        rows = [r for r in records if r["case"]["width"] == width]
        left.plot([r["case"]["product"] for r in rows], [r["result"]["v"] for r in rows], "o", label=f"m = {width:,}")
        right.plot([r["result"]["v"] for r in rows], [max(abs(e) for e in r["result"]["others"]) for r in rows], "o")
    left.axhline(2, color="black", linestyle=":")
    left.set(xlabel="eta lambda_0", ylabel="eta lambda at the end")
    left.legend(fontsize="small")
    right.set(xlabel="eta lambda at the end", ylabel="largest spectral radius, other fixed points")


# ------------------------------------------------------------------------------- phi = 0 (Proposition B.13.1)


def _special_cases(setting: Setting) -> list[Case]:
    return [{"product": product, "seed": seed} for product in setting["products"] for seed in range(setting["seeds"])]


def _special_run(setting: Setting, case: Case, data: Data) -> Result:
    """Trains g = (gamma / 2) w^T Sigma w beside the corrected equations (`scalar_step`) and the printed ones."""
    p, gamma, norm = setting["p"], setting["gamma"], setting["norm"]
    generator = torch.Generator().manual_seed(case["seed"])
    sigma = norm * (2.0 * torch.randint(0, 2, (p,), generator=generator) - 1).double()
    w = torch.randn(p, generator=generator, dtype=torch.float64) / (gamma * norm * math.sqrt(p))  # lambda(0) near 1
    model = GeneralQuadraticModel(torch.zeros(1, p, dtype=torch.float64), sigma, gamma, w=w)
    g, lam = model().item(), model.kernel().item()
    eta = case["product"] / lam
    run = scalar_trajectory(g, lam, eta=eta, y=0.0, c=(gamma * norm) ** 2, steps=setting["steps"])
    optimizer = torch.optim.SGD(model.parameters(), lr=eta)
    losses, kernels, wrong, printed_wrong = [], [], 0.0, 0.0
    printed = (np.float64(g), np.float64(lam))
    for t in range(setting["steps"] + 1):
        loss = 0.5 * model().square().sum()
        losses.append(loss.item())
        kernels.append(model.kernel().item())
        if math.isfinite(losses[-1]) and losses[-1] < 1e6 * losses[0]:
            wrong = max(wrong, abs(kernels[-1] - float(run.lam[t])) / lam)
            printed_wrong = float(np.fmax(printed_wrong, abs(kernels[-1] - printed[1]) / lam))
        with np.errstate(over="ignore", invalid="ignore"):
            printed = _printed_b13(*printed, eta, gamma, norm)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    seen = observe(losses, kernels)
    return {
        "predicted": regime(eta, lam), "observed": seen.regime, "rise": seen.peak / losses[0],
        "final_product": eta * seen.final_kernel, "error": wrong, "printed_error": printed_wrong,
    }  # fmt: skip


def _printed_b13(g: Any, lam: Any, eta: float, gamma: float, norm: float) -> tuple[Any, Any]:
    return (
        (1 - eta * lam + gamma * eta**2 * norm**2 * g**2) * g,
        lam - gamma * norm**2 * g**2 * (4 - eta * lam),
    )


def _judge_special(setting: Setting, records: list[Record]) -> Verdict:
    results = [r["result"] for r in records]
    right = [r["predicted"] == r["observed"] for r in results]
    shown = {
        "regimes as predicted": all(right),
        "the corrected equations are exact (1e-9)": max(r["error"] for r in results) < 1e-9,
    }
    caught = [r["rise"] for r in results if r["observed"] == "catapult"]
    measured = (
        f"as predicted {sum(right)}/{len(right)}; catapults raise the loss {mean_sd(caught, 1)} times; kernel off by "
        f"at most {max(r['error'] for r in results):.0e} of its start (the printed equations: "
        f"{max(r['printed_error'] for r in results):.0e})"
    )
    return verdict_on(shown, measured)


def _draw_special(records: list[Record], figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    rows = [r for r in records if math.isfinite(r["result"]["rise"])]
    left.semilogy([r["case"]["product"] for r in rows], [r["result"]["rise"] for r in rows], "o")
    left.set(xlabel="eta lambda_0", ylabel="largest loss / first")
    right.plot([r["case"]["product"] for r in rows], [r["result"]["final_product"] for r in rows], "o")
    right.axhline(2, color="black", linestyle=":")
    right.set(xlabel="eta lambda_0", ylabel="eta lambda at the end")


# ----------------------------------------------------------------------------------------------------------- artefacts

_PHASE: dict[str, Any] = {
    "products": [0.5, 1.0, 1.5, 1.9, 2.1, 2.2, 2.4, 2.7, 3.0, 3.4, 3.8, 4.1, 4.4, 5.0, 6.0],
    "widths": [100, 1000, 10_000, 100_000, 1_000_000], "y": 1.0, "steps": 1000, "seeds": 10,
}  # fmt: skip
_EQUILIBRIA: dict[str, Any] = {
    "products": [1.0, 2.2, 2.5, 3.0, 3.5, 3.8], "widths": [1000, 10_000, 100_000], "y": 1.0, "steps": 5000, "seeds": 5,
}  # fmt: skip
_SPECIAL: dict[str, Any] = {
    "products": [1.0, 1.8, 2.2, 2.6, 3.0, 3.5, 4.2, 5.0], "p": 1000, "gamma": 0.01, "norm": 2.0, "steps": 300,
    "seeds": 5,
}  # fmt: skip


def exact_scales(full: dict[str, Any], **quick: Any) -> dict[str, dict[str, Any]]:
    return {"full": full, "recorded": full, "quick": {**full, "seeds": 2, **quick}}


ARTEFACTS = (
    Artefact(
        name="theorem-3.3.1",
        title="Phase diagram of one sample: regimes, peak and last kernel over rate and width",
        source="Theorems 3.3.1 and B.3.1",
        claim="On one sample a two-layer NQM converges monotonically for eta lambda_0 < 2, and for 2 < eta lambda_0 "
        "< 4 by a catapult whose peak is of order at least m (eta lambda_0 - 2)^2 / log m, after which eta lambda < 2.",
        printed="",
        scales=exact_scales(_PHASE, widths=[100, 1000, 10_000]),
        cases=_phase_cases,
        run=_phase_run,
        judge=_judge_phase,
        draw=_draw_phase,
    ),
    Artefact(
        name="theorem-b.7.1",
        title="Divergence above four over lambda",
        source="Theorem B.7.1",
        claim="On one sample a two-layer NQM diverges for eta lambda_0 > 4.",
        printed="",
        scales=exact_scales(_PHASE, widths=[100, 1000, 10_000]),
        cases=_phase_cases,
        run=_phase_run,
        judge=_judge_divergence,
        draw=_draw_phase,
        shares="theorem-3.3.1",
    ),
    Artefact(
        name="theorem-3.3.4",
        title="Stable equilibria of the one-sample dynamics",
        source="Theorem 3.3.4 and Appendix B.6",
        claim="The stable equilibria are those of zero loss with eta lambda in [epsilon, 2 - epsilon]; all others are "
        "unstable.",
        printed="",
        scales=exact_scales(_EQUILIBRIA, widths=[1000, 10_000]),
        cases=_equilibria_cases,
        run=_equilibria_run,
        judge=_judge_equilibria,
        draw=_draw_equilibria,
    ),
    Artefact(
        name="proposition-b.13.1",
        title="Quadratic models without a linear term",
        source="Proposition B.13.1",
        claim="With phi = 0, y = 0 and Sigma^2 = |x|^2 I a quadratic model catapults for 2 < eta lambda(0) < 4.",
        printed="",
        scales=exact_scales(_SPECIAL, p=200),
        cases=_special_cases,
        run=_special_run,
        judge=_judge_special,
        draw=_draw_special,
    ),
)
