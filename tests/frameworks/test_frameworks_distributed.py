"""Promise: where a framework trains data-parallel (DDP, FSDP2), all ranks measure the whole batch and decide alike.

Oracle: the plain loop in one process on batches twice the size. One spawn of two processes runs all frameworks.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from framework_loop import BATCH, Feature, Seen, loader, plain
from ranks import run
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler

for name in ("lightning", "accelerate", "transformers"):
    pytest.importorskip(name)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def as_torchrun(rank: int, folder: str) -> dict[str, Seen]:
    """What torchrun tells its processes, for the frameworks to find."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29655", "TORCHELASTIC_RUN_ID": "test"}
    import test_accelerate
    import test_hf_trainer
    import test_lightning
    from lightning.pytorch.strategies import ModelParallelStrategy

    world = dist.group.WORLD
    found = {}
    for name, make, manual in (
        ("lightning", test_lightning.Automatic, False),
        ("manual", test_lightning.Manual, True),
    ):
        module: Any = make("CatapultSGD", Feature(), world)
        data: Any = loader().dataset  # with a sampler of its own, as Lightning's shuffles
        parts = DataLoader(data, batch_size=BATCH, sampler=DistributedSampler(data, shuffle=False))
        settings: dict[str, Any] = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
        test_lightning.trainer(Feature(), manual, **settings).fit(module, parts)
        found[name] = module.seen.end(module.net)
    for name, kind, manual in (
        ("fsdp2", test_lightning.Automatic, False),
        ("fsdp2 manual", test_lightning.Manual, True),
    ):

        class Sharded(kind):  # type: ignore[valid-type, misc]
            def configure_model(self) -> None:
                if not isinstance(self.net[0].weight, DTensor):
                    fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

        module = Sharded("CatapultSGD", Feature())
        settings["strategy"] = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        test_lightning.trainer(Feature(), manual, **settings).fit(module, parts)
        found[name] = module.seen
        found[name].weights = [p.full_tensor() for p in module.net.parameters()]
    accelerated = test_accelerate.Run("CatapultSGD", Feature(), world).epoch()
    found["accelerate"] = accelerated.seen.end(accelerated.net)
    made, look = test_hf_trainer.trainer("CatapultSGD", Feature(), Path(folder), process_group=world)
    made.train()
    found["hf_trainer"] = look.seen.end(made.model)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Seen]]:
    return run(as_torchrun, 2, str(tmp_path_factory.mktemp("out")))


def check(ranks: list[dict[str, Seen]], name: str, oracle: Seen) -> None:
    a, b = ranks[0][name], ranks[1][name]
    assert a.eta_crit == b.eta_crit and a.rates == b.rates
    assert all(torch.equal(p, q) for p, q in zip(a.weights, b.weights, strict=True))
    assert a.eta_crit == pytest.approx(oracle.eta_crit, rel=2e-3)
    assert a.rates == pytest.approx(oracle.rates, rel=2e-3)


@pytest.mark.parametrize("name", ["lightning", "manual", "accelerate"])
def test_ddp(ranks: list[dict[str, Seen]], name: str) -> None:
    check(ranks, name, plain("CatapultSGD", Feature(), 2 * BATCH))


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2 manual"])
def test_lightning_fsdp2(ranks: list[dict[str, Seen]], name: str) -> None:
    check(ranks, name, plain("CatapultSGD", Feature(), 2 * BATCH))


def test_ddp_hf_trainer(ranks: list[dict[str, Seen]]) -> None:
    import test_hf_trainer

    check(ranks, "hf_trainer", test_hf_trainer.plain("CatapultSGD", Feature(), 2 * test_hf_trainer.BATCH))
