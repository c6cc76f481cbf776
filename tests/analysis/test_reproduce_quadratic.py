"""Chapter 3's artefacts: verdicts of made-up records come out both ways, tiny runs run, and the pieces are right."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from catapult_opt.analysis.datasets import Data, DataSet
from catapult_opt.analysis.networks import ntk_mlp
from catapult_opt.analysis.nqm import QuadraticModel, jacobian, two_layer_start
from catapult_opt.analysis.ntk import ntk
from catapult_opt.analysis.reproduce import (
    quadratic,
    quadratic_directions,
    quadratic_features,
    quadratic_networks,
    quadratic_spaces,
    quadratic_test_loss,
    quadratic_theorems,
)
from catapult_opt.analysis.reproduce.quadratic_networks import in_span, two_layer_cnn
from catapult_opt.analysis.tasks import Split

MODULES = (
    quadratic,
    quadratic_directions,
    quadratic_features,
    quadratic_spaces,
    quadratic_test_loss,
    quadratic_theorems,
)
BY_NAME = {artefact.name: artefact for module in MODULES for artefact in module.ARTEFACTS}


class Drawn(Data):
    """Gaussian blobs in the shape of any data set."""

    def load(self, name, classes=None, *, limit=None):
        generator = torch.Generator().manual_seed(0)
        k = len(classes) if classes else {"mnist": 10, "fsdd": 10, "ag_news": 4}[name]
        shape = {"mnist": (1, 8, 8), "fsdd": (1, 9, 7), "ag_news": (80,)}.get(name, (3, 8, 8))
        labels = torch.arange(120) % k
        inputs = torch.randn(120, *shape, generator=generator)
        inputs.flatten(1)[torch.arange(120), labels] += 3.0
        return DataSet(name, inputs, labels, tuple(range(k)))


_done = {}


def run_all(name, **smaller):
    """Once for all tests."""
    if (name, repr(smaller)) not in _done:
        _done[name, repr(smaller)] = _run_all(name, smaller)
    return _done[name, repr(smaller)]


def _run_all(name, smaller):
    artefact = BY_NAME[name]
    setting = {**artefact.scales["quick"], **smaller}
    records = []
    for case in artefact.cases(setting):
        torch.manual_seed(case["seed"])
        result = artefact.run(setting, case, Drawn())
        records.append({"case": case, "result": result, "seconds": 0.0})
    without = [{**r, "result": {k: v for k, v in r["result"].items() if k != "curves"}} for r in records]
    return artefact, records, artefact.judge(setting, without)


WIDE = {"widths": [1000, 10_000, 100_000], "products": [1.0, 2.4, 2.7, 3.0, 3.4, 5.0], "steps": 300}
TINY = {
    "theorem-3.3.1": WIDE, "theorem-b.7.1": WIDE, "theorem-3.3.4": {"steps": 3000}, "theorem-3.3.6": {},
    "proposition-b.13.1": {"steps": 80, "products": [1.0, 2.8, 4.5], "p": 500},
    "fig-3.1": {"products": [1.0, 2.8, 4.5], "width": 1000, "steps": 60, "n": 6},
    "fig-3.3": {"n": 40, "steps": 200}, "fig-b.1": {"n": 40, "steps": 200},
    "fig-b.2": {"n": 12, "width": 400, "channels": 8, "steps": 12},
    "fig-b.3": {"n": 12, "width": 400, "channels": 8, "steps": 12},
    "fig-b.4": {"gammas": [1e-2, 1e-3], "products": [2.5, 2.8], "widths": [100, 1000], "n_images": 6, "steps": 100},
    "fig-3.2": {"ratios": [0.8, 1.5], "n_test": 60, "time": 10},
    "fig-b.6": {"ratios": [0.8, 1.5], "n_test": 60, "time": 10},
    "fig-b.10": {"ratios": [0.8, 1.5], "n_test": 60, "time": 10},
    "question-3.5": {"d": 8, "width": 64, "n_train": 60, "n_eval": 60, "steps": 30},
}  # fmt: skip


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_run_is_judged_and_drawn(name):
    artefact, records, verdict = run_all(name, **TINY[name])
    assert verdict.outcome in ("holds", "holds in part", "fails")
    assert verdict.measured and (verdict.why or verdict.outcome == "holds")
    if name.startswith(("theorem", "proposition")):
        assert verdict.outcome == "holds"
    figure = pytest.importorskip("matplotlib.figure").Figure()
    artefact.draw(records, figure)
    assert len(figure.axes) > 1 or len(artefact.cases({**artefact.scales["quick"]})) == 1


def test_names_of_the_chapter():
    figures = {f"fig-3.{i}" for i in range(1, 5)} | {f"fig-b.{i}" for i in range(1, 14)}
    assert figures <= set(BY_NAME)
    for artefact in BY_NAME.values():
        if artefact.shares:
            owner = BY_NAME[artefact.shares]
            assert artefact.scales == owner.scales and artefact.run is owner.run
            for setting in artefact.scales.values():
                assert all(case in owner.cases(setting) for case in artefact.cases(setting))


# ------------------------------------------------------------------------------------------ verdicts of made-up records


def tampered(name, change, **smaller):
    """The verdict after changing the results of a tiny run."""
    artefact, records, _ = run_all(name, **smaller)
    records = copy.deepcopy(records)
    for record in records:
        change(record["result"])
    return artefact.judge({**artefact.scales["quick"], **smaller}, records)


def test_phase_diagram_can_fail():
    def flat(result):
        result["observed"] = ["monotone"] * len(result["observed"])

    verdict = tampered("theorem-3.3.1", flat, **WIDE)
    assert verdict.outcome == "holds in part"
    assert "not: catapult between" in verdict.why
    assert tampered("theorem-b.7.1", flat, **WIDE).outcome == "fails"


def test_peaks_that_do_not_grow_are_seen():
    verdict = tampered("theorem-3.3.1", lambda r: r.update(peak=[min(p, 5.0) for p in r["peak"]]), **WIDE)
    assert "not: peak of at least the order m / log m" in verdict.why


def test_equilibria_directions_and_special_case_can_fail():
    def stuck(result):
        result.update(loss=1.0, v=2.5, others=[0.5])

    assert tampered("theorem-3.3.4", stuck, **TINY["theorem-3.3.4"]).outcome == "fails"

    def swapped(result):
        result.update(peak=[f * 3 for f in result["first"]], final=[5.0, 5.0], final_products=[3.0, 3.0])

    assert tampered("theorem-3.3.6", swapped).outcome == "fails"
    assert (
        tampered(
            "proposition-b.13.1", lambda r: r.update(error=1.0, observed="divergent"), **TINY["proposition-b.13.1"]
        ).outcome
        == "fails"
    )


def test_figures_of_the_dynamics_can_fail():
    tiny = TINY["fig-3.1"]
    assert tampered("fig-3.1", lambda r: r.update(observed="none"), **tiny).outcome == "fails"
    tiny = TINY["fig-3.3"]
    wrong = {"kernel": [1.5, 0.2], "final": 2.0}
    assert tampered("fig-3.3", lambda r: r.update(wrong), **tiny).outcome == "fails"
    wrong = {"rise": 1.0, "share_at_peak": 0.1, "positive": [0.0, 0.0], "rank_correlation": [math.nan, 0.0]}
    assert tampered("fig-b.3", lambda r: r.update(wrong), **TINY["fig-b.3"]).outcome == "fails"


PANEL = ["mnist", "fc2", "relu", "gd"]


def made_up(f, f_lin, f_quad, diverged=True, panel=PANEL):
    """Best test losses at the rates 0.5 and 1.5."""
    result = {"ratios": [0.5, 1.5]}
    for name, loss in {"f": f, "f_lin": f_lin, "f_quad": f_quad}.items():
        result[name] = {
            "best_loss": loss, "accuracy": [1 - v for v in loss], "lambda_ratio": [1.0, 0.5],
            "distance": [1.0, 2.0], "peak": [1.0, 1e6 if diverged and name == "f_lin" else 5.0],
        }  # fmt: skip
    return {"case": {"panel": panel, "seed": 0}, "result": result}


@pytest.mark.parametrize("name", ["fig-3.2", "fig-3.4", "fig-b.5"])
@pytest.mark.parametrize(
    ("record", "outcome"),
    [
        (made_up([0.4, 0.3], [0.4, 9.0], [0.4, 0.35]), "holds"),
        (made_up([0.4, 0.3], [0.4, 9.0], [0.5, 0.35]), "holds in part"),  # apart below
        (made_up([0.4, 0.3], [0.4, 0.4], [0.4, 0.35], diverged=False), "holds in part"),
        (made_up([0.4, 0.5], [0.4, 9.0], [0.4, 0.35]), "fails"),
    ],
)
def test_verdict_on_test_losses(name, record, outcome):
    setting = {"ratios": [0.5, 1.5]}
    found = BY_NAME[name].judge(setting, [record]).outcome
    if name == "fig-3.2" and outcome == "fails":
        outcome = "holds in part"  # its part (a) holds
    assert found == outcome


def test_the_path_and_kernel_of_figure_3_2_can_fail():
    record = made_up([0.4, 0.5], [0.4, 9.0], [0.4, 0.5])
    record["result"]["f"].update(peak=[2.0, 1.0], lambda_ratio=[0.5, 1.0], distance=[2.0, 1.0])
    assert BY_NAME["fig-3.2"].judge({"ratios": [0.5, 1.5]}, [record]).outcome == "fails"


def features(**after):
    return [
        {
            "case": {"task": "rank-2", "model": model, "way": way, "seed": 0},
            "result": {"before": 0.1, "after": after[f"{model}_{way}"], "test": 1.0, "kernel": 1.0},
        }
        for model, way in (("f_lin", "below"), ("f_quad", "below"), ("f_quad", "above"), ("f_quad", "catapults"))
    ]


@pytest.mark.parametrize(
    ("above", "catapults", "outcome"),
    [(0.8, 0.9, "holds"), (0.8, 0.6, "holds in part"), (0.05, 0.6, "fails"), (math.nan, math.nan, "fails")],
)
def test_verdict_on_features(above, catapults, outcome):
    records = features(f_lin_below=0.7, f_quad_below=0.75, f_quad_above=above, f_quad_catapults=catapults)
    assert BY_NAME["question-3.5"].judge({"tasks": ["rank-2"]}, records).outcome == outcome


# -------------------------------------------------------------------------------------------------------------- pieces


def test_coordinates_of_the_span_keep_every_kernel():
    """Rotating inputs and first weights together changes neither outputs nor gradients' inner products."""
    generator = torch.Generator().manual_seed(0)
    train, test = (Split(torch.randn(n, 50, generator=generator).double(), torch.zeros(n, 1)) for n in (6, 4))
    rotated, _ = in_span(train, test)
    assert rotated.inputs.shape == (6, 10)
    d, small = 50, 10
    torch.testing.assert_close(
        rotated.inputs @ rotated.inputs.T / small, train.inputs @ train.inputs.T / d, rtol=1e-10, atol=1e-10
    )
    basis = torch.linalg.qr(torch.cat([train.inputs, test.inputs]).T)[0]
    wide, narrow = ntk_mlp(50, 8, 2).double(), ntk_mlp(10, 8, 2).double()
    with torch.no_grad():
        narrow[0].weight.copy_(wide[0].weight @ basis)
        narrow[2].weight.copy_(wide[2].weight)
    torch.testing.assert_close(narrow(rotated.inputs), wide(train.inputs), rtol=1e-9, atol=1e-9)
    kernels = [j @ j.T for j in (jacobian(narrow, rotated.inputs), jacobian(wide, train.inputs))]
    torch.testing.assert_close(*kernels, rtol=1e-9, atol=1e-9)


def test_spans_that_are_no_smaller_are_left_alone():
    train, test = Split(torch.randn(6, 2, 2), torch.zeros(6, 1)), Split(torch.randn(1, 2, 2), torch.zeros(1, 1))
    torch.testing.assert_close(in_span(train, test)[0].inputs, train.inputs.flatten(1), rtol=0, atol=0)


def test_cnn_is_a_convolution():
    net = two_layer_cnn(3, 5, 7, 2, nn.ReLU, torch.Generator().manual_seed(0)).double()
    x = torch.randn(4, 3, 5, 5).double()
    weight = net[1].weight.reshape(7, 3, 3, 3)
    hidden = torch.relu(nn.functional.conv2d(x, weight, padding=1) / 27**0.5)
    expected = hidden.flatten(2).mT.flatten(1) @ net[4].weight.T / (7 * 25) ** 0.5
    torch.testing.assert_close(net(x), expected)


def test_closed_form_of_the_cnn_kernel():
    net = two_layer_cnn(3, 4, 5, 1, nn.ReLU, torch.Generator().manual_seed(0)).double()
    x, start = torch.randn(4, 3, 4, 4).double(), net[1].weight.detach().clone()
    f_quad = QuadraticModel(net)
    for p in f_quad.parameters():
        p.data += 0.5 * torch.randn_like(p)
    first, last = f_quad.parameters()
    patches = net[0](x)
    torch.testing.assert_close(quadratic_networks.cnn_kernel(patches, first, last, start), ntk(f_quad, x))
    torch.testing.assert_close(
        quadratic_networks.cnn_kernel(patches, first, last, first), ntk(f_quad.module, x), rtol=1e-9, atol=1e-9
    )


def test_start_in_two_directions_is_that_of_a_network():
    """K and g of the fast start against moments over real networks' widths: E kappa = 1, K block diagonal."""
    x, y, g, kernel = quadratic_directions._two_directions(10**5, 10, 0.72, seed=0)
    above, below = x > 0, x < 0
    assert (y == np.sign(x)).all() and abs(kernel[np.ix_(above, below)]).max() == 0
    np.testing.assert_allclose(kernel[np.ix_(above, above)], np.outer(x[above], x[above]), rtol=0.02)
    np.testing.assert_allclose(g[above] / x[above], (g[above] / x[above])[0])
    assert (x[below] @ x[below]) / (x[above] @ x[above]) == pytest.approx(0.72)
    assert two_layer_start(10**5)[1] == pytest.approx(1.0, rel=0.02)
