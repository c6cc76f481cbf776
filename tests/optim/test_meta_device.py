"""Promise: off measured steps the package computes on the model's device alone and never waits for it.

The loop runs on `meta` tensors under a dispatch mode that sees every operation: no operation may mix devices, none may
read a value, and no value may be read at all but through the one function that measured steps use. `meta` stands for an
accelerator: it has no values, so the measurement itself is replaced by a made-up one.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training import Training, noise

from catapult_opt import (
    CriticalLR,
    capture,
    grad_scaler,
    observer,
    read_log,
    recorder,
)

READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default, torch.ops.aten.is_nonzero.default}


class HotPath(TorchDispatchMode):
    """One device an operation, and no reading from it. 0-d CPU tensors (Adam's step) are numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
        devices = {t.device.type for t in tensors if t.dim() > 0 or t.device.type != "cpu"}
        assert devices <= {"meta"}, f"{func} on {devices}: something of the hot path is not on the model's device"
        assert func not in READS or not devices, f"{func}: waits for the device"
        return result


def model_on_meta() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(108, 5)
    ).to("meta")


class World:
    """Replaces what needs values by made-up ones; counts how often they are asked for."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.measured, self.reads, self.values = 0, [], 0
        patch.setattr(observer, "measure", self.measure)
        patch.setattr(observer, "choose_engine", lambda *_, **__: ("finite-difference", "made up"))
        patch.setattr(recorder, "read_numbers", self.read)
        patch.setattr(grad_scaler, "read_numbers", lambda tensors: [1.0] * len(tensors))  # no loss is scaled

    def measure(self, model: nn.Module, criterion: Any, params: list[Tensor], calls: Any, **_: Any) -> Any:
        self.measured += 1
        assert all(call.forwards for call in calls), "a measured step has what a measurement needs"
        return CriticalLR(0.5, 4.0, None, 0.0, 1, True, squared_error=True), [torch.zeros_like(p) for p in params]

    def read(self, tensors: list[Tensor]) -> list[float]:
        """The losses 1, 1/2, 1/3, ... in the order they are read."""
        assert all(t.is_meta and t.dim() == 0 for t in tensors)
        self.reads.append(len(tensors))
        self.values += len(tensors)
        return [1.0 / (self.values - len(tensors) + 1 + i) for i in range(len(tensors))]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    yield World(monkeypatch)
    gc.collect()  # sessions read the losses that wait when they go: while there are made-up ones


class Loop(Training):
    def __init__(self, face: str = "CatapultSGD", accumulate: int = 1, device: str = "meta", **settings: Any) -> None:
        self.accumulate = accumulate
        batch = torch.empty(4, 1, 8, 8, device="meta"), torch.empty(4, dtype=torch.long, device="meta")
        model = model_on_meta().to_empty(device=device)
        super().__init__(face, model, batch, criterion=nn.CrossEntropyLoss(), **settings)

    def step(self, *_: Any) -> float:  # type: ignore[override]
        """Its loss is not read."""
        self.optimizer.zero_grad()
        for _ in range(self.accumulate):
            (self.loss() / self.accumulate).backward()
        self.optimizer.step()
        return float("nan")

    def run(self, steps: int, world: World) -> list[bool]:
        """Which steps were measured; those that were not ran under the guard."""
        measured = []
        for _ in range(steps):
            before = world.measured
            with HotPath() if not measures_next(self.watch) else unguarded():
                self.step()
            measured.append(world.measured > before)
        return measured


def measures_next(watch: Any) -> bool:
    return bool(watch._observer.measures_next)


@contextmanager
def unguarded() -> Iterator[None]:
    yield


LOOPS: dict[str, dict[str, Any]] = {
    "CatapultSGD": {},
    "CatapultSGD, momentum": {"momentum": 0.9, "weight_decay": 1e-3, "foreach": True},
    "SGD watched": {
        "face": "CatapultMonitor", "base": lambda params: SGD(params, lr=0.1, momentum=0.9), "every": 5,
    },
    "Adam watched": {"face": "CatapultMonitor", "base": lambda params: Adam(params, lr=1e-3), "every": 5},
}  # fmt: skip


@pytest.mark.parametrize(("name", "accumulate"), [*((name, 1) for name in LOOPS), ("CatapultSGD", 2)])
def test_hot_path_stays_on_the_device(name: str, accumulate: int, world: World) -> None:
    steps = 40 // accumulate  # as many forwards
    measured = Loop(accumulate=accumulate, **LOOPS[name]).run(steps, world)
    assert measured[0]
    assert 2 <= sum(measured) <= steps // 4, "most steps are not measured"


@pytest.mark.parametrize("name", list(LOOPS))
def test_a_model_moved_to_where_its_parameters_become_new_ones(name: str, world: World) -> None:
    """Between the CPU and meta torch makes new parameters, which no optimizer knows: refused, and says what to do."""
    loop = Loop(device="cpu", **LOOPS[name])
    loop.model.to("meta")
    with pytest.raises(
        RuntimeError, match=r"params: parameter 0 .* is not a parameter of model.*make the optimizer anew"
    ):
        loop.run(1, world)


def test_a_warm_start_from_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint read with map_location="cpu" for a model that is elsewhere: the vector follows the parameters."""
    training = Training("CatapultLR", nn.Linear(3, 2), noise(4, 3, 2), base=lambda params: SGD(params, lr=0.1), every=1)
    starts: list[list[Tensor]] = []
    measure = observer.measure

    def noted(*args: Any, start: Any = None, **more: Any) -> Any:
        starts.append(start)
        return measure(*args, start=start, **more)

    monkeypatch.setattr(observer, "measure", noted)
    for dtype in (torch.float32, torch.float64):  # where there is no second device: another dtype goes the same way
        training.model.to(dtype)
        training.step(*(t.to(dtype) for t in training.batch))
    assert starts[1][0].dtype == torch.float32
    assert training.watch.last.lambda_max > 0


def test_monitor_reads_losses_at_measured_steps_only(world: World, tmp_path: Path) -> None:
    """All that waited in one transfer; the log has every step, in order, each with its own loss."""
    path = tmp_path / "run.jsonl"
    loop = Loop("CatapultMonitor", every=5, log=path)
    loop.run(13, world)
    assert world.reads == [1, 5, 5]
    loop.watch.log_metrics(val_loss=0.1)
    assert world.reads == [1, 5, 5, 2]
    loop.run(1, world)
    loop.watch.detach()
    assert world.reads == [1, 5, 5, 2, 1]
    log = read_log(path)
    assert log.column("step") == list(range(1, 15))
    assert log.column("loss") == [1.0 / i for i in range(1, 15)]
    assert log.metric("val_loss") == {13: 0.1}


def test_losses_that_wait_are_logged_when_a_run_just_ends(world: World, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    loop = Loop(**LOOPS["SGD watched"], log=path)
    loop.run(12, world)
    assert sum(world.reads) < 12
    del loop
    assert read_log(path).column("step") == list(range(1, 13))


def test_a_controller_reads_one_loss_a_step(world: World) -> None:
    """A catapult may be under way at any time."""
    loop = Loop()
    loop.run(20, world)
    assert world.reads == [1] * 20


def test_counts_are_of_the_present_step(world: World) -> None:
    loop = Loop(**LOOPS["SGD watched"])
    loop.run(5, world)
    assert sum(world.reads) < 5
    assert loop.watch.measured_steps == world.measured
    assert sum(world.reads) == 5


def test_losses_on_the_cpu_are_read_at_once() -> None:
    training = Training("CatapultMonitor", every=4)
    for _ in range(3):
        training.step()
        assert not training.watch._recorder._waiting


# ------------------------------------------------------------------------------------- would the test see a mistake?


def on_cpu_in_a_hook(self: Any, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
    torch.ones(output.shape[0])


def mixed_devices(self: Any, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
    output.detach() * torch.ones(output.shape[0], 1)


def item_in_a_hook(self: Any, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
    output.detach().sum().item()


def branch_in_a_hook(self: Any, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
    if output.detach().isfinite().all():
        pass


def copy_to_the_host(self: Any, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
    torch.empty(output.shape).copy_(output.detach())


@pytest.mark.parametrize(
    "bug",
    [on_cpu_in_a_hook, mixed_devices, item_in_a_hook, branch_in_a_hook, copy_to_the_host],
    ids=lambda f: f.__name__,
)
def test_planted_in_a_hook_is_caught(bug: Any, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(**LOOPS["CatapultSGD"])
    loop.run(2, world)
    right = capture.Capture._after_forward

    def wrong(self: Any, *args: Any) -> None:
        bug(self, *args)
        right(self, *args)

    monkeypatch.setattr(capture.Capture, "_after_forward", wrong)
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        loop.run(1, world)


def test_planted_read_of_every_loss_is_caught(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(**LOOPS["SGD watched"])
    loop.run(1, world)
    monkeypatch.setattr(recorder, "read_numbers", lambda tensors: [float(t) for t in tensors])
    right = observer.Observer.observe
    monkeypatch.setattr(
        observer.Observer, "observe", lambda self, *args, **more: right(self, *args, **{**more, "need_loss": True})
    )
    with pytest.raises((AssertionError, RuntimeError)):
        loop.run(1, world)


def test_planted_state_on_the_host_is_caught(world: World) -> None:
    """A momentum buffer that came back from a checkpoint on the wrong device."""
    loop = Loop(**LOOPS["CatapultSGD, momentum"])
    loop.run(2, world)
    for state in loop.optimizer.state.values():
        state["momentum_buffer"] = torch.zeros(state["momentum_buffer"].shape)
    with pytest.raises((AssertionError, RuntimeError)):
        loop.run(1, world)
