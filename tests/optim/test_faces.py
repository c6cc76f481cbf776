"""Promise: the three faces show the same of a training, one optimizer has one of them, and what is dropped is gone.

Oracle: the names that `Face` documents; counting hooks; weak references, with the garbage collector off.
"""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training import DRIVING, FACES, Training, net, noise

from catapult_opt import CatapultLR, CatapultMonitor, CatapultSGD, read_log

SHOWN = ("criterion", "engine", "last", "super_critical_steps", "catapults", "collapses", "measured_steps")


def hooks(*modules: nn.Module) -> int:
    inner = [m for module in modules for m in module.modules()]
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in inner)


@pytest.mark.parametrize("face", FACES)
def test_every_face_shows_the_same(face: str, tmp_path: Path) -> None:
    training = Training(face, every=1, log=tmp_path / "run.jsonl")
    watch = training.watch
    assert watch.engine == "" and watch.last is None and watch.measured_steps == 0
    for _ in range(5):
        training.step()
    watch.log_metrics(val_loss=0.5)
    assert watch.criterion is training.criterion
    assert watch.engine != ""
    assert watch.last.eta_crit > 0 and watch.last.lambda_max > 0
    assert watch.measured_steps == 5
    seen = [getattr(watch, name) for name in SHOWN]
    watch.detach()
    assert [getattr(watch, name) for name in SHOWN] == seen, "what was counted can still be read"
    log = read_log(tmp_path / "run.jsonl")
    assert watch.super_critical_steps == sum(bool(r["super_critical"]) for r in log.measured)
    assert log.metric("val_loss") == {5: 0.5}


@pytest.mark.parametrize("face", DRIVING)
def test_the_driving_faces_average_and_have_a_phase(face: str) -> None:
    training = Training(face)
    training.step()
    assert isinstance(training.watch.phase, str)
    with training.watch.averaged():
        pass
    training.watch.use_averaged()


def attended(face: str, optimizer: Any, model: nn.Module) -> Any:
    criterion = nn.MSELoss()
    kind = CatapultLR if face == "CatapultLR" else CatapultMonitor
    return kind(optimizer, model=model, criterion=criterion)


@pytest.mark.parametrize("second", ["CatapultLR", "CatapultMonitor"])
@pytest.mark.parametrize("first", FACES)
def test_a_second_face_on_one_optimizer_is_refused(first: str, second: str) -> None:
    training = Training(first, net(5, 4, 1))
    before = hooks(training.model)
    with pytest.raises((ValueError, TypeError), match=r"optimizer: .*(itself|CatapultSGD sets a rate of its own)"):
        attended(second, training.optimizer, training.model)
    assert hooks(training.model) == before
    training.step()
    training.watch.detach()
    if first != "CatapultSGD":
        attended(second, training.optimizer, training.model)
        training.optimizer.zero_grad()


def test_a_catapult_sgd_without_a_model_can_be_watched() -> None:
    model, criterion = net(5, 4, 1), nn.MSELoss()
    optimizer = CatapultSGD(model.parameters(), lr=0.1)
    monitor = CatapultMonitor(optimizer, model=model, criterion=criterion)
    x, y = noise(8, 5)
    criterion(model(x), y).backward()
    optimizer.step()
    assert monitor.measured_steps == 1


@pytest.mark.parametrize("face", FACES)
def test_a_dropped_face_is_freed_at_once_with_all_its_hooks(face: str, tmp_path: Path) -> None:
    """Without the garbage collector: a notebook's cell that is run again leaves nothing behind."""
    model, criterion = net(5, 16, 1), nn.MSELoss()
    data = noise(8, 5)
    gc.collect()
    gc.disable()
    try:
        for i in range(3):
            training = Training(face, model, data, criterion=criterion, log=tmp_path / f"{i}.jsonl")
            for _ in range(2):
                training.step()
            references = [weakref.ref(training.watch), weakref.ref(training.optimizer)]
            del training
            assert [ref() for ref in references] == [None, None]
            assert hooks(model, criterion) == 0
            assert read_log(tmp_path / f"{i}.jsonl").column("step") == [1, 2]
    finally:
        gc.enable()


@pytest.mark.parametrize("face", ["CatapultLR", "CatapultMonitor"])
def test_a_face_lives_as_long_as_its_optimizer(face: str, tmp_path: Path) -> None:
    """It needs no name of its own: nothing of it has to be called."""
    training = Training(face, log=tmp_path / "run.jsonl")
    training.watch = None
    gc.collect()
    for _ in range(3):
        training.step()
    del training
    assert read_log(tmp_path / "run.jsonl").column("step") == [1, 2, 3]


def test_a_scheduler_does_not_keep_a_face_alive_longer_than_the_optimizer() -> None:
    training = Training("CatapultLR")
    scheduler = torch.optim.lr_scheduler.ConstantLR(training.optimizer)
    training.step()
    scheduler.step()
    reference = weakref.ref(training.watch)
    del training, scheduler
    gc.collect()
    assert reference() is None
