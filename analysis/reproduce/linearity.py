"""Transition to linearity of networks of directed acyclic graphs: Figures 2.1 and 2.3, Section 2.3 and Appendix A."""

from __future__ import annotations

import math
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
    hessian_norm,
    hessian_norm_in_ball,
    points_in_ball,
    with_skips,
)
from .artefact import Artefact, Case, Data, Record, Result, Setting, Verdict, mean_sd
from .widths import Family, generator, outcome, panel, width_study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ARTEFACTS", "SIZES", "TRAINING", "gaussian", "train_kernel_change", "whole_fcn"]


def gaussian(setting: Setting, case: Case, n: int) -> Tensor:
    return torch.randn(n, setting["d"], generator=generator(2, case))


# ---------------------------------------------------------------------------------------- what is measured on a network


def _hessian(setting: Setting, net: DAGNetwork, case: Case) -> Result:
    """Of the outputs at the first weights."""
    return {"hessian": hessian_norm(net, gaussian(setting, case, 1)[0], tol=setting["tol"]).value}


def _hessian_in_ball(setting: Setting, net: DAGNetwork, case: Case) -> Result:
    """Of the outputs in a ball about the first weights."""
    x, radius, points = gaussian(setting, case, 1)[0], setting["radius"], setting["points"]
    found = hessian_norm_in_ball(net, x, radius, samples=points, seed=case["seed"], tol=setting["tol"])
    return {"hessian_in_ball": found.value}


def _pre_activations(setting: Setting, net: DAGNetwork, case: Case) -> Result:
    """The largest of some neurons, in every hidden layer but the first (linear in the weights)."""
    x = gaussian(setting, case, 1)[0]
    chosen = {i: layer[: setting["neurons"]] for i, layer in enumerate(net.dag.layers[2:-1], start=2)}
    return {
        f"layer_{i}": max(hessian_norm(net, x, vertex=int(v), tol=setting["tol"]).value for v in neurons)
        for i, neurons in chosen.items()
    }


def _deviation(setting: Setting, net: DAGNetwork, case: Case) -> Result:
    """The largest |f - f_lin| of sampled points of the ball, and at distance R along the gradient."""
    x = gaussian(setting, case, 1)
    linear, radius = Linearization(net, x), setting["radius"]
    largest = max(float(linear.deviation()) for _ in points_in_ball(net, radius, setting["points"], case["seed"]))
    params = list(net.parameters())
    gradient = torch.autograd.grad(net(x).sum(), params)
    length = math.sqrt(sum(float(g.square().sum()) for g in gradient))
    with torch.no_grad():
        for p, g in zip(params, gradient, strict=True):
            p.add_(g, alpha=radius / length)
    return {"deviation_random": largest, "deviation_gradient": float(linear.deviation())}


def train_kernel_change(setting: Setting, net: DAGNetwork, inputs: Tensor, targets: Tensor) -> Result:
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
    """`train_kernel_change` on Gaussian inputs and targets."""
    targets = torch.randn(setting["n"], len(net.dag.outputs), generator=generator(3, case))
    return train_kernel_change(setting, net, gaussian(setting, case, setting["n"]), targets)


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


# ------------------------------------------------------------------------------------------------- families of networks


def whole_fcn(setting: Setting, width: int, seed: int) -> DAG:
    return fcn([setting["d"], *[width] * (setting["depth"] - 1), setting.get("outputs", 1)])


def _densenet(setting: Setting, width: int, seed: int) -> DAG:
    """As Eq. A.5 has it: the inputs are in every in-degree."""
    return densenet([setting["d"], *[width] * (setting["depth"] - 1), 1])


def _dropped(setting: Setting, width: int, seed: int) -> DAG:
    """Inputs to the first layer only, as Figure 2.2 must mean it, so that in-degrees grow as the layers do."""
    sizes = [setting["d"], *[width] * (setting["depth"] - 1), setting.get("outputs", 1)]
    return drop_edges(densenet(sizes, dense_input=False), 0.5, seed)


def _skips(setting: Setting, width: int, seed: int) -> DAG:
    return with_skips(whole_fcn(setting, width, seed))


def _convolutions(setting: Setting, width: int, seed: int) -> DAG:
    return conv1d(setting["d"], [1, *[width] * (setting["depth"] - 1)], window=3)


def _two_bottlenecks(setting: Setting, width: int, seed: int) -> DAG:
    """Two neurons of in-degree 1 in the last hidden layer, as drawn in Figure 2.3."""
    last = setting["d"] + width * (setting["depth"] - 2)
    return add_bottlenecks(whole_fcn(setting, width, seed), [last, last + 1], seed=seed)


def _narrow(setting: Setting, width: int, seed: int) -> DAG:
    """A hidden layer of 2 neurons, so that every neuron of the next layer has in-degree 2."""
    return fcn([setting["d"], width, 2, width, 1])


def _widened(setting: Setting, width: int, seed: int) -> DAG:
    """`_narrow` with edges past the narrow layer, from the wide one before it to all but two neurons after it."""
    d = setting["d"]
    first, after = np.arange(d, d + width), np.arange(d + width + 4, d + 2 * width + 2)
    added = np.stack(np.meshgrid(first, after), axis=-1).reshape(-1, 2)
    return DAG.from_edges(np.concatenate([_narrow(setting, width, seed).edges, added]))


# ------------------------------------------------------------------------------------------------------------- the list


def _draw_bottlenecks(records: list[Record], figure: Figure) -> None:
    left, middle, right = figure.subplots(1, 3)
    draw_layers(_two_bottlenecks({"d": 4, "depth": 4}, 7, 0), left, highlight=[18, 19], labels=False)
    panel(middle, records, "hessian")
    panel(right, records, "kernel_change")


SIZES: Setting = {"sizes": [32, 64, 128, 256, 512, 1024], "d": 100, "depth": 4, "tol": 0.01, "seeds": 5}
TRAINING: Setting = {"n": 10, "rate": 0.5, "target": 1e-3, "max_steps": 20_000, "measure_every": 20}

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
    width_study(
        "fig-2.3",
        {"two bottleneck neurons": Family(_two_bottlenecks, by_size=True), "none": Family(whole_fcn)},
        [_hessian, _trained],
        {**SIZES, **TRAINING},
        draw=_draw_bottlenecks,
        title="A network with two bottleneck neurons",
        source="Figure 2.3",
        claim="A network with two neurons of in-degree 1, all others having a large one, still becomes linear as the "
        "number of neurons grows.",
    ),
    width_study(
        "theorem-2.3.6",
        {"FCN": Family(whole_fcn), "DenseNet without half its edges": Family(_dropped)},
        [_hessian, _hessian_in_ball],
        {**SIZES, "radius": 3.0, "points": 1, "seeds": 3},
        cause="verdict",  # the theorems allow powers of log m, the rule little more than a root of it
        title="Hessian norm of the output against the width, at the first weights and in a ball",
        source="Theorem 2.3.6",
        claim="The spectral norm of the output's Hessian is O(1/sqrt(m)) up to logarithms, in a ball of fixed radius "
        "about the first weights.",
    ),
    width_study(
        "corollary-2.3.7",
        {"FCN": Family(whole_fcn), "DenseNet without half its edges": Family(_dropped)},
        [_deviation],
        {**SIZES, "radius": 3.0, "points": 20, "sizes": [32, 64, 128, 256, 512, 1024, 2048]},
        title="Distance of the network from its linear approximation, in a ball",
        source="Corollary 2.3.7",
        claim="In a ball of fixed radius about the first weights, |f - f_lin| is O(1/sqrt(m)) up to logarithms.",
    ),
    width_study(
        "theorem-2.3.8",
        {"FCN": Family(whole_fcn), "DenseNet without half its edges": Family(_dropped)},
        [_pre_activations],
        {**SIZES, "neurons": 4},
        cause="verdict",  # the theorems allow powers of log m, the rule little more than a root of it
        title="Hessian norm of single pre-activations against the width",
        source="Theorem 2.3.8",
        claim="The spectral norm of the Hessian of any pre-activation is O(1/sqrt(m)) up to logarithms.",
    ),
    width_study(
        "section-2.3",
        {
            "linear output": Family(whole_fcn),
            "sigmoid output": Family(whole_fcn, linear=False, output=torch.sigmoid),
            "softplus output": Family(whole_fcn, linear=False, output=torch.nn.functional.softplus),
            "tanh output": Family(whole_fcn, linear=False, output=torch.tanh),
        },
        [_hessian_in_ball],
        {**SIZES, "depth": 3, "radius": 3.0, "points": 0, "seeds": 10},
        title="A non-linear activation on the output breaks transition to linearity",
        source="Section 2.3, 'Non-linear activation on output neurons'",
        claim="With a non-linear activation on the output the Hessian norm stays of order 1, whatever the width.",
    ),
    width_study(
        "appendix-a.1",
        {
            "FCN": Family(whole_fcn),
            "DenseNet (Eq. A.5)": Family(_densenet),
            "DenseNet without half its edges": Family(_dropped),
        },
        [_hessian, _trained],
        {**SIZES, **TRAINING},
        cause="verdict",  # the theorems allow powers of log m, the rule little more than a root of it
        title="FCN, DenseNet and randomly dropped edges",
        source="Appendix A.1",
        claim="Fully connected networks, DenseNets and networks with randomly dropped edges are cases of the "
        "definition, and become linear with the width.",
    ),
    width_study(
        "appendix-a.3",
        {"FCN": Family(whole_fcn), "DenseNet without half its edges": Family(_dropped)},
        [_hessian],
        {**SIZES, "outputs": 3},
        cause="verdict",  # the theorems allow powers of log m, the rule little more than a root of it
        title="Several outputs: spectral norm of the third-order Hessian",
        source="Appendix A.3, Corollary A.3.1",
        claim="For a fixed number of outputs, the norm of the third-order Hessian is O(1/sqrt(m)) up to logarithms.",
    ),
    width_study(
        "appendix-a.4",
        {"skip connections": Family(_skips), "none": Family(whole_fcn)},
        [_hessian, _trained],
        {**SIZES, **TRAINING},
        title="Skip connections",
        source="Appendix A.4, Theorem A.4.1",
        claim="With an untrained skip connection into every hidden neuron, the Hessian norm is still O(1/sqrt(m)).",
    ),
    width_study(
        "appendix-a.5",
        {"1-D convolutions": Family(_convolutions)},
        [_hessian, _trained],
        {**SIZES, **TRAINING, "d": 8, "depth": 3, "sizes": [8, 16, 32, 64, 128, 256], "n": 5},
        title="Shared weights: a 1-D convolutional network against its channels",
        source="Appendix A.5, Theorem A.5.1",
        claim="With weights shared a number of times that does not grow with the width, the Hessian norm is still "
        "O(1/sqrt(m)).",
    ),
    width_study(
        "appendix-a.6",
        {
            "narrow layer": Family(_narrow, linear=False, by_size=True),
            "narrow layer, all but two neurons after it widened": Family(_widened, by_size=True),
        },
        [_hessian],
        {**SIZES, "sizes": [32, 64, 128, 256, 512, 1024, 2048], "seeds": 12},
        title="A narrow layer breaks transition to linearity, edges past it bring it back",
        source="Appendix A.6",
        claim="A narrow hidden layer makes all neurons after it bottlenecks and breaks transition to linearity; edges "
        "that leave only a few of them bottlenecks bring it back.",
    ),
)
