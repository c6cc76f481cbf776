"""Promise: in Lightning a training is, to the bit, that of the plain PyTorch loop.

Automatic and manual optimisation, each feature of the README's matrix; the callback of the example logs.
"""

from __future__ import annotations

import warnings
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
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    L = pytest.importorskip("lightning")

pytestmark = pytest.mark.filterwarnings("ignore")


class Automatic(L.LightningModule):  # type: ignore[name-defined, misc]
    def __init__(self, kind: str, feature: Feature, process_group: Any = None) -> None:
        super().__init__()
        self.process_group = process_group
        self.net, self.criterion = network(), nn.MSELoss()
        self.called = [compiled(self.net, feature)]  # in a list: no second submodule
        self.kind, self.feature, self.seen = kind, feature, Seen()
        self.watch: Any = None

    def training_step(self, batch: Any, i: int) -> Tensor:
        x, y = batch
        return self.criterion(self.called[0](x), y)

    def configure_optimizers(self) -> Any:
        optimizer, self.watch = optimizer_for(
            self.kind, self.called[0], self.net, self.criterion, self.feature, process_group=self.process_group
        )
        if not self.feature.schedule:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule_for(optimizer), "interval": "step"}}

    def on_train_batch_end(self, outputs: Any, batch: Any, i: int) -> None:
        if (i + 1) % self.feature.accumulate == 0:
            self.seen.step(self.optimizers(use_pl_optimizer=False), self.watch)


class Manual(Automatic):
    def __init__(self, kind: str, feature: Feature, process_group: Any = None) -> None:
        super().__init__(kind, feature, process_group)
        self.automatic_optimization = False

    def training_step(self, batch: Any, i: int) -> None:
        x, y = batch
        optimizer: Any = self.optimizers()
        self.manual_backward(self.criterion(self.called[0](x), y) / self.feature.accumulate)
        if (i + 1) % self.feature.accumulate:
            return
        if self.feature.clip is not None:
            self.clip_gradients(optimizer, self.feature.clip, "norm")
        optimizer.step()
        optimizer.zero_grad()
        if self.feature.schedule:
            self.lr_schedulers().step()


def trainer(feature: Feature, manual: bool = False, **settings: Any) -> Any:
    automatic = {"accumulate_grad_batches": feature.accumulate, "gradient_clip_val": feature.clip}
    return L.Trainer(
        accelerator="cpu",
        devices=settings.pop("devices", 1),
        max_epochs=settings.pop("max_epochs", feature.epochs),
        precision="bf16-mixed" if feature.amp else "32-true",
        logger=settings.pop("logger", False),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **({} if manual else automatic),
        **settings,
    )


def train(kind: str, feature: Feature, manual: bool) -> Seen:
    module = (Manual if manual else Automatic)(kind, feature)
    trainer(feature, manual).fit(module, loader())
    return module.seen.end(module.net)


@pytest.mark.parametrize("feature", FEATURES)
def test_automatic(feature: str) -> None:
    assert_same(train("CatapultSGD", FEATURES[feature], manual=False), plain("CatapultSGD", FEATURES[feature]))


@pytest.mark.parametrize("feature", FEATURES)
def test_manual(feature: str) -> None:
    assert_same(train("CatapultSGD", FEATURES[feature], manual=True), plain("CatapultSGD", FEATURES[feature]))


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_resume(manual: bool, tmp_path: Path) -> None:
    """A checkpoint of the first epoch, loaded into another module, goes on as the run of two epochs."""
    kind, whole = "CatapultSGD", plain("CatapultSGD", Feature(epochs=2))
    make = Manual if manual else Automatic
    first = make(kind, Feature())
    saving = trainer(Feature(), manual)
    saving.fit(first, loader())
    saving.save_checkpoint(tmp_path / "epoch.ckpt")
    second = make(kind, Feature())
    trainer(Feature(), manual, max_epochs=2).fit(second, loader(), ckpt_path=tmp_path / "epoch.ckpt")
    assert first.seen.eta_crit + second.seen.eta_crit == whole.eta_crit
    assert all(torch.equal(p, q) for p, q in zip(second.net.parameters(), whole.weights, strict=True))


def test_catapult_lr_on_adamw() -> None:
    assert_same(train("CatapultLR", Feature(), manual=False), plain("CatapultLR", Feature()))
