"""Promise: a checkpoint that torch.distributed.checkpoint wrote on two ranks goes on on one, two or four.

Oracle: the run on two ranks itself, which goes on after saving. One spawn of two processes saves all of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import network, part, run
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from training import Base, Training

BEFORE, AFTER = 4, 3
KINDS = ("ddp", "fsdp", "CatapultLR under fsdp")
pytestmark = pytest.mark.filterwarnings("ignore:.*(assume|Falling back|deprecated|torch.distributed is)")


class Run(Training):
    """A training whose parts of the whole batch are those of `ranks` processes."""

    def __init__(self, kind: str, rank: int, ranks: int) -> None:
        model: nn.Module = network()
        if ranks > 1:
            model = DistributedDataParallel(model) if kind == "ddp" else fully_shard(model)
        batches = [part(rank, ranks, step) for step in range(BEFORE + AFTER)]
        settings: dict[str, Any] = {"every": 1, "engine": "finite-difference"}
        if kind.startswith("CatapultLR"):
            base: Base = lambda params: torch.optim.AdamW(params, lr=0.001)  # noqa: E731
            super().__init__("CatapultLR", model, batches, base=base, **settings)
        else:
            super().__init__("CatapultSGD", model, batches, momentum=0.9, **settings)

    def train(self, steps: range) -> list[tuple[float, float]]:
        seen = []
        for self.done in steps:
            self.step()
            seen.append((self.watch.last.eta_crit, self.rates()[0]))
        return seen

    def state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        controller = {"controller": self.watch.state_dict()} if "controller" in self.parts() else {}
        return {"model": model, "optimizer": optimizer, **controller}

    def load(self, path: Any) -> None:
        state = self.state()
        dcp.load(state, checkpoint_id=path)
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        if "controller" in state:
            self.watch.load_state_dict(state["controller"])

    def vectors(self) -> list[Tensor]:
        if "controller" in self.parts():
            kept = self.watch.state_dict()["vector"]
        else:
            kept = [self.optimizer.state[p]["catapult_vector"] for p in self.model.parameters()]
        return [v.full_tensor() if isinstance(v, DTensor) else v.clone() for v in kept]


def save(rank: int, folder: str) -> dict[str, Any]:
    found = {}
    for kind in KINDS:
        ours = Run(kind, rank, 2)
        ours.train(range(BEFORE))
        dcp.save(ours.state(), checkpoint_id=Path(folder) / kind)
        vectors = ours.vectors()
        found[kind] = {"vectors": vectors, "after": ours.train(range(BEFORE, BEFORE + AFTER))}
        again = Run(kind, rank, 2)
        again.load(Path(folder) / kind)
        found[kind]["again"] = again.train(range(BEFORE, BEFORE + AFTER))
    return found


def resume(rank: int, folder: str, ranks: int) -> dict[str, Any]:
    found = {}
    for kind in KINDS:
        ours = Run(kind, rank, ranks)
        ours.load(Path(folder) / kind)
        found[kind] = {"vectors": ours.vectors(), "after": ours.train(range(BEFORE, BEFORE + AFTER))}
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def saved(folder: Path) -> list[dict[str, Any]]:
    return run(save, 2, str(folder))


def check(found: dict[str, Any], saved: dict[str, Any], rel: float = 1e-4) -> None:
    for kind in KINDS:
        for v, kept in zip(found[kind]["vectors"], saved[kind]["vectors"], strict=True):
            assert bool(kept.any()) and torch.equal(v, kept)
        for pair, expected in zip(found[kind]["after"], saved[kind]["after"], strict=True):
            assert pair == pytest.approx(expected, rel=rel), kind


def test_saved_on_two_goes_on_on_two_to_the_bit(saved: list[dict[str, Any]]) -> None:
    for ours in saved:
        for kind in KINDS:
            assert ours[kind]["again"] == ours[kind]["after"]


def test_saved_on_two_goes_on_on_one(saved: list[dict[str, Any]], folder: Path) -> None:
    """To a hundredth: the random part of a measurement's start is each rank's own."""
    check(resume(0, str(folder), 1), saved[0], rel=0.01)


@pytest.mark.slow
def test_saved_on_two_goes_on_on_four(saved: list[dict[str, Any]], folder: Path) -> None:
    for found in run(resume, 4, str(folder), 4):
        check(found, saved[0], rel=0.01)
