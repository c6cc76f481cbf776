"""Promise: what a step measures is the loss that its gradients belong to, however the loop puts it together.

Oracles: one whole batch in one forward pass; the analytic curvature of the same sum of losses.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from training import BASES, Training, net, noise

from catapult_opt import CatapultPolicy, critical_lr

STEPS = 4
N = 24
MOVING = CatapultPolicy(start=0.5)  # far enough in a few steps for the critical rate to change


class Run(Training):
    """In float64, so that sums in another order agree to many digits."""

    def __init__(self, criterion: Any = None, model: nn.Module | None = None, **settings: Any) -> None:
        x, y = noise(N, 4, 3, dtype=torch.float64)
        y = y.argmax(1) if isinstance(criterion, nn.CrossEntropyLoss) else y
        model = net(4, 8, 3).double() if model is None else model
        super().__init__("CatapultSGD", model, (x, y), criterion=criterion, policy=MOVING, every=1, **settings)

    def seen(self) -> Any:
        return self.weights(), self.watch.last.eta_crit, self.rates()[0], self.watch.phase


def compare(step: Callable[[Run], None], rtol: float = 1e-5, **settings: Any) -> None:
    """Some steps of a loop against as many of the plain one."""
    run, expected = Run(**settings), Run(**settings)
    for _ in range(STEPS):
        step(run)
        expected.step()
        got, want = run.seen(), expected.seen()
        torch.testing.assert_close(got[0], want[0], rtol=rtol, atol=rtol)
        assert got[1:3] == pytest.approx(want[1:3], rel=10 * rtol)
        assert got[3] == want[3]


# --------------------------------------------------------------------------------------------------------- accumulation

CRITERIA = {"mse": nn.MSELoss, "cross-entropy": nn.CrossEntropyLoss, "half-sum": lambda: HalfSum()}


class HalfSum(nn.Module):
    """User code: not a module of torch, and not symmetric in its reduction."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().sum() / 2 / len(targets)


@pytest.mark.parametrize("name", list(CRITERIA))
@pytest.mark.parametrize("k", [2, 3, 4])
def test_micro_batches_are_one_batch(name: str, k: int) -> None:
    def step(run: Run) -> None:
        run.optimizer.zero_grad()
        for x, y in zip(run.x.chunk(k), run.y.chunk(k), strict=True):
            (run.loss(x, y) / k).backward()
        run.optimizer.step()

    compare(step, criterion=CRITERIA[name]())


def test_micro_batches_of_different_size_with_their_share() -> None:
    def step(run: Run) -> None:
        run.optimizer.zero_grad()
        for part in (slice(0, 4), slice(4, 5), slice(5, N)):
            x, y = run.x[part], run.y[part]
            (run.loss(x, y) * (len(x) / N)).backward()
        run.optimizer.step()

    compare(step)


def test_micro_batches_of_a_sum_need_no_division() -> None:
    def step(run: Run) -> None:
        run.optimizer.zero_grad()
        for x, y in zip(run.x.chunk(3), run.y.chunk(3), strict=True):
            run.loss(x, y).backward()
        run.optimizer.step()

    compare(step, criterion=nn.MSELoss(reduction="sum"))


def test_all_forwards_before_one_backward() -> None:
    def step(run: Run) -> None:
        run.optimizer.zero_grad()
        losses = [run.loss(x, y) for x, y in zip(run.x.chunk(3), run.y.chunk(3), strict=True)]
        (sum(losses) / 3).backward()
        run.optimizer.step()

    compare(step)


def test_all_outputs_before_one_criterion_call() -> None:
    def step(run: Run) -> None:
        run.optimizer.zero_grad()
        outputs = torch.cat([run.model(x) for x in run.x.chunk(3)])
        run.criterion(outputs, run.y).backward()
        run.optimizer.step()

    compare(step)


@pytest.mark.parametrize("name", ["mse", "cross-entropy"])
def test_a_weighted_loss_has_weighted_curvature(name: str) -> None:
    """A factor on the loss divides the critical rate, and so leaves the training unchanged."""

    def step(run: Run) -> None:
        run.optimizer.zero_grad()
        (7 * run.loss()).backward()
        run.optimizer.step()

    run, expected = Run(CRITERIA[name]()), Run(CRITERIA[name]())
    for _ in range(STEPS):
        step(run)
        expected.step()
        assert 7 * run.optimizer.last.eta_crit == pytest.approx(expected.optimizer.last.eta_crit, rel=1e-6)
        torch.testing.assert_close(run.weights(), expected.weights(), rtol=1e-6, atol=1e-6)


def test_zero_grad_between_forward_and_backward() -> None:
    def step(run: Run) -> None:
        loss = run.loss()
        run.optimizer.zero_grad()
        loss.backward()
        run.optimizer.step()

    compare(step, rtol=0)


@pytest.mark.parametrize("reset", ["optimizer", "model", "by hand", "to zero"])
def test_every_way_of_resetting_gradients(reset: str) -> None:
    def step(run: Run) -> None:
        run.loss().backward()
        run.optimizer.step()
        if reset == "optimizer":
            run.optimizer.zero_grad()
        elif reset == "model":
            run.model.zero_grad()
        elif reset == "to zero":
            run.optimizer.zero_grad(set_to_none=False)
        for p in run.model.parameters():
            if reset == "by hand":
                p.grad = None

    compare(step, rtol=0)


# ------------------------------------------------------------------------------------------------------- skipped steps


@pytest.mark.parametrize("reset", ["optimizer", "model", "by hand"])
@pytest.mark.parametrize("when", ["before the forward", "before the backward"])
def test_a_skipped_step_leaves_no_trace(reset: str, when: str) -> None:
    """As GradScaler skips one: backward, no step, gradients reset. Its batch must not count in the next step."""

    def reset_gradients(run: Run) -> None:
        if reset == "optimizer":
            run.optimizer.zero_grad()
        elif reset == "model":
            run.model.zero_grad()
        for p in run.model.parameters():
            p.grad = None

    def step(run: Run) -> None:
        (run.loss(5 * run.x, -run.y) * 100).backward()
        if when == "before the forward":
            reset_gradients(run)
        loss = run.loss()
        if when == "before the backward":
            reset_gradients(run)
        loss.backward()
        run.optimizer.step()
        reset_gradients(run)

    compare(step, rtol=0)


def test_gradients_not_reset_belong_to_the_next_step() -> None:
    """The other side of it: without a reset the skipped batch's gradients are in the step, so its loss is."""

    def step(run: Run) -> None:
        run.optimizer.zero_grad()
        (run.loss(run.x[:8], run.y[:8]) / 3).backward()
        # here a loop decides not to step yet
        (run.loss(run.x[8:], run.y[8:]) * 2 / 3).backward()
        run.optimizer.step()

    compare(step)


def test_grad_scaler_skips_and_goes_on() -> None:
    """With torch.amp.GradScaler itself, whose scale is 1 here: one step in three overflows."""
    run, expected = Run(), Run()
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=10**6, backoff_factor=1.0 - 1e-9)
    for i in range(9):
        run.optimizer.zero_grad()
        loss = run.loss()
        if i % 3 == 1:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        scaler.step(run.optimizer)
        scaler.update()
        if i % 3 != 1:
            expected.step()
    torch.testing.assert_close(run.weights(), expected.weights(), rtol=1e-5, atol=1e-5)
    assert run.optimizer.last.eta_crit == pytest.approx(expected.optimizer.last.eta_crit, rel=1e-4)


def test_grad_scaler_with_a_scale() -> None:
    """Gradients are unscaled before the step: the critical rate is the unscaled loss's, also as the scale grows."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    run, expected = Run(grad_scaler=scaler), Run()
    for i in range(STEPS):
        run.optimizer.zero_grad()
        scaler.scale(run.loss()).backward()
        if i % 2:
            scaler.unscale_(run.optimizer)
            nn.utils.clip_grad_norm_(run.model.parameters(), 1e6)
        scaler.step(run.optimizer)
        scaler.update()
        expected.step()
        assert run.optimizer.last.eta_crit == pytest.approx(expected.optimizer.last.eta_crit, rel=1e-4)
        torch.testing.assert_close(run.weights(), expected.weights(), rtol=1e-5, atol=1e-5)
    assert scaler.get_scale() > 2.0**10


@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler_unannounced_is_noticed(unscale: bool) -> None:
    """A critical rate too small by 2^16 would train nothing, silently."""
    run = Run()
    before = run.weights()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(run.loss()).backward()
    if unscale:
        scaler.unscale_(run.optimizer)
    with pytest.raises(RuntimeError, match="grad_scaler=scaler"):
        scaler.step(run.optimizer)
    assert torch.equal(run.weights(), before)


# ----------------------------------------------------------------------------------------------------------- validation


def with_grad(run: Run) -> None:
    run.loss(2 * run.x, run.y)


def without_grad(run: Run) -> None:
    with torch.no_grad():
        run.loss(2 * run.x, run.y)


def in_inference_mode(run: Run) -> None:
    with torch.inference_mode():
        run.loss(2 * run.x, run.y)


def predictions_only(run: Run) -> None:
    run.model(2 * run.x)


def in_eval_mode(run: Run) -> None:
    run.model.eval()
    with_grad(run)
    run.model.train()


def criterion_alone(run: Run) -> None:
    run.criterion(torch.zeros_like(run.y), run.y)


def gradient_of_the_input(run: Run) -> None:
    """Saliency maps: a derivative that leaves no .grad on the parameters."""
    x = run.x.clone().requires_grad_()
    torch.autograd.grad(run.model(x).sum(), x)


VALIDATIONS = [
    with_grad,
    without_grad,
    in_inference_mode,
    predictions_only,
    in_eval_mode,
    criterion_alone,
    gradient_of_the_input,
]


@pytest.mark.parametrize("validate", VALIDATIONS, ids=lambda f: f.__name__)
def test_validation_between_steps_does_not_count(validate: Callable[[Run], None]) -> None:
    def step(run: Run) -> None:
        validate(run)
        run.optimizer.zero_grad()
        loss = run.loss()
        validate(run)
        loss.backward()
        validate(run)
        run.optimizer.step()
        validate(run)

    compare(step, rtol=0)


def test_validation_with_gradients_enabled_keeps_no_graph() -> None:
    """Each loss is free as soon as the loop drops it, as without the optimizer: an epoch of them would fill memory."""
    run = Run()
    run.step()
    alive = []
    for _ in range(3):
        x = (2 * run.x).requires_grad_()
        inner = run.model[0](x)
        alive.append(weakref.ref(inner))
        del inner
        loss = run.criterion(run.model(x), run.y)
        alive.append(weakref.ref(loss))
        outputs = loss.grad_fn
        del loss, outputs
    gc.collect()
    assert [ref() for ref in alive] == [None] * 6


# ---------------------------------------------------------------------------------------- several calls of everything


class TwoHeads(nn.Module):
    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = self.trunk(x)
        return out[:, :1], out[:, 1:]


@pytest.mark.parametrize("backward", ["together", "apart"])
def test_several_criterion_calls_are_summed(backward: str) -> None:
    """Two heads, two calls, weights 1/3 and 2/3: the mean over both is the MSE over all."""
    run, expected = Run(model=TwoHeads(net(4, 8, 3).double())), Run()
    for _ in range(STEPS):
        run.optimizer.zero_grad()
        first, second = run.model(run.x)
        losses = run.criterion(first, run.y[:, :1]) / 3, run.criterion(second, run.y[:, 1:]) * 2 / 3
        if backward == "together":
            (losses[0] + losses[1]).backward()
        else:
            losses[0].backward(retain_graph=True)
            losses[1].backward()
        run.optimizer.step()
        expected.step()
        assert run.optimizer.last.eta_crit == pytest.approx(expected.optimizer.last.eta_crit, rel=1e-5)
        torch.testing.assert_close(run.weights(), expected.weights(), rtol=1e-5, atol=1e-5)


def test_a_criterion_call_that_is_not_part_of_the_loss_does_not_count() -> None:
    """An auxiliary number for the log, never back-propagated."""

    def step(run: Run) -> None:
        run.optimizer.zero_grad()
        outputs = run.model(run.x)
        loss = run.criterion(outputs, run.y)
        shown = run.criterion(outputs, 3 * run.y)
        loss.backward()
        run.optimizer.step()
        assert shown.item() > 0

    compare(step, rtol=0)


def test_a_model_called_twice_in_a_step() -> None:
    """Siamese: the criterion sees the difference of two passes. Oracle: one module that makes both."""

    class Difference(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.inner(a) - self.inner(b)

    run = Run()
    for _ in range(STEPS):
        truth = critical_lr(Difference(run.model), nn.MSELoss(), (run.x, run.x.flip(1)), run.y).eta_crit
        run.optimizer.zero_grad()
        run.criterion(run.model(run.x) - run.model(run.x.flip(1)), run.y).backward()
        run.optimizer.step()
        assert run.optimizer.last.eta_crit == pytest.approx(truth, rel=0.1)


def test_user_code_between_model_and_criterion() -> None:
    """Oracle: the same code inside the model."""

    class Inside(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(self.inner(x)).squeeze(-1) * 2

    run = Run()
    for _ in range(STEPS):
        truth = critical_lr(Inside(run.model), nn.MSELoss(), run.x, run.y).eta_crit
        run.optimizer.zero_grad()
        run.criterion(torch.sin(run.model(run.x)).squeeze(-1) * 2, run.y).backward()
        run.optimizer.step()
        assert run.optimizer.last.eta_crit == pytest.approx(truth, rel=0.1)


def test_a_gradient_penalty_leaves_the_loss_its_weight() -> None:
    """autograd.grad runs through the loss before backward does; it leaves no .grad."""

    def step(run: Run) -> None:
        run.optimizer.zero_grad()
        loss = run.loss()
        grads = torch.autograd.grad(5 * loss, list(run.model.parameters()), create_graph=True)
        assert len(grads) == 4
        loss.backward()
        run.optimizer.step()

    compare(step, rtol=0)


def test_a_checkpointed_model() -> None:
    """Activation checkpointing runs the model again in backward: not another forward pass of the loop."""

    def step(run: Run) -> None:
        run.optimizer.zero_grad()
        outputs = checkpoint(run.model, run.x, use_reentrant=False)
        run.criterion(outputs, run.y).backward()
        run.optimizer.step()

    compare(step)


# ------------------------------------------------------------------------------------------------------------- closures


def by_position(run: Training) -> Any:
    return run.optimizer.step(run.backward)


def by_keyword(run: Training) -> Any:
    return run.optimizer.step(closure=run.backward)


def under_no_grad(run: Training) -> Any:
    with torch.no_grad():
        return run.optimizer.step(run.backward)


@pytest.mark.parametrize("way", [by_position, by_keyword, under_no_grad], ids=lambda f: f.__name__)
def test_closures(way: Callable[[Run], Any]) -> None:
    def step(run: Run) -> None:
        expected = run.loss().item()
        run.optimizer.zero_grad()
        assert way(run).item() == expected

    compare(step, rtol=0)


@pytest.mark.parametrize("way", [by_position, by_keyword], ids=lambda f: f.__name__)
def test_the_monitor_sees_steps_with_a_closure(way: Callable[[Run], Any]) -> None:
    data = noise(N, 4, 3, dtype=torch.float64)
    run = Training("CatapultMonitor", net(4, 8, 3).double(), data, base=BASES["CatapultMonitor"], every=1)
    bare = Training("", net(4, 8, 3).double(), data, base=BASES["CatapultMonitor"])
    for i in range(STEPS):
        truth = critical_lr(run.model, nn.MSELoss(), run.x, run.y).lambda_max
        loss = way(run)
        assert torch.equal(loss, way(bare))
        assert run.watch.measured_steps == i + 1
        assert run.watch.last.lambda_max == pytest.approx(truth, rel=0.1)
    assert torch.equal(run.weights(), bare.weights())


# ----------------------------------------------------------------------------------------- parameters that come and go


def test_layers_unfrozen_and_groups_added_along_the_way() -> None:
    """Oracle: the critical rate over the parameters that are trainable at the time."""
    model = net(4, 8, 3).double()
    first, last = model[0].requires_grad_(False), model[2]
    run = Run(model=model, params=[*last.parameters(), first.weight])

    def check() -> None:
        for _ in range(3):
            truth = critical_lr(run.model, nn.MSELoss(), run.x, run.y).eta_crit
            run.step()
            assert run.optimizer.last.eta_crit == pytest.approx(truth, rel=0.1)

    check()
    first.weight.requires_grad_(True)
    check()
    first.bias.requires_grad_(True)
    run.optimizer.add_param_group({"params": first.bias})
    check()
    last.weight.requires_grad_(False)
    last.weight.grad = None
    check()
    assert {float(g["effective_lr"]) for g in run.optimizer.param_groups} == {run.seen()[2]}


def test_a_functional_criterion_is_called_through_the_optimizer() -> None:
    run, expected = Run(F.mse_loss), Run()
    for _ in range(STEPS):
        run.optimizer.zero_grad()
        run.optimizer.criterion(run.model(run.x), run.y).backward()
        run.optimizer.step()
        expected.step()
        assert torch.equal(run.weights(), expected.weights())
