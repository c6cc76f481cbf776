"""How loss and tangent kernel of quadratic models and networks move: Figures 3.1, 3.3 and B.1 to B.4."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.stats
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nqm import (
    GeneralQuadraticModel,
    LinearModel,
    QuadraticModel,
    TwoLayerNQM,
    TwoLayerReLU,
    observe,
    regime,
)
from ..tasks import Split
from .artefact import Artefact, Case, Data, Outcome, Record, Result, Setting, Verdict, mean_sd
from .quadratic_test_loss import in_span, two_layer_cnn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ARTEFACTS"]

Kernel = Callable[[], Tensor]


def _descend(
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


def _top(kernel: Tensor) -> float:
    return float(torch.linalg.eigvalsh(kernel)[-1]) if bool(kernel.isfinite().all()) else math.nan


def _generator(case: Case, salt: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(10_000 * salt + case["seed"])


def _verdict(shown: dict[str, bool], measured: str) -> Verdict:
    missing = [f"not: {what}" for what, yes in shown.items() if not yes]
    outcome: Outcome = "holds" if not missing else "fails" if len(missing) == len(shown) else "holds in part"
    return Verdict(outcome, measured, "; ".join(missing))


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
    n, d, generator = setting["n"], setting["d"], _generator(case, 1)
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
    lam = _top(kernel())
    losses: list[float] = []
    kernels: list[float] = []

    def look(residual: Tensor, k: Tensor) -> None:
        losses.append(0.5 * float(residual.square().sum()))
        kernels.append(_top(k))

    eta, steps = case["product"] / lam, setting["steps"]
    _descend(outputs, kernel, parameters, y, eta=eta, steps=steps, look=look, kernel_every=steps)
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
    return _verdict(shown, "runs as in the figure: " + ", ".join(text) + beside)


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
        generator, n = _generator(case, 2), setting["n"]
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
        _descend(
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
    return _verdict(shown, critical + "; ".join(text))


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


# -------------------------------------------------------------------- Figures B.2 and B.3: in the top eigenspace


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
    y, generator = part.targets[:, 0].double(), _generator(case, 3)
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


@torch.no_grad()
def cnn_kernel(patches: Tensor, first: Tensor, last: Tensor, pattern: Tensor) -> Tensor:
    """The tangent kernel (n, n) of a `two_layer_cnn` of ReLUs and one output, or of its NQM, in closed form.

    As for `TwoLayerNQM`, the NQM is the net with its activation pattern held: that of the weights ``pattern`` of its
    first layer. Shapes: patches (n, places, 9 channels_in), first (channels, 9 channels_in), last (1, places channels).
    """
    n, places, size = patches.shape
    active = patches @ pattern.T > 0
    scale = math.sqrt(size * last.numel())
    by_last = (active * (patches @ first.T)).reshape(n, -1) / scale
    outer = active * last.reshape(places, -1)
    by_first = torch.einsum("nlc,nlp->ncp", outer, patches).reshape(n, -1) / scale
    return by_last @ by_last.T + by_first @ by_first.T


def _space_run(quadratic: bool) -> Callable[[Setting, Case, Data], Result]:
    def run(setting: Setting, case: Case, data: Data) -> Result:
        outputs, kernel, parameters, y = _space_model(setting, case, data, quadratic=quadratic, centred=False)
        residuals: list[Tensor] = []
        kernels: list[Tensor] = []

        def look(residual: Tensor, k: Tensor) -> None:
            residuals.append(residual)
            kernels.append(k)

        eta = setting["product"] / _top(kernel())
        _descend(outputs, kernel, parameters, y, eta=eta, steps=setting["steps"], look=look)
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
    return _verdict(shown, ". ".join(text))


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


# ---------------------------------------------------------- Figure B.4: general quadratic models and networks


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
    generator = _generator(case, 4)
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
    lam = _top(kernel())
    losses: list[float] = []
    kernels: list[float] = []

    def look(residual: Tensor, k: Tensor) -> None:
        losses.append(0.5 * float(residual.square().sum()))
        kernels.append(_top(k))

    _descend(outputs, kernel, parameters, y, eta=case["product"] / lam, steps=setting["steps"], look=look)
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
    return _verdict(shown, ". ".join(text))


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


# ----------------------------------------------------------------------------------------------------------- artefacts

_REGIMES: dict[str, Any] = {
    "products": [1.0, 1.8, 2.5, 3.2, 4.5], "n": 20, "d": 10, "width": 2000, "p": 200, "gamma": 1e-3, "steps": 300,
    "seeds": 3,
}  # fmt: skip
_LINE: dict[str, Any] = {"n": 128, "width": 5000, "below": 0.9, "above": 1.15, "steps": 300, "seeds": 5}
_SPACE: dict[str, Any] = {
    "n": 128, "width": 2048, "channels": 1024, "side": 32, "product": 2.8, "steps": 40, "seeds": 1,
}  # fmt: skip
_GENERAL: dict[str, Any] = {
    "d": 100, "gamma": 1e-3, "gammas": [1e-2, 3e-3, 1e-3, 3e-4], "product": 2.8, "products": [2.2, 2.5, 2.8, 3.4],
    "n_images": 20, "width": 10_000, "widths": [300, 1000, 3000, 10_000], "steps": 300, "seeds": 5,
}  # fmt: skip


def _scales(full: dict[str, Any], recorded: dict[str, Any], quick: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {"full": full, "recorded": {**full, **recorded}, "quick": {**full, **recorded, **quick}}


_LINE_SCALES = _scales(_LINE, {"seeds": 3}, {"width": 1000, "seeds": 1})
_SPACE_SCALES = _scales(_SPACE, {"channels": 256, "side": 8}, {"n": 40, "width": 256, "channels": 32, "side": 8})
_LINE_CLAIM = (
    "for eta < 2/lambda_1 the kernel is nearly constant; between 2/lambda_1 and 2/lambda_2 the catapult is along p_1 "
    "and only lambda_1 falls; above, along both, and both fall."
)
_SPACE_CLAIM = (
    "p_1^T R_f p_1 and p_1^T R_K p_1 grow with the loss and are positive while it is large, and the loss along p_1 is "
    "nearly all of the spike, for"
)

ARTEFACTS = (
    Artefact(
        name="fig-3.1",
        title="Three regimes of linear and nonlinear models",
        source="Figure 3.1",
        claim="Linear models converge monotonically below the critical rate and diverge above it; networks, NQMs and "
        "general quadratic models have a catapult phase in between.",
        printed="",
        scales=_scales(_REGIMES, {}, {"width": 500, "steps": 200, "seeds": 1}),
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
        scales=_scales(_GENERAL, {}, {"width": 1000, "widths": [300, 1000, 3000], "seeds": 2}),
        cases=_general_cases,
        run=_general_run,
        judge=_judge_general,
        draw=_draw_general,
    ),
)
