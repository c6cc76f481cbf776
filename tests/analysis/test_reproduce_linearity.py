"""The artefacts of chapter 2 can come out either way, and a small run of each runs."""

import math

import numpy as np
import pytest
import torch

from catapult_opt.analysis.dag import DAG
from catapult_opt.analysis.reproduce import gradients, kernel_change, linearity
from catapult_opt.analysis.reproduce.store import Results
from catapult_opt.analysis.tasks import Split

ARTEFACTS = (*gradients.ARTEFACTS, *kernel_change.ARTEFACTS, *linearity.ARTEFACTS)
BY_NAME = {artefact.name: artefact for artefact in ARTEFACTS}
SIZES = [16, 32, 64, 128, 256, 512]


class FakeData:
    """Random images in place of CIFAR-10."""

    def load(self, name, classes=None):
        assert (name, classes) == ("cifar10", (0, 2))
        return self

    def draw(self, n, seed=0):
        generator = torch.Generator().manual_seed(seed)
        targets = torch.tensor([1.0, -1.0]).repeat(n)[:n, None]
        return [Split(torch.rand(n, 3, 32, 32, generator=generator), targets)]


def power_laws(exponents, seeds=3, noise=0.05, **more):
    """Made-up records: {family: {key: exponent}}."""
    rng = np.random.default_rng(0)
    return [
        {
            "case": {"family": family, "size": m, "seed": seed},
            "result": {"width": m, **{k: m**a * math.exp(rng.normal(0, noise)) for k, a in keys.items()}, **more},
        }
        for family, keys in exponents.items()
        for m in SIZES
        for seed in range(seeds)
    ]


def judged(name, records):
    artefact = BY_NAME[name]
    return artefact.judge({**artefact.scales["quick"], "sizes": SIZES}, records)


@pytest.mark.parametrize(
    ("stays", "falls", "outcome"),
    [
        (0.0, -0.5, "holds"),
        (0.0, -0.9, "holds"),
        (-0.5, -0.5, "holds in part"),
        (-0.5, -0.2, "fails"),
        (0.0, 0.0, "holds in part"),
    ],
)
def test_slopes_decide(stays, falls, outcome):
    families = {f"{name} output": {"hessian_in_ball": stays} for name in ("sigmoid", "softplus", "tanh")}
    verdict = judged("section-2.3", power_laws({"linear output": {"hessian_in_ball": falls}, **families}))
    assert verdict.outcome == outcome
    assert bool(verdict.why) == (outcome != "holds")


def test_what_stays_is_looked_at_in_the_wider_half():
    records = power_laws({"linear output": {"hessian_in_ball": -0.5}, "tanh output": {"hessian_in_ball": 0.0}}, noise=0)
    others = {name: {"hessian_in_ball": 0.0} for name in ("sigmoid output", "softplus output")}
    for r in (records := records + power_laws(others, noise=0)):
        if r["case"]["family"] == "tanh output":
            r["result"]["hessian_in_ball"] = max(1.0, 100 / r["case"]["size"] ** 1.2)  # has settled at 64
    assert judged("section-2.3", records).outcome == "holds"


def test_runs_without_a_value_do_not_hold():
    diverged = power_laws({kernel_change._TO_FIRST: {}, kernel_change._TO_ALL: {}}, converged=False, least_in_degree=9)
    for r in diverged:
        r["result"]["kernel_change"] = math.nan
    assert judged("fig-2.2", diverged).outcome == "fails"


def test_a_training_that_does_not_converge_is_not_passed_over():
    laws = {
        "skip connections": {"hessian": -0.5, "kernel_change": -0.5},
        "none": {"hessian": -0.5, "kernel_change": -1.0},
    }
    assert judged("appendix-a.4", power_laws(laws, converged=True)).outcome == "holds"
    verdict = judged("appendix-a.4", power_laws(laws, converged=False))
    assert verdict.outcome == "holds in part"
    assert "36 of 36 trainings did not converge" in verdict.why


@pytest.mark.parametrize(
    ("exponent", "converged", "outcome"),
    [(-0.5, True, "holds"), (-0.55, True, "holds"), (-0.5, False, "holds in part"), (-1.0, True, "holds in part"),
     (-0.2, True, "fails"), (0.3, True, "fails")],
)  # fmt: skip
def test_figure_2_2_needs_the_slope_of_the_figure(exponent, converged, outcome):
    laws = {"kernel_change": exponent, "hessian": -0.5}
    families = {kernel_change._TO_FIRST: laws, kernel_change._TO_ALL: {"kernel_change": 0.3}}
    records = power_laws(families, converged=converged, least_in_degree=1500)
    assert judged("fig-2.2", records).outcome == outcome


def test_figure_2_2_tells_the_bound_from_the_printed_slope():
    families = {
        kernel_change._TO_FIRST: {"kernel_change": -1.0, "hessian": -0.5},
        kernel_change._TO_ALL: {"kernel_change": 0.3},
    }
    verdict = judged("fig-2.2", power_laws(families, converged=True, least_in_degree=1500))
    assert "not: the printed slope" in verdict.why
    assert "bound" not in verdict.why and "Hessian" not in verdict.why
    families[kernel_change._TO_FIRST]["hessian"] = -1.0
    flat = judged("fig-2.2", power_laws(families, converged=True, least_in_degree=1500))
    assert "not: the Hessian's norm" in flat.why


@pytest.mark.parametrize(
    ("change", "ball", "margin", "outcome"),
    [
        (-0.5, 0.3, 1.1, "holds"),
        (-0.5, -0.1, 1.1, "holds in part"),
        (-0.5, 0.3, 0.9, "holds in part"),
        (0.0, -0.1, 0.9, "fails"),
    ],
)
def test_pl_needs_all_three(change, ball, margin, outcome):
    more = {"smallest": 0.4, "smallest_in_ball": ball, "smallest_on_the_way": 0.2, "least_margin": margin}
    records = power_laws({"FCN": {"smallest_change": change}}, converged=True, **more)
    assert judged("equation-2.16", records).outcome == outcome


@pytest.mark.parametrize(
    ("means", "outcome"), [((2.0, 2.0), "holds"), ((2.0, 0.9), "holds in part"), ((0.5, 0.9), "fails")]
)
def test_gradient_norms_need_to_be_above_the_bound(means, outcome):
    records = [
        {"case": {"network": f"net {i}", "seed": seed},
         "result": {"mean": mean, "error": 0.01, "root_mean_square": mean + 0.1, "bound": 1.0}}
        for i, mean in enumerate(means) for seed in range(2)
    ]  # fmt: skip
    verdict = judged("proposition-2.4.4", records)
    assert verdict.outcome == outcome
    assert ("Below the bound" in verdict.why) == (outcome != "holds")


@pytest.mark.parametrize(("wrong", "outcome"), [((0, 0), "holds"), ((0, 3), "holds in part"), ((1, 3), "fails")])
def test_layers_need_to_be_longest_paths(wrong, outcome):
    records = [
        {"case": {"seed": i}, "result": {"wrong": n, "backward_edges": 0, "layers": 5, "vertices": 9}}
        for i, n in enumerate(wrong)
    ]
    assert judged("fig-2.1", records).outcome == outcome


def test_longest_paths_by_matrix_powers():
    dag = DAG.from_edges([(3, 1), (1, 0), (3, 0), (0, 2), (4, 2)])
    assert linearity._longest_paths(dag) == [2, 1, 3, 0, 0]


TINY = {
    "seeds": 1, "sizes": [8, 12, 16], "d": 16, "max_steps": 50, "draws": 5, "vertices": 20, "points": 3, "neurons": 2,
}  # fmt: skip


@pytest.mark.parametrize("artefact", ARTEFACTS, ids=lambda a: a.name)
def test_a_small_run_is_recorded_judged_and_drawn(artefact, tmp_path):
    setting = {name: TINY.get(name, value) for name, value in artefact.scales["quick"].items()}
    results = Results(tmp_path / "results.jsonl", artefact, setting)
    cases = artefact.cases(setting)
    for case in cases:
        torch.manual_seed(case["seed"])
        results.add({"case": case, "result": artefact.run(setting, case, FakeData()), "seconds": 0.0})
    records = [results.get(case) for case in cases]
    again = artefact.run(setting, cases[-1], FakeData())
    assert {k: v for k, v in again.items() if v == v} == {k: v for k, v in records[-1]["result"].items() if v == v}
    verdict = artefact.judge(setting, records)
    assert verdict.measured and "nan" not in verdict.measured
    figure = pytest.importorskip("matplotlib.figure").Figure(figsize=(9, 4.5), dpi=40)
    artefact.draw(records, figure)
    figure.savefig(tmp_path / "panel.png")
    assert figure.axes


def test_every_item_of_chapter_2_is_there():
    expected = {
        "fig-2.1", "fig-2.2", "fig-2.3", "theorem-2.3.6", "corollary-2.3.7", "theorem-2.3.8", "section-2.3",
        "equation-2.16", "proposition-2.4.4", "appendix-a.1", "appendix-a.3", "appendix-a.4", "appendix-a.5",
        "appendix-a.6",
    }  # fmt: skip
    assert set(BY_NAME) == expected
