"""Promise: with Accelerate a training is, to the bit, that of the plain PyTorch loop.

Also with the controller's own checkpoint (`register_for_checkpointing`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from framework_loop import (
    FEATURES,
    Feature,
    Seen,
    assert_same,
    compiled,
    loader,
    network,
    optimizer_for,
    plain,
    schedule_for,
)
from torch import nn

accelerate = pytest.importorskip("accelerate")

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _fresh() -> None:
    """Accelerate keeps one state a process; it has no public way to start over."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


class Run:
    def __init__(self, kind: str, feature: Feature, process_group: Any = None) -> None:
        self.feature, self.seen = feature, Seen()
        self.accelerator = accelerate.Accelerator(
            cpu=True,
            mixed_precision="bf16" if feature.amp else "no",
            gradient_accumulation_steps=feature.accumulate,
        )
        self.net, self.criterion = network(), nn.MSELoss()
        self.model = compiled(self.net, feature)
        optimizer, self.watch = optimizer_for(
            kind, self.model, self.net, self.criterion, feature, process_group=process_group
        )
        schedule = schedule_for(optimizer) if feature.schedule else None
        prepared = self.accelerator.prepare(self.model, optimizer, loader(), schedule)
        self.model, self.optimizer, self.batches, self.schedule = prepared
        if self.watch is not optimizer:
            self.accelerator.register_for_checkpointing(self.watch)

    def epoch(self) -> Run:
        for x, y in self.batches:
            with self.accelerator.accumulate(self.model):
                loss = self.criterion(self.model(x), y)
                self.accelerator.backward(loss)
                if self.feature.clip is not None:
                    self.accelerator.clip_grad_norm_(self.net.parameters(), self.feature.clip)
                self.optimizer.step()
                self.optimizer.zero_grad()
                if self.accelerator.sync_gradients:
                    self.seen.step(self.optimizer, self.watch)
                if self.schedule is not None:
                    self.schedule.step()
        return self


def train(kind: str, feature: Feature) -> Seen:
    ours = Run(kind, feature).epoch()
    return ours.seen.end(ours.net)


@pytest.mark.parametrize("feature", [name for name in FEATURES if name != "amp"])
def test_loop(feature: str) -> None:
    assert_same(train("CatapultSGD", FEATURES[feature]), plain("CatapultSGD", FEATURES[feature]))


def test_amp() -> None:
    """Accelerate puts autocast inside the model's forward; measured is in full precision all the same."""
    ours, oracle = train("CatapultSGD", FEATURES["amp"]), plain("CatapultSGD", Feature())
    assert ours.eta_crit == pytest.approx(oracle.eta_crit, rel=0.1)  # the trainings part
    assert ours.eta_crit[0] == pytest.approx(oracle.eta_crit[0], rel=0.002)


@pytest.mark.parametrize("kind", ["CatapultSGD", "CatapultLR"])
def test_resume(kind: str, tmp_path: Path) -> None:
    """State saved after the first epoch, loaded into another run, goes on as the run of two epochs."""
    whole = plain(kind, Feature(epochs=2))
    first = Run(kind, Feature()).epoch()
    first.accelerator.save_state(str(tmp_path / "state"))
    second = Run(kind, Feature())
    second.accelerator.load_state(str(tmp_path / "state"))
    second.epoch()
    assert first.seen.eta_crit + second.seen.eta_crit == whole.eta_crit
    assert all(torch.equal(p, q) for p, q in zip(second.net.parameters(), whole.weights, strict=True))


def test_catapult_lr_on_adamw() -> None:
    assert_same(train("CatapultLR", Feature()), plain("CatapultLR", Feature()))
