"""Quadratic models in the top eigenspace of the kernel, and general ones beside networks: Figures B.2 to B.4."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.stats
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nqm import (
    GeneralQuadraticModel,
    QuadraticModel,
    TwoLayerNQM,
    TwoLayerReLU,
    observe,
)
from ..tasks import Split
from .artefact import Artefact, Case, Data, Record, Result, Setting, Verdict, mean_sd, verdict_on
from .quadratic import Kernel, case_generator, descend, smaller_scales, top_eigenvalue
from .quadratic_networks import cnn_kernel, in_span, two_layer_cnn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ARTEFACTS"]


def _space_cases(setting: Setting) -> list[Case]:
    return [
        {"data": data, "net": net, "seed": seed}
        for data in ("cifar10", "svhn")
        for net in ("fc", "cnn")
        for seed in range(setting["seeds"])
    ]


def _space_model(
    setting: Setting, case: Case, data: Data, *, quadratic: bool, centred: bool
) -> tuple[Callable[[], Tensor], Kernel, list[nn.Parameter], Tensor]:
    """Pixels that are not centred give the kernel one eigenvalue far above the others."""
    (part,) = data.load(case["data"], classes=(0, 2)).draw(setting["n"], seed=case["seed"])
    inputs = part.inputs.double() - (part.inputs.double().mean() if centred else 0.0)
    inputs = inputs / inputs.square().mean().sqrt()
    y, generator = part.targets[:, 0].double(), case_generator(case, 3)
    if case["net"] == "fc":
        x = in_span(Split(inputs, part.targets), Split(inputs[:0], part.targets[:0]))[0].inputs
        net = TwoLayerReLU(x.shape[1], setting["width"], generator=generator).double()
        two_layers = TwoLayerNQM(net) if quadratic else net
        return lambda: two_layers(x), lambda: two_layers.kernel(x), list(two_layers.parameters()), y
    images = F.adaptive_avg_pool2d(inputs, setting["side"])
    cnn = two_layer_cnn(3, setting["side"], setting["channels"], 1, nn.ReLU, generator).double()
    model = QuadraticModel(cnn) if quadratic else cnn
    patches, start = cnn[0](images), next(cnn.parameters()).detach().clone()

    def kernel() -> Tensor:
        first, last = model.parameters()
        return cnn_kernel(patches, first, last, start if quadratic else first)

    return lambda: model(images), kernel, list(model.parameters()), y


def _space_run(quadratic: bool) -> Callable[[Setting, Case, Data], Result]:
    def run(setting: Setting, case: Case, data: Data) -> Result:
        outputs, kernel, parameters, y = _space_model(setting, case, data, quadratic=quadratic, centred=False)
        residuals: list[Tensor] = []
        kernels: list[Tensor] = []

        def look(residual: Tensor, k: Tensor) -> None:
            residuals.append(residual)
            kernels.append(k)

        eta = setting["product"] / top_eigenvalue(kernel())
        descend(outputs, kernel, parameters, y, eta=eta, steps=setting["steps"], look=look)
        return _space_result(residuals, kernels, eta)

    return run


def _space_result(residuals: list[Tensor], kernels: list[Tensor], eta: float) -> Result:
    """p_1^T R_f p_1 and p_1^T R_K p_1 of Appendix B.14, the loss and its part along p_1 (the kernel's top vector)."""
    curves: dict[str, list[float]] = {key: [] for key in ("loss", "along", "r_f", "r_k", "lambda")}
    loss, along, r_f, r_k, lam = curves.values()
    for r, following, k, k_next in zip(residuals, residuals[1:], kernels, kernels[1:], strict=False):
        values, vectors = torch.linalg.eigh(k)
        p, top = vectors[:, -1], float(values[-1])
        loss.append(0.5 * float(r @ r))
        along.append(0.5 * float(p @ r) ** 2)
        r_f.append(float(p @ following) / float(p @ r) - 1 + eta * top)
        r_k.append(top - float(p @ k_next @ p))
        lam.append(top)
    peak = int(np.argmax(loss))
    # "When the loss is large": on the way up and down, above twice where it began.
    large = [i for i, value in enumerate(loss) if value > 2 * loss[0]]
    ranks = [float(scipy.stats.spearmanr([loss[i] for i in large], [r[i] for i in large])[0]) for r in (r_f, r_k)]
    return {
        "rise": loss[peak] / loss[0],
        "final": 0.5 * float(residuals[-1] @ residuals[-1]) / loss[0],
        "share_at_peak": along[peak] / loss[peak],
        "positive": [float(np.mean([r[i] > 0 for i in large])) if large else math.nan for r in (r_f, r_k)],
        "rank_correlation": ranks,
        "kernel": lam[-1] / lam[0],
        "curves": curves,
    }


def _judge_space(setting: Setting, records: list[Record]) -> Verdict:
    shown: dict[str, bool] = {}
    text = []
    for data, net in dict.fromkeys((r["case"]["data"], r["case"]["net"]) for r in records):
        rows = [r["result"] for r in records if (r["case"]["data"], r["case"]["net"]) == (data, net)]
        name = f"{data}-2 {net}"
        positive, rank = (np.array([r[key] for r in rows]) for key in ("positive", "rank_correlation"))
        shown[f"{name}: catapults"] = all(r["rise"] > 10 and r["final"] < 1 for r in rows)
        shown[f"{name}: p_1 has the spike (90 % of the loss)"] = all(r["share_at_peak"] > 0.9 for r in rows)
        shown[f"{name}: both terms positive while the loss is large"] = bool((positive == 1).all())
        shown[f"{name}: both grow with the loss (rank correlation above 0.8)"] = bool((rank > 0.8).all())
        text.append(
            f"{name}: loss rises {mean_sd([r['rise'] for r in rows], 0)} times, of it along p_1 "
            f"{mean_sd([r['share_at_peak'] for r in rows], 3)}; while large, R_f and R_K are positive in "
            f"{mean_sd(positive[:, 0])} and {mean_sd(positive[:, 1])} of the steps, rank correlation with the loss "
            f"{mean_sd(rank[:, 0])} and {mean_sd(rank[:, 1])}; lambda_1 x {mean_sd([r['kernel'] for r in rows])}"
        )
    return verdict_on(shown, ". ".join(text))


def _draw_space(records: list[Record], figure: Figure) -> None:
    first = [r for r in records if r["case"]["seed"] == 0]
    figure.set_size_inches(12, 3 * len(first))
    for row, record in zip(figure.subplots(len(first), 3, squeeze=False), first, strict=True):
        curves = record["result"]["curves"]
        row[0].semilogy(curves["loss"], label="loss")
        row[0].semilogy(curves["along"], "--", label="along p_1")
        row[0].set(title=f"{record['case']['data']}-2, {record['case']['net']}", xlabel="step")
        row[0].legend(frameon=False)
        row[1].plot(curves["r_f"])
        row[1].set(title="p_1^T R_f p_1", xlabel="step")
        row[2].plot(curves["r_k"])
        row[2].set(title="p_1^T R_K p_1", xlabel="step")


def _general_cases(setting: Setting) -> list[Case]:
    """Each model with the usual nonlinearity at every rate, and at the usual rate with every nonlinearity."""
    cases = []
    for model, key in (("general", "gamma"), ("f", "width")):
        usual, others = setting[key], setting[key + "s"]
        for size, product in dict.fromkeys(
            [*((usual, product) for product in setting["products"]), *((size, setting["product"]) for size in others)]
        ):
            cases += [{"model": model, "size": size, "product": product, "seed": s} for s in range(setting["seeds"])]
    return cases


def _general_run(setting: Setting, case: Case, data: Data) -> Result:
    generator = case_generator(case, 4)
    if case["model"] == "general":
        d = setting["d"]
        phi = F.normalize(torch.randn(1, d, generator=generator, dtype=torch.float64))
        sigma = (2.0 * torch.randint(0, 2, (d,), generator=generator) - 1).double()
        general = GeneralQuadraticModel(phi, sigma, case["size"], generator=generator)
        outputs: Callable[[], Tensor] = general
        kernel, parameters, y = general.kernel, [general.w], torch.ones(1).double()
    else:
        sub = {**setting, "n": setting["n_images"], "width": case["size"]}
        images = {"data": "cifar10", "net": "fc", "seed": case["seed"]}
        outputs, kernel, parameters, y = _space_model(sub, images, data, quadratic=False, centred=True)
    lam = top_eigenvalue(kernel())
    losses: list[float] = []
    kernels: list[float] = []

    def look(residual: Tensor, k: Tensor) -> None:
        losses.append(0.5 * float(residual.square().sum()))
        kernels.append(top_eigenvalue(k))

    descend(outputs, kernel, parameters, y, eta=case["product"] / lam, steps=setting["steps"], look=look)
    seen = observe(losses, kernels)
    return {
        "observed": seen.regime, "rise": seen.peak / losses[0], "kernel": kernels[-1] / lam,
        "curves": {"loss": losses, "kernel": kernels},
    }  # fmt: skip


def _general_means(records: list[Record], model: str, by: str, fixed: float, key: str) -> dict[float, float]:
    other = "size" if by == "product" else "product"
    rows = [r for r in records if r["case"]["model"] == model and r["case"][other] == fixed]
    values = sorted({r["case"][by] for r in rows})
    kind: Callable[[Any], Any] = np.median  # peaks of a few unlucky starts are far out
    return {v: float(kind([r["result"][key] for r in rows if r["case"][by] == v])) for v in values}


def _judge_general(setting: Setting, records: list[Record]) -> Verdict:
    shown: dict[str, bool] = {}
    text = []
    for model, key in (("general", "gamma"), ("f", "width")):
        rows = [r for r in records if r["case"]["model"] == model]
        by_size = {k: _general_means(records, model, "size", setting["product"], k) for k in ("rise", "kernel")}
        by_rate = {k: _general_means(records, model, "product", setting[key], k) for k in ("rise", "kernel")}
        peaks = list(by_size["rise"].values())
        shown[f"{model}: catapults"] = all(r["result"]["observed"] == "catapult" for r in rows)
        falls = model == "general"  # gamma is one over the root of the width
        ordered = [b < a if falls else b > a for a, b in pairwise(peaks)]
        shown[f"{model}: nearer to linear, higher peak"] = all(ordered)
        rates = [list(by_rate[k].values()) for k in ("rise", "kernel")]
        shown[f"{model}: higher rate, higher peak"] = rates[0] == sorted(rates[0])
        shown[f"{model}: higher rate, smaller kernel at the end"] = rates[1] == sorted(rates[1], reverse=True)
        spread = max(by_size["kernel"].values()) / min(by_size["kernel"].values()) - 1
        shown[f"{model}: last kernel the same for every {key} (within 20 %)"] = spread < 0.2
        text.append(
            f"{model} (medians): peak / first by {key} "
            + ", ".join(
                f"{size:g}: {by_size['rise'][size]:.3g} (kernel x {by_size['kernel'][size]:.2f})"
                for size in by_size["rise"]
            )
            + "; by eta lambda_0 "
            + ", ".join(
                f"{rate:g}: {by_rate['rise'][rate]:.3g} (x {by_rate['kernel'][rate]:.2f})" for rate in by_rate["rise"]
            )
        )
    return verdict_on(shown, ". ".join(text))


def _draw_general(records: list[Record], figure: Figure) -> None:
    figure.set_size_inches(12, 7)
    rows = figure.subplots(2, 4)
    for row, model in zip(rows, ("general", "f"), strict=True):
        found = [r for r in records if r["case"]["model"] == model and r["case"]["seed"] == 0]
        usual_rate = max({r["case"]["product"] for r in found}, key=[r["case"]["product"] for r in found].count)
        usual_size = max({r["case"]["size"] for r in found}, key=[r["case"]["size"] for r in found].count)
        for pair, by, fixed in ((row[:2], "size", usual_rate), (row[2:], "product", usual_size)):
            other = "size" if by == "product" else "product"
            for r in sorted(found, key=lambda r: r["case"][by]):
                if r["case"][other] == fixed:
                    label = f"{r['case'][by]:g}"
                    pair[0].semilogy(np.array(r["result"]["curves"]["loss"]) + 1e-16, label=label)
                    pair[1].plot(r["result"]["curves"]["kernel"], label=label)
            name = {"size": "gamma" if model == "general" else "width", "product": "eta lambda_0"}[by]
            pair[0].set(title=f"{model}: loss by {name}", xlabel="step")
            pair[1].set(title="kernel norm", xlabel="step")
            pair[0].legend(fontsize="x-small")


_SPACE: dict[str, Any] = {
    "n": 128, "width": 2048, "channels": 1024, "side": 32, "product": 2.8, "steps": 40, "seeds": 1,
}  # fmt: skip


_GENERAL: dict[str, Any] = {
    "d": 100, "gamma": 1e-3, "gammas": [1e-2, 3e-3, 1e-3, 3e-4], "product": 2.8, "products": [2.2, 2.5, 2.8, 3.4],
    "n_images": 20, "width": 10_000, "widths": [300, 1000, 3000, 10_000], "steps": 300, "seeds": 5,
}  # fmt: skip


_SPACE_SCALES = smaller_scales(_SPACE, {"channels": 256, "side": 8}, {"n": 40, "width": 256, "channels": 32, "side": 8})


_SPACE_CLAIM = (
    "p_1^T R_f p_1 and p_1^T R_K p_1 grow with the loss and are positive while it is large, and the loss along p_1 is "
    "nearly all of the spike, for"
)

ARTEFACTS = (
    Artefact(
        name="fig-b.2",
        title="NQMs in the top eigenspace of the kernel",
        source="Figure B.2 and Appendix B.14",
        claim=f"{_SPACE_CLAIM} NQMs.",
        printed="",
        scales=_SPACE_SCALES,
        cases=_space_cases,
        run=_space_run(quadratic=True),
        judge=_judge_space,
        draw=_draw_space,
    ),
    Artefact(
        name="fig-b.3",
        title="Wide networks in the top eigenspace of the kernel",
        source="Figure B.3 and Appendix B.14",
        claim=f"{_SPACE_CLAIM} wide networks.",
        printed="",
        scales=_SPACE_SCALES,
        cases=_space_cases,
        run=_space_run(quadratic=False),
        judge=_judge_space,
        draw=_draw_space,
    ),
    Artefact(
        name="fig-b.4",
        title="General quadratic models beside networks",
        source="Figure B.4 and Appendix B.14",
        claim="Smaller gamma (or larger width) and larger rates raise the peak, larger rates lower the last kernel "
        "more, and gamma (or width) has no effect on the last kernel.",
        printed="",
        scales=smaller_scales(_GENERAL, {}, {"width": 1000, "widths": [300, 1000, 3000], "seeds": 2}),
        cases=_general_cases,
        run=_general_run,
        judge=_judge_general,
        draw=_draw_general,
    ),
)
