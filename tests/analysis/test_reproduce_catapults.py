"""Artefacts on catapults: the trace against its definition, made-up losses, verdicts both ways, tiny runs."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from catapult_opt.analysis import ntk as kernels
from catapult_opt.analysis.datasets import DataSet
from catapult_opt.analysis.networks import ntk_mlp
from catapult_opt.analysis.reproduce import ARTEFACTS, catapults, feature_tasks, one_example, raised_rates, sgd
from catapult_opt.analysis.reproduce.artefact import Data
from catapult_opt.analysis.reproduce.real import real_task
from catapult_opt.analysis.reproduce.tracing import Trace, episodes, examples, network, rises, trace
from catapult_opt.analysis.reproduce.training import batches, train
from catapult_opt.analysis.tasks import Split, full_rank, rank

KNOWN = {artefact.name: artefact for artefact in ARTEFACTS}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def small():
    x = torch.randn(12, 5, generator=seeded(1))
    return ntk_mlp(5, 64, 2, generator=seeded()), Split(x, x[:, :1] * x[:, 1:2])


# ----------------------------------------------------------------------------------------------------------- the trace


def test_trace_is_gradient_descent_with_the_kernel_before_every_step():
    model, data = small()
    twin, _ = small()
    found = trace(model, data, [0.3, 0.7, 0.1], top=2)
    optimizer = torch.optim.SGD(twin.parameters(), lr=1.0)
    for t, lr in enumerate((0.3, 0.7, 0.1)):
        kernel = kernels.ntk(twin, data.inputs)
        loss = nn.functional.mse_loss(twin(data.inputs), data.targets)
        assert found.loss[t] == pytest.approx(float(loss.detach()), rel=1e-5)
        assert found.norm[t] == pytest.approx(float(torch.linalg.eigvalsh(kernel)[-1]), rel=1e-4)
        assert found.top[t] + found.rest[t] == pytest.approx(found.loss[t], rel=1e-5)
        assert found.rate[t] == pytest.approx(12 / found.norm[t], rel=1e-5) == found.batch_rate[t]
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, other)
    assert len(found.loss) == 4 and len(found.lr) == 3


def test_batch_rates_are_those_of_the_batch_alone():
    model, data = small()
    found = trace(model, data, [0.0], batch_size=4, generator=seeded(7))
    batch = next(batches(12, 4, seeded(7)))
    expected = kernels.critical_rate(kernels.ntk(small()[0], data.inputs[batch]))
    assert found.batch_rate == [pytest.approx(expected, rel=1e-5)]


def test_trace_of_a_diverging_run_ends_and_says_so():
    found = trace(*small(), [1e4] * 50)
    assert found.diverged
    assert len(found.loss) < 10
    assert len(found.loss) == len(found.norm) == len(found.top) == len(found.lr) + 1
    assert not trace(*small(), [0.1] * 3).diverged


def test_trace_ends_at_the_target():
    found = trace(*small(), [1.0] * 2000, target=0.05)
    assert found.loss[-1] < 0.05 <= found.loss[-2]


def test_episodes_and_rises():
    assert episodes([1.0, 0.5, 2.0, 0.6, 0.4, 0.42, 0.3], 1.1) == [(1, 4)]
    assert episodes([1.0, 2.0, 1.5]) == []
    assert episodes([1.0, 3.0, 0.9, 1.2, 0.8]) == [(0, 2), (2, 4)]
    assert rises([1, 2, 2, 1, 3]) == [0, 3]


def made_up(loss, top, norm, rate=5.0, lr=10.0):
    rest = [a - b for a, b in zip(loss, top, strict=True)]
    n = len(loss)
    return Trace(list(loss), list(top), rest, list(norm), [rate] * (n - 1) + [99.0], [rate] * (n - 1), [lr] * (n - 1))


def test_spike_in_numbers():
    found = catapults.spike(made_up([1.0, 0.9, 3.0, 0.8, 0.7], [0.5, 0.4, 2.5, 0.4, 0.3], [8, 8, 9, 2, 2]))
    assert (found["before"], found["peak"], found["peak_step"], found["returned"]) == (0.9, 3.0, 2, True)
    assert found["top_share"] == pytest.approx(1.0)
    assert found["norm_ratio"] == 0.25
    assert found["rest_rise"] == pytest.approx(0.0)


def test_spikes_of_raised_rates():
    """A spike that comes back with a lower norm, one with a higher, and one that does not come back."""
    loss = [1.0, 2.0, 0.9, 0.8, 1.5, 0.7, 0.6, 0.9, 0.8]
    norm = [8, 9, 4, 4, 5, 6, 3, 3, 2]
    assert raised_rates._spikes(made_up(loss, loss, norm), [3, 6]) == ([True, True, False], [True, False, False])


def test_sgd_run_in_numbers():
    found = made_up([1.0, 2.0, 0.9, 0.8, 0.85, 0.7], [0.5, 1.4, 0.5, 0.4, 0.41, 0.3], [8, 9, 4, 4, 4, 5])
    found.batch_rate = [5.0, 20.0, 20.0, 20.0, 20.0]
    numbers = sgd._in_numbers(found)
    assert (numbers["rises"], numbers["spikes"], numbers["match"]) == (2, 1, 0.5)
    assert numbers["top_share"] == pytest.approx(0.91 / 1.05)
    assert numbers["norm_falls"] == 1.0
    assert numbers["super_critical"] == 1


# ------------------------------------------------------------------------------------------------------------ verdicts


def spike_record(problem="p", **changes):
    good = {
        "outputs": 1,
        "before": 1.0,
        "peak": 3.0,
        "returned": True,
        "top_share": 1.0,
        "rest_rise": 0.1,
        "norm_ratio": 0.5,
    }
    return {"case": {"problem": problem, "seed": 0}, "result": {"eta_crit": 1.0, "outputs": 1, **good, **changes}}


@pytest.mark.parametrize("bad", [{"returned": False}, {"top_share": 0.5}, {"rest_rise": 0.5}, {"norm_ratio": 1.5}])
def test_one_spike_can_hold_and_fail(bad):
    judge = KNOWN["fig-4.3"].judge
    assert judge({}, [spike_record(), spike_record("q")]).outcome == "holds"
    assert judge({}, [spike_record(), spike_record("q", **bad)]).outcome == "holds in part"
    assert judge({}, [spike_record(**bad)]).outcome == "fails"


def test_without_a_spike_nothing_is_decided():
    judge = KNOWN["fig-4.3"].judge
    assert judge({}, [spike_record(peak=1.1, returned=False)]).outcome == "undecided"
    assert judge({}, [spike_record(), spike_record("q", peak=1.1)]).outcome == "holds in part"


def test_the_setting_beside_the_fitted_one_does_not_decide():
    judge = KNOWN["fig-4.3"].judge
    verdict = judge({}, [spike_record(), spike_record("p, no biases", returned=False)])
    assert (verdict.outcome, verdict.why.split(".")[0]) == ("holds", "Beside it, p, no biases: fails")


def test_the_critical_rate_of_several_outputs_is_the_printed_one():
    assert "critical rate 10.0 (times the 10 outputs" in KNOWN["fig-c.5"].judge({}, [spike_record(outputs=10)]).measured


def schedule_record(**changes):
    good = {
        "spikes": [True, True], "norm_falls": [True, True], "norms": [9.0, 5.0, 2.0], "diverged": False,
        "first": 1.0, "final": 0.1, "top_share": 0.95,
        "rest_ratio": 1.0, "alone_diverged": True,
    }  # fmt: skip
    return {"case": {"problem": "p", "seed": 0}, "result": {**good, **changes}}


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("fig-4.4", {"spikes": [True, False]}),
        ("fig-4.4", {"norms": [9.0, 5.0, 10.0]}),
        ("fig-4.4", {"norm_falls": [True, False]}),
        ("fig-4.4", {"diverged": True}),
        ("fig-c.6", {"top_share": 0.7}),
        ("fig-c.6", {"rest_ratio": 1.5}),
        ("fig-c.7", {"alone_diverged": False}),
        ("fig-c.7", {"diverged": True}),
    ],
)
def test_several_spikes_can_hold_and_fail(name, bad):
    judge = KNOWN[name].judge
    assert judge({}, [schedule_record()]).outcome == "holds"
    assert judge({}, [schedule_record(**bad)]).outcome == "fails"


def sgd_record(problem, seed=0, **changes):
    good = {
        "rises": 10, "match": 0.95, "rise_above": 0.99, "above_without_rise": 0.5, "spikes": 5, "doubled": 2,
        "top_share": 0.95, "norm_falls": 0.6, "norm_falls_doubled": 1.0, "norm_change_above": -0.05,
        "norm_change_else": 0.01, "diverged": False, "super_critical": 3, "steps": 50, "raised": 1.0,
    }  # fmt: skip
    return {"case": {"problem": problem, "seed": seed}, "result": {**good, **changes}}


@pytest.mark.parametrize(
    ("name", "bad", "outcome"),
    [
        ("table-4.2", {"match": 0.8}, "fails"),
        ("table-4.2", {"rise_above": 0.8}, "fails"),
        ("table-4.2", {"match": math.nan}, "undecided"),
        ("table-4.2", {"above_without_rise": 1.0}, "fails"),
        ("table-4.2", {"diverged": True}, "fails"),
        ("fig-4.7", {"spikes": 0, "norm_falls_doubled": math.nan, "top_share": 0.1}, "undecided"),
        ("fig-4.7", {"norm_falls_doubled": math.nan}, "undecided"),
        ("fig-4.7", {"top_share": 0.5}, "fails"),
        ("fig-4.7", {"norm_falls_doubled": 0.5}, "fails"),
        ("fig-4.7", {"norm_change_above": 0.05}, "fails"),
        ("fig-4.7", {"norm_change_else": -0.01}, "fails"),
        ("fig-4.7", {"diverged": True}, "fails"),
        ("fig-c.12", {"raised": 0.5}, "fails"),
        ("fig-c.22", {"norm_falls_doubled": 0.5, "norm_change_above": 0.05}, "holds"),
        ("fig-c.22", {"top_share": 0.5}, "fails"),
    ],
)
def test_sgd_can_hold_and_fail(name, bad, outcome):
    artefact = KNOWN[name]
    setting = artefact.scales["full"]
    label = artefact.cases(setting)[0]["problem"]
    assert artefact.judge(setting, [sgd_record(label)]).outcome == "holds"
    assert artefact.judge(setting, [sgd_record(label, **bad)]).outcome == outcome


def test_panels_are_judged_one_by_one():
    setting = KNOWN["fig-4.7"].scales["full"]
    fcn, cnn, *_ = (p["label"] for p in setting["problems"])
    good = [sgd_record(fcn, seed) for seed in range(3)]
    verdict = KNOWN["fig-4.7"].judge(setting, [*good, sgd_record(cnn, diverged=True)])
    assert verdict.outcome == "holds in part"
    assert verdict.why.startswith(f"By panel: {fcn} holds, {cnn} fails.")
    two_of_three = [*good[:2], sgd_record(fcn, 2, top_share=0.5)]
    assert KNOWN["fig-4.7"].judge(setting, two_of_three).outcome == "holds in part"
    one_of_three = [*good[:1], *(sgd_record(fcn, seed, top_share=0.5) for seed in (1, 2))]
    assert KNOWN["fig-4.7"].judge(setting, one_of_three).outcome == "fails"


def test_shallow_network_below_and_above():
    artefact = KNOWN["fig-4.6"]
    below, above = dict.fromkeys(case["problem"] for case in artefact.cases(artefact.scales["full"]))
    calm = sgd_record(below, rises=0, super_critical=0, spikes=0)
    assert artefact.judge({}, [calm, sgd_record(above)]).outcome == "holds"
    assert artefact.judge({}, [sgd_record(below), sgd_record(above)]).outcome == "holds in part"
    assert artefact.judge({}, [sgd_record(below), sgd_record(above, match=0.5)]).outcome == "fails"
    assert artefact.scales["full"]["problems"][0]["rate"] == 0.1  # the printed rate, not a multiple


def test_hessian_and_one_example_can_hold_and_fail():
    def hessian(error, correlation):
        result = {"median_error": error, "correlation": correlation, "measurements": 9}
        return [{"case": {"problem": "p", "seed": 0}, "result": result}]

    judge = KNOWN["fig-c.1"].judge
    outcomes = [judge({}, hessian(*pair)).outcome for pair in ((0.02, 0.99), (0.2, 0.99), (0.02, 0.5))]
    assert outcomes == ["holds", "fails", "fails"]

    def one(agree=1.0, above=3, spikes=2, spikes_above=2):
        result = {"agree": agree, "above": above, "spikes": spikes, "spikes_above": spikes_above, "batch_rises": 3}
        return [{"case": {"seed": 0}, "result": result}]

    judge = KNOWN["fig-4.5"].judge
    assert judge({}, one()).outcome == "holds"
    assert judge({}, one(agree=0.995)).outcome == judge({}, one(spikes=3)).outcome == "holds in part"
    assert judge({}, one(agree=0.9)).outcome == judge({}, one(above=0)).outcome == "fails"


def raised(losses, features_, catapults_=1, task="rank-2"):
    steps = [0, 1, 2, "near zero"][: len(losses)]
    return [
        {
            "case": {"task": task, "increases": i, "seed": seed},
            "result": {
                "test_loss": loss + seed / 1000, "val_loss": loss, "alignment": a, "catapults": catapults_ * n,
                "train_loss": loss,
            },
        }
        for seed in (0, 1)
        for n, (i, loss, a) in enumerate(zip(steps, losses, features_, strict=True))
    ]  # fmt: skip


def test_raised_rates_can_hold_and_fail():
    better, worse = raised([0.9, 0.5, 0.2], [0.5, 0.7, 0.9]), raised([0.5, 0.7, 0.9], [0.5, 0.7, 0.9])
    for name in ("fig-4.8", "fig-c.13", "fig-c.16"):
        assert KNOWN[name].judge({}, better).outcome == "holds"
        assert KNOWN[name].judge({}, worse).outcome == "fails"
    worse[-1]["result"]["train_loss"] = math.nan
    assert "1 of 6 runs diverge" in KNOWN["fig-4.8"].judge({}, worse).why
    near = KNOWN["fig-c.14"].judge
    assert near({}, raised([0.9, 0.5, 0.2, 0.1], [0.5, 0.7, 0.9, 0.95])).outcome == "holds"
    assert near({}, raised([0.9, 0.5, 0.2, 0.3], [0.5, 0.7, 0.9, 0.95])).outcome == "fails"
    flat = KNOWN["fig-c.17"].judge
    assert flat({}, raised([0.5, 0.5, 0.5], [0.5, 0.5, 0.5], task="full-rank")).outcome == "holds"
    # The first catapult does not count, further ones do; test loss and alignment each by itself.
    assert flat({}, raised([0.5, 0.3, 0.3], [0.5, 0.7, 0.7], task="full-rank")).outcome == "holds"
    worse = flat({}, raised([0.5, 0.5, 0.3], [0.5, 0.5, 0.5], task="full-rank"))
    assert (worse.outcome, "alignment by 5 %" in worse.why) == ("fails", False)
    assert flat({}, raised([0.5, 0.5, 0.5], [0.5, 0.5, 0.7], task="full-rank")).outcome == "fails"
    assert flat({}, raised([0.5, 0.5, 0.5], [0.5, 0.5, 0.5], 0, task="full-rank")).outcome == "undecided"


def optimizers(pairs, train_loss=0.01):
    names = ["GD", "SGD", "Adam", "RMSprop"]
    return [
        {
            "case": {"task": "rank-2", "optimizer": name, "seed": 0},
            "result": {"alignment": a, "test_loss": loss, "train_loss": train_loss},
        }
        for name, (a, loss) in zip(names, pairs, strict=True)
    ]


def test_optimizers_can_hold_and_fail():
    good = optimizers([(0.2, 0.9), (0.4, 0.7), (0.6, 0.4), (0.9, 0.2)])
    bad = optimizers([(0.2, 0.2), (0.4, 0.7), (0.6, 0.4), (0.9, 0.9)])
    assert KNOWN["fig-4.11"].judge({}, good).outcome == "holds"
    assert KNOWN["fig-4.11"].judge({}, bad).outcome == "fails"
    # In order, but far from a line.
    assert KNOWN["fig-4.11"].judge({}, optimizers([(0.1, 9.0), (0.2, 0.3), (0.8, 0.2), (1.0, 0.1)])).outcome == "fails"
    assert KNOWN["table-c.1"].judge({}, good).outcome == "holds"
    assert KNOWN["table-c.1"].judge({}, optimizers([(0.2, 0.9)] * 4, math.nan)).outcome == "fails"


def test_small_rates_can_hold_and_fail():
    def records(at_small):
        large = [(2, 5, 0.2), (2, 500, 0.9)]
        return [
            {"case": {"task": "rank-2", "below_critical": b, "batch_size": s, "seed": 0}, "result": {"test_loss": v}}
            for b, s, v in [*large, *((40, *pair) for pair in at_small)]
        ]

    judge = KNOWN["fig-4.10"].judge
    assert judge({}, records([(5, 0.8), (500, 0.9)])).outcome == "holds"
    assert judge({}, records([(5, 0.3), (500, 0.9)])).outcome == "fails"
    turned = [{**r, "result": {"test_loss": 1 - r["result"]["test_loss"]}} for r in records([(5, 0.8), (500, 0.9)])]
    assert judge({}, turned).outcome == "fails"


def test_equal_validation_losses_at_the_rate_of_a_tenth():
    def records(a, b):
        return [
            {"case": {"task": "rank-2", "batch_size": s, "seed": 0}, "result": {"val_loss": v}}
            for s, v in ((5, a), (9, b))
        ]

    judge = KNOWN["fig-c.23"].judge
    assert judge({}, records(0.70, 0.75)).outcome == "holds"
    assert judge({}, records(0.5, 0.75)).outcome == "fails"


# ---------------------------------------------------------------------------------------------------------- problems


class Pictures(Data):
    def load(self, name, classes=None, *, limit=None):
        return DataSet(name, torch.rand(40, 3, 8, 8, generator=seeded(3)), torch.arange(40) % 2, (0, 1))


def test_pixels_are_averaged_first_and_then_standardised_or_put_into_range():
    problem = {"dataset": "cifar10", "classes": [0, 1], "image_size": 2}
    (plain,) = examples(problem, 30, 0, Pictures())
    assert float(plain.inputs.square().mean()) == pytest.approx(1, abs=0.02)  # q, which critical rates go by
    (range_,) = examples({**problem, "pixels": "[-1, 1]"}, 30, 0, Pictures())
    (whole,) = examples({**problem, "pixels": "[-1, 1]", "image_size": 8}, 30, 0, Pictures())
    torch.testing.assert_close(range_.inputs, torch.nn.functional.avg_pool2d(whole.inputs, 4))
    assert -1 <= float(whole.inputs.min()) < -0.9 < 0.9 < float(whole.inputs.max()) <= 1


def test_a_problem_says_which_biases():
    problem = {"dataset": "cifar10", "classes": [0, 1], "image_size": 2, "network": "fcn-3", "width": 8}
    (train_,) = examples(problem, 30, 0, Pictures())
    for bias, names in ((False, 0), ("hidden", 2), (True, 3)):
        found = network({**problem, "bias": bias}, train_, 0)
        assert sum(name.endswith("bias") for name, _ in found.named_parameters()) == names


# -------------------------------------------------------------------------------------------------------- real runs


def test_one_example_above_critical_makes_the_spikes():
    """Figure 4.5, small: the one doubled example has a quarter of the others' critical rate."""
    setting = {"n": 60, "d": 60, "width": 1024, "steps": 150, "between": 0.5}
    result = one_example._run_one(setting, {"seed": 1}, Data())
    assert result["others"] / result["special"] == pytest.approx(4, rel=0.3)
    assert result["special"] < result["lr"] < result["others"]
    assert result["above"] > 0
    assert result["agree"] > 0.9


def test_gradient_descent_has_a_catapult_on_the_synthetic_task():
    problem = {"label": "p", "network": "fcn-2", "dataset": "rank-2", "width": 512, "steps": 60, "top": 5}
    setting = {"n": 64, "problems": [{**problem, "multiple": 1.5}]}
    result = catapults._run_spike(setting, {"problem": "p", "seed": 0}, Data())
    assert result["lr"] == 1.5 * result["eta_crit"]
    assert result["peak"] > 10 * result["before"]
    assert result["returned"]
    assert result["top_share"] > 0.9
    assert result["norm_ratio"] < 0.5


def test_several_outputs_have_a_kernel_of_all_of_them():
    x = torch.randn(6, 5, generator=seeded(1))
    model = ntk_mlp(5, 32, 2, 3, generator=seeded())
    found = trace(model, Split(x, torch.eye(3).repeat(2, 1)), [0.1, 0.1], top=3, batch_size=2, generator=seeded(2))
    kernel = kernels.ntk(model, x)
    assert kernel.shape == (18, 18)
    assert found.rate[-1] == pytest.approx(6 / float(torch.linalg.eigvalsh(kernel)[-1]), rel=1e-4)
    assert found.top[-1] + found.rest[-1] == pytest.approx(found.loss[-1], rel=1e-5)
    assert all(math.isfinite(rate) and rate > 0 for rate in found.batch_rate)


def test_training_takes_everything_at_the_best_validation_loss():
    task = rank(2, 60, 200, 300, d=10)
    model = ntk_mlp(10, 64, 2, generator=seeded())
    twin = ntk_mlp(10, 64, 2, generator=seeded())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    found = train(model, task, optimizer, batches(60, 60, seeded()), steps=30, evaluate_every=5, lrs=[0.5] * 30)
    curves = found["curves"]
    assert found["val_loss"] == min(curves["val_loss"])
    assert found["best_step"] == curves["val_step"][curves["val_loss"].index(found["val_loss"])]
    other = torch.optim.SGD(twin.parameters(), lr=0.5)
    for _ in range(found["best_step"]):
        other.zero_grad()
        nn.functional.mse_loss(twin(task.train.inputs), task.train.targets).backward()
        other.step()
    test_loss = float(nn.functional.mse_loss(twin(task.test.inputs), task.test.targets).detach())
    assert found["test_loss"] == pytest.approx(test_loss, rel=1e-4)
    assert len(curves["agop_block"]) == 10


def test_quick_settings_of_the_schedules_run():
    for name in ("fig-c.16", "fig-c.17"):
        artefact = KNOWN[name]
        setting = {**copy.deepcopy(artefact.scales["quick"]), "n_eval": 50}
        for spec in setting["tasks"].values():
            spec["steps"], spec["width"] = 3, 16
        result = artefact.run(setting, artefact.cases(setting)[0], Data())
        assert "test_error" not in result
        assert math.isfinite(result["test_loss"])
    assert isinstance(feature_tasks.task_and_model(setting, "full-rank", 0, Data())[0], type(full_rank(1, 1, 1)))


def test_real_tasks_have_two_classes_and_the_features_of_a_reference(tmp_path):
    # Two classes that differ in the brightness of the left half: the reference must look at it.
    digits = np.repeat([0, 2], 60)
    ink = np.random.default_rng(0).integers(-100, 100, (120, 16, 16))
    ink[:, :, :8] += (400 * (digits - 1))[:, None, None]
    np.savez(tmp_path / "usps.npz", x=ink.astype(np.int16), y=digits)
    task = real_task("usps-2", {"n": 50, "n_eval": 30, "image_size": 8, "reference_steps": 60}, 0, Data(tmp_path))
    assert task.train.inputs.shape == (50, 64)
    assert set(task.test.targets.flatten().tolist()) == {-1.0, 1.0}
    assert float((task.target(task.test.inputs).sign() == task.test.targets).float().mean()) > 0.9
    diagonal = task.egop.diag().reshape(8, 8)
    assert float(diagonal[:, :4].sum()) > 1.3 * float(diagonal[:, 4:].sum())
    x = task.train.inputs.clone().requires_grad_()
    gradients = torch.autograd.grad(task.target(x).sum(), x)[0]
    torch.testing.assert_close(task.egop, gradients.T @ gradients / 50)
    model = ntk_mlp(64, 32, 2, generator=seeded())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    found = train(model, task, optimizer, batches(50, 50, seeded()), steps=20, evaluate_every=10)
    assert 0 <= found["test_error"] <= 0.5
