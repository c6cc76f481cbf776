"""Networks of directed acyclic graphs against nn.Sequential, F.conv1d and the definition read neuron by neuron."""

import copy
import math
import time
from itertools import pairwise

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from catapult_opt import CatapultSGD
from catapult_opt.analysis.dag import DAG, DAGNetwork, add_bottlenecks, conv1d, densenet, drop_edges, fcn, with_skips
from catapult_opt.analysis.dag import network as network_module


@pytest.fixture(autouse=True)
def float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def graphs(draw, most=9):
    """A random DAG whose vertices are numbered in any order."""
    n = draw(st.integers(2, most))
    pairs = [(i, j) for j in range(n) for i in range(j)]
    kept = draw(st.lists(st.sampled_from(pairs), min_size=1, unique=True))
    used = sorted({v for pair in kept for v in pair})
    names = dict(zip(used, draw(st.permutations(range(len(used)))), strict=True))
    return DAG.from_edges([(names[u], names[v]) for u, v in kept])


def longest_path(dag, v):
    return max((1 + longest_path(dag, u) for u in dag.sources(v)), default=0)


def weight_of_edges(net):
    """{(u, v): weight}, read back from the layers by probing each with unit vectors."""
    weights = {}
    for depth, layer in enumerate(net.weight_layers, start=1):
        sources = [u for i in layer.read for u in net.dag.layers[i]]
        matrix = (layer(torch.eye(len(sources))) / layer.scale).detach()
        for i, u in enumerate(sources):
            for j, v in enumerate(net.dag.layers[depth]):
                weights[int(u), int(v)] = matrix[i, j]
    return weights


def by_definition(net, x, activation_of):
    """Eq. 2.2 (with A.12 and A.14) neuron by neuron; `activation_of` maps a vertex to its function."""
    dag, weights = net.dag, weight_of_edges(net)
    skip = {v: u for u, v in dag.skips.tolist()}
    f = {int(v): x[:, i] for i, v in enumerate(dag.inputs)}
    for v in map(int, np.argsort(dag.layer, kind="stable")):
        if v in f:
            continue
        pre = sum(weights[int(u), v] * f[int(u)] for u in dag.sources(v)) / math.sqrt(dag.fan_in[v])
        f[v] = activation_of(v)(pre) + (f[skip[v]] if v in skip else 0.0)
    return torch.stack([f[int(v)] for v in dag.outputs], dim=1)


def identity(z):
    return z


# ----------------------------------------------------------------------------------------------------- other libraries


@pytest.mark.parametrize("sizes", [[5, 7, 3], [4, 8, 8, 8, 2], [3, 1]])
def test_sequential_fcn_equals_its_twin(sizes):
    net = DAGNetwork(fcn(sizes), torch.tanh)
    layers = [nn.Linear(a, b, bias=False) for a, b in pairwise(sizes)]
    for linear, layer in zip(layers, net.weight_layers, strict=True):
        linear.weight.data = layer.weight.detach() / math.sqrt(linear.in_features)
    twin = nn.Sequential(*[m for linear in layers for m in (linear, nn.Tanh())][:-1])
    x, y = normal(6, sizes[0]), normal(6, sizes[-1], seed=1)
    torch.testing.assert_close(net(x), twin(x), rtol=0, atol=1e-12)
    for model in (net, twin):
        (model(x) - y).square().sum().backward()
    for linear, layer in zip(layers, net.weight_layers, strict=True):
        expected = linear.weight.grad / math.sqrt(linear.in_features)  # chain rule of w = W sqrt(in_features)
        torch.testing.assert_close(layer.weight.grad, expected, rtol=0, atol=1e-12)


def test_densenet_equals_its_formula():
    net = DAGNetwork(densenet([4, 6, 5, 2]), torch.relu)
    x = normal(7, 4)
    w1, w2, w3 = (layer.weight for layer in net.weight_layers)
    first = torch.relu(x @ w1.T / 2)
    second = torch.relu(torch.cat([x, first], 1) @ w2.T / math.sqrt(10))
    expected = torch.cat([x, first, second], 1) @ w3.T / math.sqrt(15)
    torch.testing.assert_close(net(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [1, 3, 5])
def test_conv1d_equals_torch(window):
    length, channels = 7, [2, 4, 3]
    net = DAGNetwork(conv1d(length, channels, window, d_out=2), torch.tanh)
    x = normal(5, channels[0], length)
    h = x
    for c_in, c_out, layer in zip(channels, channels[1:], net.weight_layers, strict=False):
        kernel = layer.weight.reshape(c_out, c_in, window)
        h = torch.tanh(F.conv1d(h, kernel, padding=window // 2) / math.sqrt(c_in * window))
    expected = h.flatten(1) @ net.weight_layers[-1].weight.reshape(2, -1).T / math.sqrt(channels[-1] * length)
    torch.testing.assert_close(net(x), expected, rtol=0, atol=1e-12)
    assert net.num_weights == 2 * 4 * window + 4 * 3 * window + 3 * length * 2


def test_drop_edges_of_a_densenet_equals_masked_matrices():
    whole = densenet([4, 6, 5, 1])
    dag = drop_edges(whole, 0.5, seed=3)
    net = DAGNetwork(dag, torch.tanh)
    there = sp.csc_array(dag.adjacency).toarray()
    x = normal(3, 4)
    h, weights = [x], weight_of_edges(net)
    for size in (6, 5, 1):
        start = sum(a.shape[1] for a in h)
        before = torch.cat(h, 1)
        mask = torch.tensor(there[:start, start : start + size], dtype=before.dtype)
        w = torch.tensor([[float(weights.get((u, v), 0)) for v in range(start, start + size)] for u in range(start)])
        pre = before @ (w * mask) / mask.sum(0).sqrt()
        h.append(torch.tanh(pre) if size > 1 else pre)
    torch.testing.assert_close(net(x), h[-1])


# ------------------------------------------------------------------------------------------------------ the definition


@settings(deadline=None, max_examples=60)
@given(graphs(), st.booleans(), st.integers(0, 2**20))
def test_definition_neuron_by_neuron(dag, sparse, seed):
    rng = np.random.default_rng(seed)
    neurons = np.flatnonzero(dag.layer > 0)
    own = {int(v): rng.choice([torch.sin, torch.tanh, identity]) for v in neurons if rng.random() < 0.5}
    hidden = [int(v) for v in neurons if v not in dag.outputs]
    skips = [(int(rng.choice(np.flatnonzero(dag.layer < dag.layer[v]))), v) for v in hidden if rng.random() < 0.5]
    dag = DAG(dag.adjacency, outputs=rng.permutation(dag.outputs), inputs=rng.permutation(dag.inputs), skips=skips)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network_module, "_DENSE", 2.0 if sparse else 0.0)
        net = DAGNetwork(dag, torch.relu, neuron_activations=own)
    assert net.num_weights == dag.num_edges
    x = normal(3, len(dag.inputs))
    expected = by_definition(net, x, lambda v: own.get(v, identity if v in dag.outputs else torch.relu))
    torch.testing.assert_close(net(x), expected)
    for v in hidden:
        torch.testing.assert_close(net.pre_activation(x, v), pre_by_definition(net, x, v))


def pre_by_definition(net, x, v):
    trace = net.trace(x)
    values = {int(u): trace.values[net.dag.layer[u]][:, i] for layer in net.dag.layers for i, u in enumerate(layer)}
    weights = weight_of_edges(net)
    return sum(weights[int(u), v] * values[int(u)] for u in net.dag.sources(v)) / math.sqrt(net.dag.in_degree[v])


@settings(deadline=None, max_examples=60)
@given(graphs())
def test_layers_are_longest_paths(dag):
    assert dag.layer.tolist() == [longest_path(dag, v) for v in range(dag.num_vertices)]
    assert dag.depth == max(dag.layer)
    assert sorted(np.concatenate(dag.layers)) == list(range(dag.num_vertices))
    assert all((dag.layer[u] < dag.layer[v]) for u, v in dag.edges)
    beyond = [len(dag.sources(v)) for v in range(dag.num_vertices) if dag.layer[v] >= 2]
    assert dag.width == min(beyond, default=math.inf)


def test_layouts_and_input_forms_agree():
    dag = drop_edges(densenet([4, 6, 6, 2]), 0.4)
    again = DAG.from_edges(dag.edges[::-1], outputs=dag.outputs)
    assert (again.adjacency != dag.adjacency).nnz == 0
    net = DAGNetwork(dag, generator=torch.Generator().manual_seed(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network_module, "_DENSE", 2.0)
        other = DAGNetwork(again, generator=torch.Generator().manual_seed(0))
    assert {type(layer).__name__ for layer in net.layers} != {type(layer).__name__ for layer in other.layers}
    x = normal(5, 4)
    torch.testing.assert_close(net(x), other(x), rtol=0, atol=1e-12)


def test_stored_zeros_are_no_edges_and_the_argument_is_left_alone():
    adjacency = sp.coo_array(([3.0, 0.0, -1.0], ([0, 0, 1], [1, 2, 2])), shape=(3, 3))
    assert DAG(adjacency).edges.tolist() == [[0, 1], [1, 2]]
    assert adjacency.nnz == 3


def test_outputs_in_several_layers():
    dag = DAG.from_edges([(0, 2), (1, 2), (0, 3), (2, 4), (3, 4), (1, 5)], outputs=[4, 5])
    assert dag.layer[[4, 5]].tolist() == [2, 1]
    net = DAGNetwork(dag, torch.tanh)
    x = normal(3, 2)
    torch.testing.assert_close(net(x)[:, 1], weight_of_edges(net)[1, 5] * x[:, 1])
    torch.testing.assert_close(net(x), by_definition(net, x, lambda v: torch.tanh if v < 4 else identity))


def test_weights_are_standard_normal_and_neurons_of_order_one():
    net = DAGNetwork(drop_edges(fcn([300, 400, 400, 400]), 0.5), torch.relu, generator=torch.Generator().manual_seed(0))
    layer = net.weight_layers[1]
    weights = layer.weight[layer.mask > 0].detach()
    assert abs(weights.mean()) < 0.02 and abs(weights.std() - 1) < 0.02
    pre = net.trace(normal(200, 300)).pre
    assert [round(float(p.detach().square().mean()), 2) for p in pre] == pytest.approx([1, 0.5, 0.25], rel=0.1)


def test_shared_weights_have_the_summed_gradient():
    dag = DAG.from_edges([(0, 2), (1, 3), (2, 4), (3, 4)], weight_ids=[7, 7, 8, 9])
    net = DAGNetwork(dag, torch.tanh)
    assert net.num_weights == 3
    a, b = net.weight_layers[0].weight, net.weight_layers[1].weight
    x = normal(1, 2)
    net(x).sum().backward()
    slopes = 1 - torch.tanh(a * x[0]) ** 2
    torch.testing.assert_close(a.grad, ((b / math.sqrt(2)) * slopes * x[0]).sum().reshape(1).detach())


# ------------------------------------------------------------------------------------------------------------ builders


def test_drop_edges_keeps_what_it_says():
    whole = fcn([50, 40, 40, 2])
    for seed in range(3):
        dag = drop_edges(whole, 0.9, seed)
        assert {tuple(e) for e in dag.edges} < {tuple(e) for e in whole.edges}
        assert dag.num_edges == pytest.approx(0.1 * whole.num_edges, rel=0.2)
        assert (dag.inputs == whole.inputs).all() and (dag.outputs == whole.outputs).all()
        assert dag.in_degree[dag.layer > 0].min() >= 1
        assert np.array_equal(dag.edges, drop_edges(whole, 0.9, seed).edges)
    assert not np.array_equal(drop_edges(whole, 0.5, 0).edges, drop_edges(whole, 0.5, 1).edges)
    assert np.array_equal(drop_edges(whole, 0).edges, whole.edges)


def test_drop_edges_of_nearly_all_leaves_a_network():
    net = DAGNetwork(drop_edges(densenet([3, 4, 4, 1]), 0.999))
    assert net.num_weights == 9
    assert net(normal(2, 3)).isfinite().all()


def test_bottlenecks_have_the_in_degree_asked_for_and_stay_in_their_layer():
    whole = fcn([3, 30, 30, 1])
    dag = add_bottlenecks(whole, [40, 50], in_degree=2)
    assert dag.in_degree[[40, 50]].tolist() == [2, 2]
    assert (dag.layer == whole.layer).all()
    assert dag.num_edges == whole.num_edges - 2 * 28
    assert dag.width == 2


def test_skips_add_the_neuron_below():
    net = DAGNetwork(with_skips(fcn([3, 5, 5, 1])), torch.tanh)
    x = normal(4, 3)
    w1, w2, w3 = (layer.weight for layer in net.weight_layers)
    first = torch.tanh(x @ w1.T / math.sqrt(3)) + F.pad(x, (0, 2))
    second = torch.tanh(first @ w2.T / math.sqrt(5)) + first
    torch.testing.assert_close(net(x), second @ w3.T / math.sqrt(5))


# ------------------------------------------------------------------------------------------------- what it is refused


@settings(deadline=None, max_examples=60)
@given(graphs(), st.data())
def test_a_cycle_is_refused_and_named(dag, data):
    edges = {tuple(map(int, e)) for e in dag.edges}
    reached = {int(v): _descendants(edges, int(v)) for v in range(dag.num_vertices)}
    v = data.draw(st.sampled_from([v for v, below in reached.items() if below]))
    edges.add((data.draw(st.sampled_from(sorted(reached[v]))), v))
    with pytest.raises(ValueError, match="edges must not form a cycle") as refused:
        DAG.from_edges(sorted(edges))
    cycle = [int(v) for v in str(refused.value).split("got ")[1].split(":")[0].split(" -> ")]
    assert cycle[0] == cycle[-1] and len(set(cycle)) == len(cycle) - 1
    assert all(pair in edges for pair in pairwise(cycle))


def _descendants(edges, v):
    below = {b for a, b in edges if a == v}
    return below | {c for b in below for c in _descendants(edges, b)}


def test_a_loop_is_a_cycle():
    with pytest.raises(ValueError, match="got 1 -> 1:"):
        DAG.from_edges([(0, 1), (1, 1)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DAG.from_edges([(0, 1)], 3), "outputs must be connected to an input, vertex 2 has no incoming edge"),
        (lambda: DAG.from_edges([(0, 1)], 3, outputs=[2]), "vertex 2 has no incoming edge"),
        (lambda: DAG.from_edges([(0, 1), (1, 2)], outputs=[1]), "outputs must have no outgoing edges, got vertex 1"),
        (lambda: DAG.from_edges([(0, 1)], outputs=[]), "outputs must name at least one vertex"),
        (lambda: DAG.from_edges([(0, 1)], outputs=[5]), "outputs must be vertices from 0 to 1, got 5"),
        (lambda: DAG.from_edges([(0, 1), (2, 1)], inputs=[0]), "vertex 2 is missing"),
        (lambda: DAG.from_edges([(0, 1), (1, 2)], inputs=[0, 1]), "inputs must have no incoming edges, got vertex 1"),
        (lambda: DAG.from_edges([(0, 1), (0, 1)]), "edges must be distinct, got 0 -> 1"),
        (lambda: DAG.from_edges([]), "edges must hold at least one pair"),
        (lambda: DAG.from_edges([(0.5, 1)]), "edges must be pairs of vertex numbers"),
        (lambda: DAG.from_edges([(-1, 1)]), "edges must be pairs of vertex numbers from 0 on"),
        (lambda: DAG.from_edges([(0, 9)], 3), "below num_vertices = 3, got vertex 9"),
        (lambda: DAG(np.eye(3)), "adjacency must be a scipy.sparse array"),
        (lambda: DAG(sp.csr_array((2, 2))), "with at least 1 edge"),
        (lambda: DAG.from_edges([(0, 1), (1, 2)], skips=[(1, 1)]), "skips must lead from an earlier layer"),
        (lambda: DAG.from_edges([(0, 1), (1, 2)], skips=[(0, 2)]), r"got \(0, 2\) .*an output"),
        (lambda: DAG.from_edges([(0, 1), (1, 2), (2, 3)], skips=[(0, 2), (1, 2)]), "got several to vertex 2"),
        (lambda: DAG.from_edges([(0, 1), (1, 2)], weight_ids=[0, 0]), "weight_ids must be shared within a layer only"),
        (lambda: DAG.from_edges([(0, 1), (1, 2)], weight_ids=[0]), "weight_ids must be 2 integers"),
        (lambda: DAG.from_edges([(0, 1)], fan_in={1: 0}), "fan_in must be at least the in-degree"),
        (lambda: fcn([3]), "sizes must have at least an input and an output layer"),
        (lambda: fcn([3, 0]), "sizes must be a whole number >= 1, got 0"),
        (lambda: drop_edges(fcn([3, 1]), 1.0), r"p must be a probability in \[0, 1\), got 1.0"),
        (lambda: drop_edges(conv1d(4, [1, 2], 3), 0.5), "no zero padding"),
        (lambda: add_bottlenecks(fcn([3, 4, 1]), [0]), "got vertex 0 with 0"),
        (lambda: add_bottlenecks(fcn([3, 4, 1]), [3], in_degree=4), "got vertex 3 with 3"),
        (lambda: with_skips(fcn([3, 4, 1]), back=5), "back must leave neurons to connect, got 5"),
        (lambda: conv1d(4, [1, 2], 2), "window must be odd"),
        (lambda: DAGNetwork(np.eye(2)), "dag must be a DAG, got ndarray"),
        (lambda: DAGNetwork(fcn([2, 1]), "relu"), "activations must be functions of a tensor, got 'relu'"),
        (lambda: DAGNetwork(fcn([2, 1]), neuron_activations={0: torch.tanh}), "must name neurons, got 0"),
        (lambda: DAGNetwork(fcn([2, 1]))(torch.zeros(5, 3)), "x must have 2 columns"),
        (lambda: DAGNetwork(fcn([2, 1])).pre_activation(torch.zeros(5, 2), 1), "vertex must be a neuron, got 1"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


# ------------------------------------------------------------------------------------------------------- as a module


@pytest.mark.parametrize("name", ["SGD", "Adam", "LBFGS", "CatapultSGD"])
def test_trains_under_any_optimizer(name):
    net = DAGNetwork(drop_edges(densenet([5, 30, 30, 1]), 0.5), generator=torch.Generator().manual_seed(0))
    x, y = normal(20, 5), normal(20, 1, seed=1)
    criterion = nn.MSELoss()
    if name == "CatapultSGD":
        optimizer = CatapultSGD(net.parameters(), model=net, criterion=criterion)
    else:
        optimizer = getattr(torch.optim, name)(net.parameters(), lr={"SGD": 0.5, "Adam": 0.02, "LBFGS": 0.5}[name])
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = criterion(net(x), y)
        loss.backward()
        losses.append(loss.item())
        return loss

    for _ in range(300):
        if name == "LBFGS":
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    assert min(losses) < 0.1 * losses[0]  # the best: CatapultSGD may be in a catapult at the end
    for layer in net.weight_layers:
        assert (layer.weight[layer.mask == 0] == 0).all(), "a missing edge got a weight"


def test_copies_state_and_dtype():
    dag = drop_edges(fcn([3, 8, 2]), 0.3)
    net, x = DAGNetwork(dag), normal(4, 3)
    assert torch.equal(copy.deepcopy(net)(x), net(x))
    other = DAGNetwork(dag)
    assert not torch.equal(other(x), net(x))
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), net(x))
    assert net.float()(x.float()).dtype == torch.float32
    assert set(net.state_dict()) == {f"layers.{i}.weight" for i in range(2)}


def test_generator_alone_decides_the_weights():
    state = torch.get_rng_state()
    nets = [DAGNetwork(fcn([3, 4, 1]), generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    a, b, c = (net(normal(2, 3)) for net in nets)
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_device_follows_the_module():
    own = {4: torch.sin}
    net = DAGNetwork(with_skips(drop_edges(fcn([3, 4, 4, 1]), 0.3)), neuron_activations=own).to("meta")
    assert net(torch.zeros(2, 3, device="meta")).device.type == "meta"
    conv = DAGNetwork(conv1d(4, [1, 2], 3)).to("meta")
    assert conv(torch.zeros(2, 4, device="meta")).device.type == "meta"


@pytest.mark.slow
def test_wide_network_with_millions_of_edges_trains():
    torch.set_default_dtype(torch.float32)
    dag = drop_edges(densenet([3072, 4096, 4096, 1]), 0.5)
    net = DAGNetwork(dag)
    assert net.num_weights == dag.num_edges > 20_000_000
    x, y = normal(10, 3072), normal(10, 1, seed=1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    losses, start = [], time.perf_counter()
    for _ in range(10):
        optimizer.zero_grad()
        loss = (net(x) - y).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert (time.perf_counter() - start) / 10 < 5


def test_a_long_sparse_graph_with_a_million_edges_is_quick():
    rng = np.random.default_rng(0)
    sources = rng.integers(0, 10_000, (100_000, 10))  # ten edges into each of 100,000 neurons, most with 10 sources
    edges = np.unique(np.stack([sources, np.arange(10_000, 110_000)[:, None].repeat(10, 1)], -1).reshape(-1, 2), axis=0)
    start = time.perf_counter()
    net = DAGNetwork(DAG.from_edges(edges, 110_000, outputs=np.arange(10_000, 110_000), inputs=np.arange(10_000)))
    net(torch.ones(2, 10_000)).sum().backward()
    assert net.num_weights == len(edges) > 990_000
    assert time.perf_counter() - start < 10


# ------------------------------------------------------------------------------------------------------------ picture


def test_picture_shows_every_vertex_and_edge():
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyArrowPatch

    from catapult_opt.analysis.dag import draw_layers

    dag = with_skips(add_bottlenecks(fcn([3, 5, 5, 2]), [9]))
    left, right = Figure().subplots(1, 2)
    assert draw_layers(dag, right, highlight=[9]) is right
    assert not left.patches and not left.collections
    arrows = [p for p in right.patches if isinstance(p, FancyArrowPatch)]
    assert len(arrows) == dag.num_edges + len(dag.skips)
    marks = {c.get_label(): c.get_offsets() for c in right.collections}
    assert {name: len(marks[name]) for name in ("input", "hidden", "output")} == {"input": 3, "hidden": 10, "output": 2}
    assert marks["hidden"][:, 0].tolist() == dag.layer[3:13].tolist()
    assert [t.get_text() for t in right.texts] == [str(v) for v in range(15)]
    assert [t.get_text() for t in right.get_xticklabels()] == ["0", "1", "2", "3"]
    assert not draw_layers(fcn([3, 60, 1])).texts
    with pytest.raises(ValueError, match="at most 5000 edges to be drawn, got 10100"):
        draw_layers(fcn([100, 100, 1]))
