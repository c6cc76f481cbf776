"""How loss and tangent kernel of quadratic models and networks move: Figures 3.1, 3.3 and B.1."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nqm import (
    GeneralQuadraticModel,
    LinearModel,
    TwoLayerNQM,
    TwoLayerReLU,
    observe,
    regime,
)
from .artefact import Artefact, Case, Data, Record, Result, Setting, Verdict, mean_sd, verdict_on

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ARTEFACTS", "Kernel", "case_generator", "descend", "smaller_scales", "top_eigenvalue"]

Kernel = Callable[[], Tensor]


def descend(
    outputs: Callable[[], Tensor], kernel: Kernel, parameters: Sequence[Tensor], y: Tensor, *, eta: float, steps: int,
    look: Callable[[Tensor, Tensor], None], kernel_every: int = 1,
) -> None:  # fmt: skip
    """Gradient descent on (1/2) sum (f - y)^2; ``look(residual, K)`` at every step, K being as old as it may be.

    Ends early where the loss is not finite or 1e12 times its first.
    """
    optimizer = torch.optim.SGD(parameters, lr=eta)
    first, k = math.nan, torch.empty(0)
    for t in range(steps + 1):
        residual = outputs().reshape(-1) - y
        loss = 0.5 * residual.square().sum()
        if t % kernel_every == 0 or t == steps:
            k = kernel()
        look(residual.detach(), k)
        first = loss.item() if t == 0 else first
        if not loss.item() < 1e12 * first or t == steps:
            return
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()


def top_eigenvalue(kernel: Tensor) -> float:
    return float(torch.linalg.eigvalsh(kernel)[-1]) if bool(kernel.isfinite().all()) else math.nan


def case_generator(case: Case, salt: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(10_000 * salt + case["seed"])


# ------------------------------------------------------------------------------------------- Figure 3.1: three regimes

_KINDS = ("f_lin", "f_quad", "general", "f")
_MANY = "general, many samples"  # beside the figure: reported, not judged


def _regime_cases(setting: Setting) -> list[Case]:
    return [
        {"model": model, "product": product, "seed": seed}
        for model in (*_KINDS, _MANY)
        for product in setting["products"]
        for seed in range(setting["seeds"])
    ]


def _regime_model(setting: Setting, case: Case) -> tuple[Callable[[], Tensor], Kernel, list[nn.Parameter], Tensor]:
    """The outputs, the tangent kernel, the parameters and the targets."""
    n, d, generator = setting["n"], setting["d"], case_generator(case, 1)
    y = (2.0 * torch.randint(0, 2, (n,), generator=generator) - 1.0).double()
    if case["model"] in ("general", _MANY):  # Appendix B.14: one Sigma for all samples, and it seems one sample
        n, p = 1 if case["model"] == "general" else n, setting["p"]
        y = y[:n]
        phi = F.normalize(torch.randn(n, p, generator=generator, dtype=torch.float64))
        sigma = (2.0 * torch.randint(0, 2, (p,), generator=generator) - 1).double()
        general = GeneralQuadraticModel(phi, sigma, setting["gamma"], generator=generator)
        return general, general.kernel, [general.w], y
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    net = TwoLayerReLU(d, setting["width"], generator=generator).double()
    if case["model"] == "f_lin":
        start, linear = net.kernel(x), LinearModel(net)
        return lambda: linear(x), lambda: start, list(linear.parameters()), y
    model = TwoLayerNQM(net) if case["model"] == "f_quad" else net
    return lambda: model(x), lambda: model.kernel(x), list(model.parameters()), y


def _regime_run(setting: Setting, case: Case, data: Data) -> Result:
    outputs, kernel, parameters, y = _regime_model(setting, case)
    lam = top_eigenvalue(kernel())
    losses: list[float] = []
    kernels: list[float] = []

    def look(residual: Tensor, k: Tensor) -> None:
        losses.append(0.5 * float(residual.square().sum()))
        kernels.append(top_eigenvalue(k))

    eta, steps = case["product"] / lam, setting["steps"]
    descend(outputs, kernel, parameters, y, eta=eta, steps=steps, look=look, kernel_every=steps)
    seen = observe(losses, kernels)
    diverged = len(losses) <= steps
    return {
        "observed": "divergent" if diverged else seen.regime,
        "predicted": regime(eta, lam),
        "kernel": kernels[-1] / lam,
        "curves": {"loss": losses},
    }


def _judge_regimes(setting: Setting, records: list[Record]) -> Verdict:
    text, shown = [], {}
    for model in _KINDS:
        rows = [r for r in records if r["case"]["model"] == model]
        wanted = []
        for r in rows:
            predicted = r["result"]["predicted"]
            if model == "f_lin" and predicted == "catapult":
                predicted = "divergent"
            if not (model == "f" and predicted == "divergent"):  # above 4/lambda the figure says nothing of networks
                wanted.append(r["result"]["observed"] == predicted)
        shown[f"{model} as in the figure"] = bool(wanted) and all(wanted)
        text.append(f"{model} {sum(wanted)}/{len(wanted)}")
    many = [
        r["result"]["observed"]
        for r in records
        if r["case"]["model"] == _MANY and r["result"]["predicted"] == "catapult"
    ]
    beside = (
        f". Beside the figure: general quadratic models with one random Sigma for {setting['n']} samples diverge "
        f"between 2/lambda and 4/lambda in {many.count('divergent')}/{len(many)} runs"
    )
    return verdict_on(shown, "runs as in the figure: " + ", ".join(text) + beside)


def _draw_regimes(records: list[Record], figure: Figure) -> None:
    figure.set_size_inches(13, 3.6)
    for ax, model in zip(figure.subplots(1, len(_KINDS), sharey=True), _KINDS, strict=True):
        for r in records:
            if r["case"]["model"] == model and r["case"]["seed"] == 0:
                loss = np.array(r["result"]["curves"]["loss"])
                ax.semilogy(loss / loss[0], label=f"{r['case']['product']:g}")
        ax.set(title=model, xlabel="step", ylim=(1e-6, 1e6))
    figure.axes[0].set_ylabel("loss / first loss")
    ax.legend(title="eta lambda_0", fontsize="small")


# ----------------------------------------------------------------- Figures 3.3 and B.1: samples of one dimension

_RATES = ("below 2/lambda_1", "between 2/lambda_1 and 2/lambda_2", "above 2/lambda_2")


def _line_cases(setting: Setting) -> list[Case]:
    return [{"rate": rate, "seed": seed} for seed in range(setting["seeds"]) for rate in _RATES]


def _line_run(quadratic: bool) -> Callable[[Setting, Case, Data], Result]:
    def run(setting: Setting, case: Case, data: Data) -> Result:
        generator, n = case_generator(case, 2), setting["n"]
        y = torch.cat([torch.ones(n // 2), -torch.ones(n - n // 2)]).double()
        x = (2 * y + torch.randn(n, generator=generator).double())[:, None]
        net = TwoLayerReLU(1, setting["width"], generator=generator).double()
        model = TwoLayerNQM(net) if quadratic else net
        values, vectors = torch.linalg.eigh(model.kernel(x))
        lam, p = values[-2:].flip(0), vectors[:, -2:].flip(1)
        eta = {
            _RATES[0]: setting["below"] * 2 / float(lam[0]),
            _RATES[1]: 0.5 * (2 / float(lam[0]) + 2 / float(lam[1])),
            _RATES[2]: setting["above"] * 2 / float(lam[1]),
        }[case["rate"]]
        kernels: list[list[float]] = []
        losses: list[list[float]] = []

        def look(residual: Tensor, k: Tensor) -> None:
            losses.append((0.5 * (residual @ p).square()).tolist())
            kernels.append([float(p[:, i] @ k @ p[:, i]) for i in (0, 1)])

        parameters = list(model.parameters())
        descend(
            lambda: model(x),
            lambda: model.kernel(x),
            parameters,
            y,
            eta=eta,
            steps=setting["steps"],
            look=look,
            kernel_every=3,
        )
        return {
            "critical": [n / float(value) for value in lam],  # for the loss (1/n) sum (f - y)^2, as the thesis prints
            "rate": eta * n / 2,  # for that loss
            "products": (eta * lam).tolist(),
            "kernel": [last / float(value) for last, value in zip(kernels[-1], lam, strict=True)],
            "rise": [max(values) / values[0] for values in zip(*losses, strict=True)],
            "final": sum(losses[-1]) / sum(losses[0]),
            "finished": len(losses) == setting["steps"] + 1,
            "curves": {"kernels": kernels, "losses": losses},
        }

    return run


def _judge_line(setting: Setting, records: list[Record]) -> Verdict:
    shown: dict[str, bool] = {}
    text = []
    for rate in _RATES:
        rows = [r["result"] for r in records if r["case"]["rate"] == rate]
        kernel = np.array([r["kernel"] for r in rows])
        product = np.array([r["products"] for r in rows])
        ends = kernel * product
        fall = 1 - kernel
        if rate == _RATES[0]:
            shown[f"{rate}: both eigenvalues nearly constant (within 3 %)"] = bool((np.abs(fall) < 0.03).all())
        elif rate == _RATES[1]:
            only = (ends[:, 0] < 2) & (np.abs(fall[:, 1]) < 0.25 * fall[:, 0])
            shown[f"{rate}: lambda_1 falls below 2/eta, lambda_2 by less than a quarter as much"] = bool(only.all())
        else:
            shown[f"{rate}: both fall below 2/eta"] = bool((ends < 2).all() and (product > 2).all())
        shown[f"{rate}: the loss ends below its start"] = all(r["finished"] and r["final"] < 1 for r in rows)
        text.append(
            f"{rate}: lambda_1 x {mean_sd(kernel[:, 0], 3)}, lambda_2 x {mean_sd(kernel[:, 1], 3)}, "
            f"projected losses rise {mean_sd([r['rise'][0] for r in rows], 1)} and "
            f"{mean_sd([r['rise'][1] for r in rows], 1)} times"
        )
    first = [r["result"]["critical"] for r in records]
    critical = f"n/lambda_1 {mean_sd([c[0] for c in first])}, n/lambda_2 {mean_sd([c[1] for c in first])}. "
    return verdict_on(shown, critical + "; ".join(text))


def _draw_line(records: list[Record], figure: Figure) -> None:
    figure.set_size_inches(12, 6)
    rows = figure.subplots(2, len(_RATES))
    for column, rate in zip(rows.T, _RATES, strict=True):
        found = next(r for r in records if r["case"]["rate"] == rate)["result"]
        kernels, losses = (np.array(found["curves"][key]) for key in ("kernels", "losses"))
        for i in (0, 1):
            column[0].plot(kernels[:, i] / len(records[0]["result"]["curves"]["losses"][0]), label=f"lambda_{i + 1}")
            column[1].semilogy(losses[:, i] + 1e-16, label=f"p_{i + 1}")
        column[0].set(title=f"rate {found['rate']:.3f}, {rate}", ylabel="eigenvalue", xlabel="step")
        column[0].title.set_fontsize(8)
        column[1].set(ylabel="projected loss", xlabel="step")
    rows[0, 0].legend(frameon=False)
    rows[1, 0].legend(frameon=False)


# ----------------------------------------------------------------------------------------------------------- artefacts

_REGIMES: dict[str, Any] = {
    "products": [1.0, 1.8, 2.5, 3.2, 4.5], "n": 20, "d": 10, "width": 2000, "p": 200, "gamma": 1e-3, "steps": 300,
    "seeds": 3,
}  # fmt: skip
_LINE: dict[str, Any] = {"n": 128, "width": 5000, "below": 0.9, "above": 1.15, "steps": 300, "seeds": 5}


def smaller_scales(full: dict[str, Any], recorded: dict[str, Any], quick: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {"full": full, "recorded": {**full, **recorded}, "quick": {**full, **recorded, **quick}}


_LINE_SCALES = smaller_scales(_LINE, {"seeds": 3}, {"width": 1000, "seeds": 1})
_LINE_CLAIM = (
    "for eta < 2/lambda_1 the kernel is nearly constant; between 2/lambda_1 and 2/lambda_2 the catapult is along p_1 "
    "and only lambda_1 falls; above, along both, and both fall."
)

ARTEFACTS = (
    Artefact(
        name="fig-3.1",
        title="Three regimes of linear and nonlinear models",
        source="Figure 3.1",
        claim="Linear models converge monotonically below the critical rate and diverge above it; networks, NQMs and "
        "general quadratic models have a catapult phase in between.",
        printed="",
        scales=smaller_scales(_REGIMES, {}, {"width": 500, "steps": 200, "seeds": 1}),
        cases=_regime_cases,
        run=_regime_run,
        judge=_judge_regimes,
        draw=_draw_regimes,
    ),
    Artefact(
        name="fig-3.3",
        title="Eigenvalues and projected losses of an NQM on samples of one dimension",
        source="Figure 3.3 and Appendix B.14",
        claim=f"For NQMs, {_LINE_CLAIM}",
        printed="critical values 0.37 and 0.39 (n/lambda_i, for the mean loss, not 2/lambda_i as written)",
        scales=_LINE_SCALES,
        cases=_line_cases,
        run=_line_run(quadratic=True),
        judge=_judge_line,
        draw=_draw_line,
    ),
    Artefact(
        name="fig-b.1",
        title="Eigenvalues and projected losses of a wide network on samples of one dimension",
        source="Figure B.1 and Appendix B.14",
        claim=f"For wide networks, {_LINE_CLAIM}",
        printed="critical values 0.37 and 0.39 (n/lambda_i, for the mean loss)",
        scales=_LINE_SCALES,
        cases=_line_cases,
        run=_line_run(quadratic=False),
        judge=_judge_line,
        draw=_draw_line,
    ),
)
