"""Promise: averaged() puts the mean of the weights of calm steps into the model, and takes it out to the bit.

Oracle: the mean recomputed from the weights and phases of every step; BatchNorm statistics recomputed over the data;
copies of everything from before.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from training import DRIVING, QUICK, Training, net, product

from catapult_opt import CatapultPolicy

every_driver = pytest.mark.parametrize("face", DRIVING)
BASE = {"base": lambda params: torch.optim.SGD(params, lr=1.0)}


def started(face: str, steps: int = 12, **more: Any) -> Training:
    training = Training(face, net(6, 16, 1, norm=True), product(), **(BASE if face == "CatapultLR" else {}), **more)
    for _ in range(steps):
        training.step()
    return training


def everything(training: Training) -> list[Any]:
    """All that a user has, by value."""
    model, optimizer = training.model, training.optimizer
    tensors = [t.detach().clone() for t in model.state_dict().values()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    state = [
        {k: v.clone() if isinstance(v, Tensor) else v for k, v in entries.items()}
        for entries in optimizer.state.values()
    ]
    return [tensors, grads, state, [m.training for m in model.modules()], torch.get_rng_state()]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@every_driver
@pytest.mark.parametrize("horizon", [4, 50])
def test_it_is_the_mean_over_calm_steps_begun_anew_after_a_catapult(face: str, horizon: int) -> None:
    policy = replace(QUICK, horizon=horizon)
    training = started(face, steps=0, policy=policy)
    mean, calm, phases = torch.zeros(0), 0, [""]
    while len(phases) < 300 and (calm < 6 or "back" not in phases):
        before = weights(training.model)
        training.step()
        phases.append(training.watch.phase)
        calm = calm + 1 if phases[-1] == "calm" else 0
        if calm == 1:
            mean = before
        elif calm:
            mean = mean + (before - mean) / min(calm, horizon)
    assert calm == 6 and "back" in phases, "there was a catapult, and calm steps after it"
    with training.watch.averaged():
        assert torch.allclose(weights(training.model), mean, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(weights(training.model), mean, rtol=1e-3)


@every_driver
def test_all_comes_back_to_the_bit(face: str) -> None:
    training = started(face)
    before = everything(training)
    with training.watch.averaged():
        assert not same(everything(training)[0], before[0])
        training.model.eval()
        with torch.no_grad():
            training.model(training.x)
        training.model.train()
    assert same(everything(training), before)
    twin = started(face)
    assert [training.step() for _ in range(5)] == [twin.step() for _ in range(5)]


@every_driver
def test_after_an_exception_and_nested(face: str) -> None:
    training = started(face)
    before = everything(training)
    with pytest.raises(KeyError), training.watch.averaged():
        raise KeyError
    assert same(everything(training), before)
    with training.watch.averaged():
        inside = everything(training)
        with training.watch.averaged():
            assert same(everything(training)[0], inside[0])
        assert same(everything(training)[0], inside[0]), "the inner one leaves the averaged weights in place"
    assert same(everything(training), before)


@every_driver
def test_training_inside_is_refused(face: str) -> None:
    training = started(face)
    with training.watch.averaged():
        inside = everything(training)
        training.backward()
        with pytest.raises(RuntimeError, match=r"step\(\) inside averaged\(\): leave it first"):
            training.optimizer.step()
        with pytest.raises(RuntimeError, match=r"use_averaged\(\) inside averaged\(\)"):
            training.watch.use_averaged()
        assert same(everything(training)[0][:2], inside[0][:2])
    training.step()


@every_driver
def test_before_the_first_step_the_weights_are_their_own_average(face: str) -> None:
    training = started(face, steps=0)
    before = weights(training.model)
    with training.watch.averaged():
        assert torch.equal(weights(training.model), before)


@every_driver
def test_for_good_at_the_end(face: str) -> None:
    training = started(face)
    with training.watch.averaged():
        expected = [t.clone() for t in training.model.state_dict().values()]
    training.watch.use_averaged()
    assert same(list(training.model.state_dict().values()), expected)
    assert math.isfinite(training.step())


@every_driver
def test_evaluation_under_batchnorm_is_right(face: str) -> None:
    """Their running statistics are averaged with the weights: as good as those recomputed over all the data."""
    x, y = product(400)
    batches = list(zip(x.split(40), y.split(40), strict=True))
    training = Training(
        face, net(6, 16, 1, norm=True), batches, **(BASE if face == "CatapultLR" else {}), policy=CatapultPolicy()
    )
    for _ in range(150):
        training.step()
    with training.watch.averaged(), torch.no_grad():
        model = copy.deepcopy(training.model).eval()
        found = nn.functional.mse_loss(model(x), y).item()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.momentum = None  # the plain mean over all batches
        update_bn([b for b, _ in batches], model)
        recomputed = nn.functional.mse_loss(model.eval()(x), y).item()
        constant = y.var().item()
    assert recomputed < 0.7 * constant, "something was learned"
    assert found == pytest.approx(recomputed, rel=0.1)


@every_driver
def test_a_compiled_model_sees_the_averaged_weights_and_is_not_compiled_again(face: str) -> None:
    compilations = []

    def backend(module: Any, inputs: Any) -> Any:
        compilations.append(1)
        return module.forward

    inner = net(6, 16, 1)
    model = torch.compile(inner, backend=backend)
    training = Training(face, model, product(), **(BASE if face == "CatapultLR" else {}))
    for _ in range(8):
        training.step()
    with torch.no_grad():
        outside = model(training.x)
        known = len(compilations)
        with training.watch.averaged():
            assert torch.equal(model(training.x), inner(training.x))
            assert not torch.equal(model(training.x), outside)
        assert torch.equal(model(training.x), outside)
    assert len(compilations) == known


@every_driver
def test_inside_an_autocast_the_cached_weights_are_not_used(face: str) -> None:
    training = started(face)
    training.model.eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        raw = training.model(training.x).detach()  # with gradients, so that the cast weights are cached
        with training.watch.averaged():
            averaged = training.model(training.x).detach()
            expected = copy.deepcopy(training.model)(training.x).detach()
        again = training.model(training.x).detach()
    assert torch.equal(averaged, expected) and not torch.equal(averaged, raw)
    assert torch.equal(again, raw)


def test_a_checkpoint_made_inside_holds_the_averaged_weights_and_goes_on() -> None:
    training = started("CatapultSGD")
    with training.watch.averaged():
        saved = copy.deepcopy((training.model.state_dict(), training.optimizer.state_dict()))
    resumed = started("CatapultSGD", steps=0)
    resumed.model.load_state_dict(saved[0])
    resumed.optimizer.load_state_dict(saved[1])
    with resumed.watch.averaged(), training.watch.averaged():
        assert same(list(resumed.model.state_dict().values()), list(training.model.state_dict().values()))
    assert all(math.isfinite(resumed.step()) for _ in range(5))


def test_frozen_and_later_unfrozen_parameters() -> None:
    training = started("CatapultSGD", steps=0)
    training.model[0].requires_grad_(False)
    for _ in range(5):
        training.step()
    frozen = training.model[0].weight.detach().clone()
    with training.watch.averaged():
        assert torch.equal(training.model[0].weight, frozen)
    training.model[0].requires_grad_(True)
    with training.watch.averaged():
        assert torch.equal(training.model[0].weight, frozen), "it has no average yet"
    for _ in range(5):
        training.step()
    assert not torch.equal(training.model[0].weight, frozen)
