"""Gradient norms: the PL* condition along training (Eq. 2.16) and the bound at initialisation (Proposition 2.4.4)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..dag import (
    DAGNetwork,
    drop_edges,
    fcn,
    gradient_norm,
    gradient_norm_bound,
    pl_star,
    points_in_ball,
    tangent_kernel,
)
from .artefact import Artefact, Case, Data, Record, Result, Setting, Verdict, mean_sd
from .linearity import SIZES, TRAINING, gaussian, whole_fcn
from .widths import TOLERANCE, Families, Family, generator, outcome, slope, width_study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ARTEFACTS"]


def _pl(setting: Setting, net: DAGNetwork, case: Case) -> Result:
    """lambda_min(K) at the first weights, in a ball about them and on the way of gradient descent; Eq. 2.16 there."""
    inputs = gaussian(setting, case, setting["n"])
    targets = torch.randn(setting["n"], 1, generator=generator(3, case))
    first = pl_star(net, inputs, targets)
    points = points_in_ball(net, setting["radius"], setting["points"], case["seed"])
    ball = [float(torch.linalg.eigvalsh(tangent_kernel(net, inputs).double())[0]) for _ in points]
    rate = setting["rate"] / float(torch.linalg.eigvalsh(tangent_kernel(net, inputs))[-1])
    optimizer = torch.optim.SGD(net.parameters(), lr=rate)
    way = []
    for _ in range(setting["max_steps"]):
        way.append(pl_star(net, inputs, targets))
        if way[-1].loss <= setting["target"] * first.loss:
            break
        optimizer.zero_grad()
        ((net(inputs) - targets).square().sum() / 2).backward()
        optimizer.step()
    return {
        "smallest": first.mu,
        "smallest_in_ball": min(ball),
        "smallest_on_the_way": min(at.mu for at in way),
        "smallest_change": max(abs(value - first.mu) for value in ball),
        "least_margin": min(at.ratio / at.mu for at in way if at.mu > 0),  # Eq. 2.16: at least 1
        "converged": way[-1].loss <= setting["target"] * first.loss,
    }


def _judge_pl(families: Families, setting: Setting, records: list[Record]) -> Verdict:
    widest = [r["result"] for r in records if r["case"]["size"] == max(setting["sizes"])]
    margins = [r["result"]["least_margin"] for r in records]
    settles = slope(records, "FCN", "smallest_change")
    right = [
        min(margins) >= 1 - 1e-3,
        all(r["smallest_in_ball"] > 0 and r["smallest_on_the_way"] > 0 and r["converged"] for r in widest),
        settles.value <= -0.5 + TOLERANCE,
    ]
    of = {key: mean_sd([r[key] for r in widest], 3) for key in ("smallest", "smallest_in_ball", "smallest_on_the_way")}
    measured = (
        f"at width {max(setting['sizes'])}, lambda_min(K) is {of['smallest']} at the first weights, at least "
        f"{of['smallest_in_ball']} in the ball and {of['smallest_on_the_way']} on the way; its change in the ball "
        f"~ m^{settles}; |grad L|^2 / 2L is at least {min(margins):.3f} lambda_min(K) at every step of every run"
    )
    reasons = [
        "Eq. 2.16 is violated",
        "lambda_min(K) is not positive throughout at the largest width",
        "it does not settle",
    ]
    return Verdict(outcome(right), measured, "; ".join(w for w, ok in zip(reasons, right, strict=True) if not ok))


def _square(z: Tensor) -> Tensor:
    return z.square()


def _identity(z: Tensor) -> Tensor:
    return z


# name: (layer sizes, activation, C = E sigma(z)^2, r, dropped edges)
_GRADIENTS: dict[str, tuple[list[int], Callable[[Tensor], Tensor], float, float, float]] = {
    "ReLU, 2 layers": ([20, 64, 1], torch.relu, 0.5, 1.0, 0.0),
    "ReLU, 4 layers": ([20, 64, 64, 64, 1], torch.relu, 0.5, 1.0, 0.0),
    "ReLU, 4 layers, half the edges": ([20, 64, 64, 64, 1], torch.relu, 0.5, 1.0, 0.5),
    "square, 3 layers": ([20, 64, 64, 1], _square, 3.0, 2.0, 0.0),
    "linear, 1 layer, 20 inputs": ([20, 1], _identity, 1.0, 1.0, 0.0),
    "linear, 1 layer, 1 input": ([1, 1], _identity, 1.0, 1.0, 0.0),
}


def _gradient_cases(setting: Setting) -> list[Case]:
    return [{"network": name, "seed": seed} for name in _GRADIENTS for seed in range(setting["seeds"])]


def _run_gradient(setting: Setting, case: Case, data: Data) -> Result:
    sizes, activation, second_moment, degree, p = _GRADIENTS[case["network"]]
    whole, norms = fcn(sizes), []
    stream = generator(1, case)
    for i in range(setting["draws"]):
        dag = drop_edges(whole, p, seed=1000 * case["seed"] + i) if p else whole
        net = DAGNetwork(dag, activation, generator=stream)
        norms.append(float(gradient_norm(net, torch.randn(sizes[0], generator=stream))))
    error = float(np.std(norms, ddof=1)) / math.sqrt(len(norms))
    bound = gradient_norm_bound(second_moment, degree, len(sizes) - 1)
    square = float(np.sqrt(np.mean(np.square(norms))))
    return {"mean": float(np.mean(norms)), "error": error, "root_mean_square": square, "bound": bound}


def _judge_gradient(setting: Setting, records: list[Record]) -> Verdict:
    texts, above = [], {}
    for name in dict.fromkeys(r["case"]["network"] for r in records):
        results = [r["result"] for r in records if r["case"]["network"] == name]
        mean, bound = float(np.mean([r["mean"] for r in results])), results[0]["bound"]
        error = math.sqrt(sum(r["error"] ** 2 for r in results)) / len(results)
        square = math.sqrt(float(np.mean([r["root_mean_square"] ** 2 for r in results])))
        above[name] = mean >= bound - 2 * error
        texts.append(f"{name}: E|grad f| = {mean:.3f} ± {error:.3f} (root mean square {square:.3f}), bound {bound:.3f}")
    below = [name for name, ok in above.items() if not ok]
    why = "The proof bounds the root mean square, which is never below E|grad f|. Below the bound: " if below else ""
    return Verdict(outcome(list(above.values())), "; ".join(texts), why + ", ".join(below))


def _draw_gradient(records: list[Record], figure: Figure) -> None:
    ax = figure.subplots()
    names = list(dict.fromkeys(r["case"]["network"] for r in records))
    for i, name in enumerate(names):
        for result in (r["result"] for r in records if r["case"]["network"] == name):
            ax.errorbar(result["mean"], i, xerr=2 * result["error"], fmt="o", color="C0", capsize=3)
            ax.plot(result["bound"], i, "k|", markersize=20)
    ax.set_yticks(range(len(names)), names)
    ax.set(xscale="log", xlabel=r"$E|\nabla f|$ (points), lower bound of Eq. 2.18 (bars)")


ARTEFACTS = (
    width_study(
        "equation-2.16",
        {"FCN": Family(whole_fcn)},
        [_pl],
        {**SIZES, **TRAINING, "radius": 3.0, "points": 5, "max_steps": 1000},
        judge=_judge_pl,
        title="The PL* constant at the first weights, in a ball and along gradient descent",
        source="Eq. 2.16 and 'Extending PL* condition to B(w0, R)'",
        claim="|grad L|^2 >= 2 lambda_min(K) L, and for wide networks lambda_min(K) stays positive in a ball about the "
        "first weights, as it changes no more than the Hessian norm allows.",
    ),
    Artefact(
        name="proposition-2.4.4",
        title="Mean gradient norm at initialisation against its lower bound",
        source="Proposition 2.4.4 (Eq. 2.18)",
        claim="E|grad f_k(w_0)| is at least sqrt(min(1, min_j C^(1 + r + ... + r^(j-1)))) for homogeneous activations.",
        printed="",
        scales={
            "full": {"draws": 1000, "seeds": 3},
            "recorded": {"draws": 1000, "seeds": 3},
            "quick": {"draws": 200, "seeds": 1},
        },
        cases=_gradient_cases,
        run=_run_gradient,
        judge=_judge_gradient,
        draw=_draw_gradient,
    ),
)
