"""Promise: a step costs what it must, and leaves nothing behind.

``test_forwards_*`` counts passes through the model; ``test_hooks_*`` where the hooks go; ``test_memory_*`` thousands of
steps. Oracle: counters in the model itself.
"""

from __future__ import annotations

import gc
import sys
import weakref
from typing import Any

import pytest
from torch import Tensor, nn
from training import Training, net, noise

from catapult_opt import CatapultPolicy, CatapultSGD
from catapult_opt.capture import Capture
from catapult_opt.link import LossCall
from catapult_opt.replay import ForwardCall


class Counted(nn.Module):
    """Counts its forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net(3, 8, 1)
        self.forwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        return self.inner(x)


class CountedLoss(nn.MSELoss):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(outputs, targets)


class Run(Training):
    """Four batches in turn, each pass counted."""

    def __init__(self, face: str = "CatapultSGD", **settings: Any) -> None:
        batches = [noise(8, 3, seed=seed) for seed in range(4)]
        super().__init__(face, Counted(), batches, criterion=CountedLoss(), **settings)

    def cost(self) -> tuple[int, int, int]:
        """Forward passes, criterion calls and curvature products of one step; -1 products: not measured."""
        forwards, calls, last = self.model.forwards, self.criterion.calls, self.watch.last
        self.step()
        matvecs = -1 if self.watch.last is last else self.watch.last.matvecs
        return self.model.forwards - forwards, self.criterion.calls - calls, matvecs


def objects() -> dict[str, int]:
    gc.collect()
    kinds = [Tensor, LossCall, ForwardCall, Capture]
    counts = {kind.__name__: 0 for kind in kinds}
    for thing in gc.get_objects():
        for kind in kinds:
            if type(thing) is kind or (kind is Tensor and type(thing) is nn.Parameter):
                counts[kind.__name__] += 1
    return counts


both = pytest.mark.parametrize("face", ["CatapultSGD", "CatapultMonitor"])


# ------------------------------------------------------------------------------------------------------------- forwards


@both
@pytest.mark.parametrize("every", [1, 3, 10])
def test_forwards_are_one_a_product(face: str, every: int) -> None:
    """After the first measurement (which also finds the size of its difference step): one pass for every product.

    Where a rate is to be acted on and no more, a last pass without a backward pass may settle it.
    """
    half = 1 if face == "CatapultSGD" else 0
    run = Run(face, every=every, engine="finite-difference", **(QUIET if face == "CatapultSGD" else {}))
    costs = [run.cost() for _ in range(31)]
    for i, (forwards, calls, matvecs) in enumerate(costs):
        if i % every == 0 or (i == 1 and face == "CatapultSGD"):  # the second step tells whether the batch repeats
            assert matvecs >= 1, "a measured step"
            assert 0 <= forwards - (1 + matvecs) <= (half if i else 2)
            assert calls == 2, "the loop's, and one for the Hessian with respect to the outputs"
        else:
            assert (forwards, calls, matvecs) == (1, 1, -1), "an unmeasured step costs nothing"


# A policy that asks for no measurement of its own within these tests, far below the edge.
QUIET: dict[str, Any] = {"policy": CatapultPolicy(measure_share=1e-9, rise=1e9, creep=1e-9, climb=1e-9), "lr": 0.1}


def test_forwards_of_the_default_are_few() -> None:
    """Out of the box, without `every`: most steps are not measured."""
    run = Run(policy=CatapultPolicy(total_steps=200))
    costs = [run.cost() for _ in range(200)]
    measured = [cost for cost in costs if cost[2] >= 0]
    assert 1 <= len(measured) <= 100
    assert all(cost[:2] == (1, 1) for cost in costs if cost[2] < 0)


def test_forwards_without_a_model_are_the_loops() -> None:
    run = Run()
    run.optimizer.detach()
    run.optimizer = run.watch = CatapultSGD(run.model.parameters(), lr=0.01)
    assert [run.cost()[:2] for _ in range(5)] == [(1, 1)] * 5


@both
def test_forwards_on_unmeasured_steps_are_not_recorded(face: str) -> None:
    """Nothing is kept for a measurement that will not be made, in the middle of a step."""
    run = Run(face, every=50, **(QUIET if face == "CatapultSGD" else {}))
    run.step()
    run.step()
    before = objects()["ForwardCall"]
    x, y = run.batches[0]
    loss = run.criterion(run.model(x), y)
    assert objects()["ForwardCall"] == before
    loss.backward()


# ---------------------------------------------------------------------------------------------------------------- hooks


@both
@pytest.mark.parametrize("steps", [0, 3])
def test_hooks_go_with_detach(face: str, steps: int) -> None:
    run = Run(face)
    assert run.hooks() > 0
    run.steps(steps)
    run.watch.detach()
    assert run.hooks() == 0
    run.watch.detach()
    if face == "CatapultMonitor":
        assert len(run.optimizer._optimizer_step_pre_hooks) == 0
        run.step()


@pytest.mark.parametrize("steps", [0, 3])
def test_hooks_go_with_the_optimizer(steps: int) -> None:
    """By reference counting alone: no cycle keeps averages and graphs until the collector comes by."""
    gc.collect()
    gc.disable()
    try:
        run = Run()
        run.steps(steps)
        gone = weakref.ref(run.optimizer)
        run.optimizer = run.watch = None
        assert gone() is None
        assert run.hooks() == 0
    finally:
        gc.enable()


def test_hooks_of_a_monitor_go_with_it_and_its_optimizer() -> None:
    run = Run("CatapultMonitor")
    run.step()
    run.watch = None
    run.step()  # it is the optimizer's by now
    run.optimizer = None
    gc.collect()
    assert run.hooks() == 0


def test_hooks_of_others_stay() -> None:
    run = Run()
    handle = run.model.register_forward_hook(lambda *_: None)
    run.optimizer.detach()
    assert run.hooks() == 1
    handle.remove()


def test_hooks_do_not_pile_up_over_attachments() -> None:
    run = Run()
    before = run.hooks()
    for _ in range(5):
        run.optimizer.attach(model=run.model, criterion=run.criterion)
        run.step()
    assert run.hooks() == before


# --------------------------------------------------------------------------------------------------------------- memory


SETTINGS: dict[str, tuple[int, dict[str, Any]]] = {
    "default": (2000, {}),
    "every 10": (600, {"every": 10}),
    "every step": (300, {"every": 1}),
}


@pytest.mark.parametrize("name", list(SETTINGS))
def test_memory_does_not_grow_over_thousands_of_steps(name: str) -> None:
    """With some of everything a loop does: validation, skipped steps, losses dropped before backward."""
    steps, settings = SETTINGS[name]
    run = Run(**settings)
    x, y = run.batches[0]

    def advance(steps: int) -> None:
        for i in range(steps):
            run.step()
            if i % 5 == 0:
                run.criterion(run.model(x), y)  # validation that forgot no_grad
            if i % 7 == 0:
                run.criterion(run.model(x), y).backward()  # a step that was skipped
                run.model.zero_grad()

    advance(100)
    before, blocks = objects(), sys.getallocatedblocks()
    advance(steps - 100)
    after = objects()
    assert {k: after[k] - before[k] for k in after if after[k] > before[k] + 5} == {}
    assert sys.getallocatedblocks() - blocks < 300, "small pieces of memory, over all these steps"


def test_memory_of_the_state_does_not_grow() -> None:
    """The checkpoint of the 300th step is as large as that of the 20th."""
    run = Run()

    def size() -> int:
        return sum(len(v) for group in run.optimizer.param_groups for v in group.values() if isinstance(v, str))

    run.steps(20)
    before = size()
    run.steps(280)
    assert size() < before + 200
