"""Transition to linearity of networks of directed acyclic graphs: chapter 2 and Appendix A."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from ..dag import (
    DAG,
    DAGNetwork,
    KernelChange,
    Linearization,
    add_bottlenecks,
    conv1d,
    densenet,
    draw_layers,
    drop_edges,
    fcn,
    gradient_norm,
    gradient_norm_bound,
    hessian_norm,
    hessian_norm_in_ball,
    pl_star,
    points_in_ball,
    tangent_kernel,
    with_skips,
)
from ..datasets import standardized
from .artefact import Artefact, Case, Data, Record, Result, Setting, Verdict, mean_sd
from .scaling import TOLERANCE, Families, Family, draw_panels, generator, outcome, panel, scaling, scaling_cases, slope

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ARTEFACTS"]


def _gaussian(setting: Setting, case: Case, n: int) -> Tensor:
    return torch.randn(n, setting["d"], generator=generator(2, case))


# ---------------------------------------------------------------------------------------- what is measured on a network


def _hessian(setting: Setting, net: DAGNetwork, case: Case) -> Result:
    """Of the outputs at the first weights."""
    return {"hessian": hessian_norm(net, _gaussian(setting, case, 1)[0], tol=setting["tol"]).value}


def _hessian_in_ball(setting: Setting, net: DAGNetwork, case: Case) -> Result:
    """Of the outputs in a ball about the first weights."""
    x, radius, points = _gaussian(setting, case, 1)[0], setting["radius"], setting["points"]
    found = hessian_norm_in_ball(net, x, radius, samples=points, seed=case["seed"], tol=setting["tol"])
    return {"hessian_in_ball": found.value}


def _pre_activations(setting: Setting, net: DAGNetwork, case: Case) -> Result:
    """The largest of some neurons, in every hidden layer but the first (linear in the weights)."""
    x = _gaussian(setting, case, 1)[0]
    chosen = {i: layer[: setting["neurons"]] for i, layer in enumerate(net.dag.layers[2:-1], start=2)}
    return {
        f"layer_{i}": max(hessian_norm(net, x, vertex=int(v), tol=setting["tol"]).value for v in neurons)
        for i, neurons in chosen.items()
    }


def _deviation(setting: Setting, net: DAGNetwork, case: Case) -> Result:
    """The largest |f - f_lin| of sampled points of the ball, and at distance R along the gradient."""
    x = _gaussian(setting, case, 1)
    linear, radius = Linearization(net, x), setting["radius"]
    largest = max(float(linear.deviation()) for _ in points_in_ball(net, radius, setting["points"], case["seed"]))
    params = list(net.parameters())
    gradient = torch.autograd.grad(net(x).sum(), params)
    length = math.sqrt(sum(float(g.square().sum()) for g in gradient))
    with torch.no_grad():
        for p, g in zip(params, gradient, strict=True):
            p.add_(g, alpha=radius / length)
    return {"deviation_random": largest, "deviation_gradient": float(linear.deviation())}


def _kernel_change(setting: Setting, net: DAGNetwork, inputs: Tensor, targets: Tensor) -> Result:
    """Gradient descent on (1/2) sum (f - y)^2 to convergence: the largest relative change of the tangent kernel."""
    change = KernelChange(net, inputs)
    rate = setting["rate"] / float(torch.linalg.eigvalsh(change.initial)[-1])  # in units of 1 / lambda_max(K_0)
    optimizer = torch.optim.SGD(net.parameters(), lr=rate)
    losses: list[float] = []
    for step in range(setting["max_steps"]):
        optimizer.zero_grad()
        loss = (net(inputs) - targets).square().sum() / 2
        losses.append(float(loss.detach()))
        if not setting["target"] * losses[0] < losses[-1] < math.inf:
            break
        loss.backward()
        optimizer.step()
        if step < setting["measure_every"] or step % setting["measure_every"] == 0:
            change.update()
    change.update()
    return {
        "kernel_change": change.maximum,
        "steps": len(losses) - 1,
        "converged": losses[-1] <= setting["target"] * losses[0],
        "curves": {"loss": losses},
    }


def _trained(setting: Setting, net: DAGNetwork, case: Case) -> Result:
    """`_kernel_change` on Gaussian inputs and targets."""
    targets = torch.randn(setting["n"], len(net.dag.outputs), generator=generator(3, case))
    return _kernel_change(setting, net, _gaussian(setting, case, setting["n"]), targets)


# ----------------------------------------------------------------------------------------------------------- Figure 2.1


def _random_dag(n: int, seed: int) -> DAG:
    """Edges between random pairs, from the first to the second in a random order of the vertices."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(n)
    pairs = [(int(order[i]), int(order[j])) for j in range(1, n) for i in range(j) if rng.random() < 3 / n]
    touched = sorted({v for pair in pairs for v in pair})
    names = {v: i for i, v in enumerate(touched)}
    return DAG.from_edges([(names[u], names[v]) for u, v in pairs])


def _longest_paths(dag: DAG) -> list[int]:
    """By powers of the adjacency matrix: A^k has an entry in column v exactly if a path of k edges ends in v."""
    power, longest, k = sp.csr_array(dag.adjacency.astype(float)), np.zeros(dag.num_vertices, dtype=int), 1
    step = power
    while power.nnz:
        longest[np.unique(power.nonzero()[1])] = k
        power, k = (power @ step).astype(bool).astype(float), k + 1
    return [int(length) for length in longest]


def _run_layers(setting: Setting, case: Case, data: Data) -> Result:
    dag = _random_dag(setting["vertices"], case["seed"])
    backward = int((dag.layer[dag.edges[:, 0]] >= dag.layer[dag.edges[:, 1]]).sum())
    wrong = int((dag.layer != _longest_paths(dag)).sum())
    return {"wrong": wrong, "backward_edges": backward, "layers": dag.depth + 1, "vertices": dag.num_vertices}


def _judge_layers(setting: Setting, records: list[Record]) -> Verdict:
    results = [r["result"] for r in records]
    right = [not (r["wrong"] or r["backward_edges"]) for r in results]
    measured = (
        f"{sum(r['vertices'] for r in results)} vertices of {len(results)} random graphs with "
        f"{mean_sd([r['layers'] for r in results], 1)} layers: {sum(r['wrong'] for r in results)} in a layer that is "
        f"not their longest path, {sum(r['backward_edges'] for r in results)} edges that do not lead to a later layer"
    )
    return Verdict(outcome(right), measured)


def _draw_layers(records: list[Record], figure: Figure) -> None:
    dag = DAG.from_edges(
        [(0, 3), (1, 3), (1, 4), (2, 4), (3, 5), (4, 5), (2, 5), (5, 6), (4, 7), (5, 7), (6, 8), (0, 8), (7, 9)]
    )
    left, right = figure.subplots(1, 2)
    angles = np.random.default_rng(1).permutation(dag.num_vertices) * 2 * np.pi / dag.num_vertices
    at = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    start, end = at[dag.edges[:, 0]], at[dag.edges[:, 1]]
    left.quiver(*start.T, *(end - start).T * 0.93, angles="xy", scale_units="xy", scale=1, width=0.004, color="0.55")
    left.scatter(at[:, 0], at[:, 1], s=160, color="tab:blue", zorder=3)
    for v, (x, y) in enumerate(at):
        left.text(x, y, str(v), color="white", size=7, ha="center", va="center", zorder=4)
    left.set(title="a graph", aspect="equal", xlim=(-1.2, 1.2), ylim=(-1.2, 1.2))
    left.set_axis_off()
    draw_layers(dag, right)


# ----------------------------------------------------------------------------------------------------------- Figure 2.2

_TO_FIRST = "inputs feed the first layer"
_TO_ALL = "inputs feed every layer (Eq. A.5)"


def _dropped_densenet(dense_input: bool, setting: Setting, width: int, seed: int) -> DAG:
    return drop_edges(densenet([3072, width, width, 1], dense_input=dense_input), setting["p"], seed)


_FIGURE_2_2: Families = {
    _TO_FIRST: Family(partial(_dropped_densenet, False), by_size=True),
    _TO_ALL: Family(partial(_dropped_densenet, True), by_size=True),
}


def _figure_2_2_cases(setting: Setting) -> list[Case]:
    cases = scaling_cases(_FIGURE_2_2, setting)
    return [case for case in cases if case["family"] == _TO_FIRST or case["size"] <= setting["largest_to_all"]]


def _run_figure_2_2(setting: Setting, case: Case, data: Data) -> Result:
    images = data.load("cifar10", classes=(0, 2))
    (split,) = standardized(*images.draw(setting["n"], seed=case["seed"]))
    family = _FIGURE_2_2[case["family"]]
    net = family.network(setting, case)
    change = _kernel_change(setting, net, split.inputs, split.targets)
    return {"width": family.width(net, case), "least_in_degree": net.dag.width, **change}


def _judge_figure_2_2(setting: Setting, records: list[Record]) -> Verdict:
    """By the first reading: in the second, the least in-degree is above half the number of inputs at every size."""
    every = slope(records, _TO_FIRST, "kernel_change")
    wide = slope(records, _TO_FIRST, "kernel_change", wider_half=True)
    other = slope(records, _TO_ALL, "kernel_change")
    least = min(r["result"]["least_in_degree"] for r in records if r["case"]["family"] == _TO_ALL)
    lost = sum(not r["result"]["converged"] for r in records)
    measured = (
        f"{_TO_FIRST}: change ~ m^{every}, over the wider half of the sizes m^{wide}; {_TO_ALL}: m^{other}, where the "
        f"width of Definition 2.2.7 is {least} and more; {len(records) - lost} of {len(records)} trainings converged"
    )
    near = [abs(s.value + 0.5) <= TOLERANCE for s in (every, wide)]
    why = (
        []
        if all(near)
        else ["the change is not close to a multiple of 1/sqrt(m) over all sizes and over the wider half"]
    )
    why += [f"{lost} trainings did not converge"] if lost else []
    if not every.value <= -0.5 + TOLERANCE:
        return Verdict("fails", measured, "; ".join(why))
    return Verdict("holds in part" if why else "holds", measured, "; ".join(why))


# ------------------------------------------------------------------------------------------------- families of networks


def _fcn(setting: Setting, width: int, seed: int) -> DAG:
    return fcn([setting["d"], *[width] * (setting["depth"] - 1), setting.get("outputs", 1)])


def _densenet(setting: Setting, width: int, seed: int) -> DAG:
    """As Eq. A.5 has it: the inputs are in every in-degree."""
    return densenet([setting["d"], *[width] * (setting["depth"] - 1), 1])


def _dropped(setting: Setting, width: int, seed: int) -> DAG:
    """Inputs to the first layer only, as Figure 2.2 must mean it, so that in-degrees grow as the layers do."""
    sizes = [setting["d"], *[width] * (setting["depth"] - 1), setting.get("outputs", 1)]
    return drop_edges(densenet(sizes, dense_input=False), 0.5, seed)


def _skips(setting: Setting, width: int, seed: int) -> DAG:
    return with_skips(_fcn(setting, width, seed))


def _convolutions(setting: Setting, width: int, seed: int) -> DAG:
    return conv1d(setting["d"], [1, *[width] * (setting["depth"] - 1)], window=3)


def _two_bottlenecks(setting: Setting, width: int, seed: int) -> DAG:
    """Two neurons of in-degree 1 in the last hidden layer, as drawn in Figure 2.3."""
    last = setting["d"] + width * (setting["depth"] - 2)
    return add_bottlenecks(_fcn(setting, width, seed), [last, last + 1], seed=seed)


def _narrow(setting: Setting, width: int, seed: int) -> DAG:
    """A hidden layer of 2 neurons, so that every neuron of the next layer has in-degree 2."""
    return fcn([setting["d"], width, 2, width, 1])


def _widened(setting: Setting, width: int, seed: int) -> DAG:
    """`_narrow` with edges past the narrow layer, from the wide one before it to all but two neurons after it."""
    d = setting["d"]
    first, after = np.arange(d, d + width), np.arange(d + width + 4, d + 2 * width + 2)
    added = np.stack(np.meshgrid(first, after), axis=-1).reshape(-1, 2)
    return DAG.from_edges(np.concatenate([_narrow(setting, width, seed).edges, added]))


# ------------------------------------------------------------------------------------------------ Eq. 2.16, Prop. 2.4.4


def _pl(setting: Setting, net: DAGNetwork, case: Case) -> Result:
    """lambda_min(K) at the first weights, in a ball about them and on the way of gradient descent; Eq. 2.16 there."""
    inputs = _gaussian(setting, case, setting["n"])
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


# ------------------------------------------------------------------------------------------------------------- the list


def _draw_bottlenecks(records: list[Record], figure: Figure) -> None:
    left, middle, right = figure.subplots(1, 3)
    draw_layers(_two_bottlenecks({"d": 4, "depth": 4}, 7, 0), left, highlight=[18, 19], labels=False)
    panel(middle, records, "hessian")
    panel(right, records, "kernel_change")


_SETTING: Setting = {"sizes": [32, 64, 128, 256, 512, 1024], "d": 100, "depth": 4, "tol": 0.01, "seeds": 5}
_TRAINING: Setting = {"n": 10, "rate": 0.5, "target": 1e-3, "max_steps": 20_000, "measure_every": 20}
_FIGURE_SETTING: Setting = {
    **_TRAINING, "sizes": [2**i for i in range(1, 13)], "largest_to_all": 512, "p": 0.5, "seeds": 5,
}  # fmt: skip

ARTEFACTS = (
    Artefact(
        name="fig-2.1",
        title="A directed acyclic graph and its layers",
        source="Figure 2.1 and Definitions 2.2.1, 2.2.5",
        claim="The vertices of a directed acyclic graph fall into layers by their longest path from an input.",
        printed="",
        scales={
            "full": {"vertices": 500, "seeds": 20},
            "recorded": {"vertices": 500, "seeds": 20},
            "quick": {"vertices": 100, "seeds": 5},
        },
        cases=lambda setting: [{"seed": seed} for seed in range(setting["seeds"])],
        run=_run_layers,
        judge=_judge_layers,
        draw=_draw_layers,
    ),
    Artefact(
        name="fig-2.2",
        title="Relative change of the tangent kernel against the width, 3-layer DenseNet without half its edges",
        source="Figure 2.2",
        claim="From initialisation to convergence on 10 points of CIFAR-2, the largest relative change of the tangent "
        "kernel is close to a multiple of 1/sqrt(m) for widths m from 2 to 2^12, and all of them converge.",
        printed="slope -1/2",
        scales={
            "full": _FIGURE_SETTING,
            "recorded": _FIGURE_SETTING,
            "quick": {**_FIGURE_SETTING, "sizes": [4, 16, 64, 256], "seeds": 2, "max_steps": 2000},
        },
        cases=_figure_2_2_cases,
        run=_run_figure_2_2,
        judge=_judge_figure_2_2,
        draw=draw_panels,
    ),
    scaling(
        "fig-2.3",
        {"two bottleneck neurons": Family(_two_bottlenecks, by_size=True), "none": Family(_fcn)},
        [_hessian, _trained],
        {**_SETTING, **_TRAINING},
        draw=_draw_bottlenecks,
        title="A network with two bottleneck neurons",
        source="Figure 2.3",
        claim="A network with two neurons of in-degree 1, all others having a large one, still becomes linear as the "
        "number of neurons grows.",
    ),
    scaling(
        "theorem-2.3.6",
        {"FCN": Family(_fcn), "DenseNet without half its edges": Family(_dropped)},
        [_hessian, _hessian_in_ball],
        {**_SETTING, "radius": 3.0, "points": 1, "seeds": 3},
        title="Hessian norm of the output against the width, at the first weights and in a ball",
        source="Theorem 2.3.6",
        claim="The spectral norm of the output's Hessian is O(1/sqrt(m)) up to logarithms, in a ball of fixed radius "
        "about the first weights.",
    ),
    scaling(
        "corollary-2.3.7",
        {"FCN": Family(_fcn), "DenseNet without half its edges": Family(_dropped)},
        [_deviation],
        {**_SETTING, "radius": 3.0, "points": 20, "sizes": [32, 64, 128, 256, 512, 1024, 2048]},
        title="Distance of the network from its linear approximation, in a ball",
        source="Corollary 2.3.7",
        claim="In a ball of fixed radius about the first weights, |f - f_lin| is O(1/sqrt(m)) up to logarithms.",
    ),
    scaling(
        "theorem-2.3.8",
        {"FCN": Family(_fcn), "DenseNet without half its edges": Family(_dropped)},
        [_pre_activations],
        {**_SETTING, "neurons": 4},
        title="Hessian norm of single pre-activations against the width",
        source="Theorem 2.3.8",
        claim="The spectral norm of the Hessian of any pre-activation is O(1/sqrt(m)) up to logarithms.",
    ),
    scaling(
        "section-2.3",
        {
            "linear output": Family(_fcn),
            "sigmoid output": Family(_fcn, linear=False, output=torch.sigmoid),
            "softplus output": Family(_fcn, linear=False, output=torch.nn.functional.softplus),
            "tanh output": Family(_fcn, linear=False, output=torch.tanh),
        },
        [_hessian_in_ball],
        {**_SETTING, "depth": 3, "radius": 3.0, "points": 0, "seeds": 10},
        title="A non-linear activation on the output breaks transition to linearity",
        source="Section 2.3, 'Non-linear activation on output neurons'",
        claim="With a non-linear activation on the output the Hessian norm stays of order 1, whatever the width.",
    ),
    scaling(
        "equation-2.16",
        {"FCN": Family(_fcn)},
        [_pl],
        {**_SETTING, **_TRAINING, "radius": 3.0, "points": 5, "max_steps": 1000},
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
    scaling(
        "appendix-a.1",
        {
            "FCN": Family(_fcn),
            "DenseNet (Eq. A.5)": Family(_densenet),
            "DenseNet without half its edges": Family(_dropped),
        },
        [_hessian, _trained],
        {**_SETTING, **_TRAINING},
        title="FCN, DenseNet and randomly dropped edges",
        source="Appendix A.1",
        claim="Fully connected networks, DenseNets and networks with randomly dropped edges are cases of the "
        "definition, and become linear with the width.",
    ),
    scaling(
        "appendix-a.3",
        {"FCN": Family(_fcn), "DenseNet without half its edges": Family(_dropped)},
        [_hessian],
        {**_SETTING, "outputs": 3},
        title="Several outputs: spectral norm of the third-order Hessian",
        source="Appendix A.3, Corollary A.3.1",
        claim="For a fixed number of outputs, the norm of the third-order Hessian is O(1/sqrt(m)) up to logarithms.",
    ),
    scaling(
        "appendix-a.4",
        {"skip connections": Family(_skips), "none": Family(_fcn)},
        [_hessian, _trained],
        {**_SETTING, **_TRAINING},
        title="Skip connections",
        source="Appendix A.4, Theorem A.4.1",
        claim="With an untrained skip connection into every hidden neuron, the Hessian norm is still O(1/sqrt(m)).",
    ),
    scaling(
        "appendix-a.5",
        {"1-D convolutions": Family(_convolutions)},
        [_hessian, _trained],
        {**_SETTING, **_TRAINING, "d": 8, "depth": 3, "sizes": [8, 16, 32, 64, 128, 256], "n": 5},
        title="Shared weights: a 1-D convolutional network against its channels",
        source="Appendix A.5, Theorem A.5.1",
        claim="With weights shared a number of times that does not grow with the width, the Hessian norm is still "
        "O(1/sqrt(m)).",
    ),
    scaling(
        "appendix-a.6",
        {
            "narrow layer": Family(_narrow, linear=False, by_size=True),
            "narrow layer, all but two neurons after it widened": Family(_widened, by_size=True),
        },
        [_hessian],
        {**_SETTING, "sizes": [32, 64, 128, 256, 512, 1024, 2048], "seeds": 12},
        title="A narrow layer breaks transition to linearity, edges past it bring it back",
        source="Appendix A.6",
        claim="A narrow hidden layer makes all neurons after it bottlenecks and breaks transition to linearity; edges "
        "that leave only a few of them bottlenecks bring it back.",
    ),
)
