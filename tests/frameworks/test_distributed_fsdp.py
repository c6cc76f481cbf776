"""Promise: under `fully_shard` (FSDP2) every rank measures the whole batch's curvature on its parts of the weights.

Oracle: one process with the whole weights and the whole batch, in float64. One spawn of two processes runs all of it.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import batch, network, part, run
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from training import DRIVING, FACES, Base, connect

import catapult_opt.observer as observer_module
from catapult_opt import CatapultMonitor, CatapultSGD, critical_lr, read_log

STEPS = 6


def nested() -> nn.Module:
    """A block inside a root, and sizes that two or four ranks do not divide."""
    torch.manual_seed(1)
    block = nn.Sequential(nn.Tanh(), nn.Linear(15, 7))
    return nn.Sequential(nn.Linear(5, 15), block, nn.Tanh(), nn.Linear(7, 3)).double()


def sharded(model: nn.Module, **settings: Any) -> nn.Module:
    for child in model.children():
        if isinstance(child, nn.Sequential):
            fully_shard(child, **settings)
    return fully_shard(model, **settings)


class WithLoss(nn.Module):
    """Returns its loss, as the models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nested()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.mse_loss(self.net(x), y)


def full(tensors: Any) -> list[Tensor]:
    return [t.full_tensor() if isinstance(t, DTensor) else t.detach().clone() for t in tensors]


def train(kind: str, rank: int, ranks: int, model: nn.Module, **settings: Any) -> dict[str, Any]:
    """A training on the rank's part of each batch with clipped gradients, a schedule and groups of two rates."""
    criterion = nn.MSELoss()
    last = [p for name, p in model.named_parameters() if name.startswith("3.")]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if all(p is not q for q in last)]},
        {"params": last, "lr": 0.5},
    ]
    bases: dict[str, Base] = {
        "CatapultLR": lambda params: torch.optim.AdamW(params, lr=1.0),
        "CatapultMonitor": lambda params: torch.optim.SGD(params, lr=0.05),
    }
    more = {"momentum": 0.5} if kind == "CatapultSGD" else {"base": bases[kind]}
    optimizer, watch = connect(kind, groups, model=model, criterion=criterion, **more, **settings)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, total_iters=3)
    found, rates = [], []
    for step in range(STEPS):
        x, y = part(rank, ranks, step)
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        found.append(watch.last.eta_crit)
        rates.append(optimizer.param_groups[1].get("effective_lr", 0.0))
    weights = full(model.parameters())
    with contextlib.nullcontext() if kind == "CatapultMonitor" else watch.averaged():
        averaged = full(model.parameters())
        inside = model(x).detach()  # by the weights that the forward pass gathers
    return {
        "averaged": averaged,
        "seen": not torch.equal(inside, model(x).detach()),
        "back": all(map(torch.equal, full(model.parameters()), weights)),
        "eta_crit": found,
        "rates": rates,
        "engine": watch.last is not None and watch.engine,
        "weights": weights,
        "placements": [str(getattr(optimizer.state[p].get("catapult_vector"), "placements", "")) for p in last],
    }


def once(model: nn.Module, rank: int, ranks: int, settings: dict[str, Any], loss: Any) -> float:
    """lambda_max of the first step."""
    optimizer = CatapultSGD(model.parameters(), model=model, **settings)
    x, y = part(rank, ranks, 0)
    loss(model, x, y)
    optimizer.step()
    assert optimizer.last is not None
    return optimizer.last.lambda_max


def direct(model: nn.Module, x: Tensor, y: Tensor) -> None:
    CRITERION(model(x), y).backward()


def scaled_outputs(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """The loop computes something between model and criterion."""
    CRITERION(model(x) * 2.0 + 1.0, y).backward()


def accumulated(model: nn.Module, x: Tensor, y: Tensor) -> None:
    for i in range(2):
        model.set_requires_gradient_sync(i == 1)  # type: ignore[operator]
        half = slice(0, 3) if i == 0 else slice(3, None)
        (CRITERION(model(x[half]), y[half]) / 2).backward()


def returned(model: nn.Module, x: Tensor, y: Tensor) -> None:
    model(x, y).backward()


def in_bfloat16(model: nn.Module, x: Tensor, y: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(x.float())
    CRITERION(outputs.float(), y.float()).backward()


def weightless(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Rank 1 ran out of data: a batch of weight zero, as its weights are wanted by the others."""
    weight = 0.0 if dist.get_rank() == 1 else 1.0
    (CRITERION(model(x), y) * weight).backward()


CRITERION = nn.MSELoss()
GGN: dict[str, Any] = {"criterion": CRITERION}


def everything(rank: int, folder: str) -> dict[str, Any]:
    ranks = dist.get_world_size()
    ours: dict[str, Any] = {}
    for kind in FACES:
        ours[kind] = train(kind, rank, ranks, sharded(nested()), every=1, log=Path(folder) / f"{kind}.jsonl")
    observer_module._COLD_TOL, observer_module._COLD_MATVECS = 1e-8, 80
    ours["exact"] = once(sharded(nested()), rank, ranks, GGN, direct)
    ours["replicated by DDP"] = once(nn.parallel.DistributedDataParallel(nested()), rank, ranks, GGN, direct)
    ours["scaled outputs"] = once(sharded(nested()), rank, ranks, GGN, scaled_outputs)
    ours["accumulated"] = once(sharded(nested()), rank, ranks, GGN, accumulated)
    ours["hessian"] = once(sharded(WithLoss()), rank, ranks, {"criterion": None}, returned)
    ours["autocast"] = once(sharded(nested().float()), rank, ranks, GGN, in_bfloat16)
    ours["weightless"] = once(sharded(nested()), rank, ranks, GGN, weightless)
    ours["untouched"] = untouched(rank, ranks)
    ours["errors"] = errors(rank, ranks)
    return ours


def untouched(rank: int, ranks: int) -> bool:
    """With a monitor, every gradient, weight and buffer of a training is what it is without."""
    ends = []
    for watched in (False, True):
        model = network(norm=True)
        fully_shard(model[0])
        fully_shard(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        monitor = CatapultMonitor(optimizer, model=model, criterion=CRITERION) if watched else None
        seen = []
        for step in range(4):
            x, y = part(rank, ranks, step)
            optimizer.zero_grad()
            CRITERION(model(x), y).backward()
            before = [p.grad for p in model.parameters()]
            optimizer.step()
            assert all(p.grad is g for p, g in zip(model.parameters(), before, strict=True))
            seen += full(before)
            with torch.no_grad():  # validation leaves the root gathered
                model(x)
        assert monitor is None or monitor.measured_steps == 4
        ends.append([*seen, *full(model.state_dict().values())])
    return all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def errors(rank: int, ranks: int) -> dict[str, str]:
    found = {}

    def refused(name: str, kind: type[Exception], call: Any) -> None:
        with pytest.raises(kind) as caught:
            call()
        found[name] = str(caught.value)

    model = sharded(nested())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for engine in ("forward", "double-backward", "layerwise-gram"):
        refused(
            engine,
            ValueError,
            lambda engine=engine: CatapultMonitor(optimizer, model=model, criterion=CRITERION, engine=engine),
        )
    old = FullyShardedDataParallel(nested(), device_id=torch.device("cpu"))
    refused("FSDP1", ValueError, lambda: CatapultSGD(old.parameters(), model=old, criterion=CRITERION))
    half = sharded(nested().float(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    refused("bfloat16", RuntimeError, lambda: once(half, rank, ranks, GGN, in_bfloat16))
    root = nested()
    fully_shard(root[1])
    refused("in part", ValueError, lambda: CatapultSGD(root.parameters(), model=root, criterion=CRITERION))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fsdp")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return run(everything, 2, str(folder))


@pytest.mark.parametrize("kind", FACES)
def test_ranks_agree_to_the_bit(ranks: list[dict[str, Any]], kind: str) -> None:
    a, b = ranks[0][kind], ranks[1][kind]
    assert a["eta_crit"] == b["eta_crit"] and a["rates"] == b["rates"]
    assert all(torch.equal(p, q) for p, q in zip(a["weights"], b["weights"], strict=True))


@pytest.mark.parametrize("kind", DRIVING)
def test_averaged_weights_are_those_of_one_process_and_go_again(ranks: list[dict[str, Any]], kind: str) -> None:
    """Not to rounding: the random start vectors differ."""
    alone = train(kind, 0, 1, nested(), every=1, engine="finite-difference")
    for rank in ranks:
        assert rank[kind]["back"] and rank[kind]["seen"]
        for p, q in zip(rank[kind]["averaged"], alone["averaged"], strict=True):
            torch.testing.assert_close(p, q, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("kind", FACES)
def test_ranks_measure_what_one_process_does(ranks: list[dict[str, Any]], kind: str) -> None:
    """Groups, clipping and a schedule included. Not to rounding: the random start vectors differ."""
    one = train(kind, 0, 1, nested(), every=1, engine="finite-difference")
    assert ranks[0][kind]["engine"] == "finite-difference"
    assert ranks[0][kind]["eta_crit"] == pytest.approx(one["eta_crit"], rel=0.01)
    assert ranks[0][kind]["rates"] == pytest.approx(one["rates"], rel=0.01)


def test_warm_start_is_sharded_with_the_parameters(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["CatapultSGD"]["placements"] == ["(Shard(dim=0),)"] * 2


def expected(model: nn.Module, criterion: Any = CRITERION, **settings: Any) -> float:
    return critical_lr(model, criterion, batch(0)[0], batch(0)[1], tol=1e-8, max_matvecs=80, **settings).lambda_max


def test_the_whole_batch_to_rounding(ranks: list[dict[str, Any]]) -> None:
    for name in ("exact", "accumulated", "replicated by DDP"):
        assert [r[name] for r in ranks] == pytest.approx([expected(nested())] * 2, rel=1e-6), name


def test_code_between_model_and_criterion(ranks: list[dict[str, Any]]) -> None:
    for r in ranks:
        assert r["scaled outputs"] == pytest.approx(4 * expected(nested()), rel=1e-6)


def test_hessian_of_a_model_that_returns_its_loss(ranks: list[dict[str, Any]]) -> None:
    hessian = expected(nested(), curvature="hessian")
    for r in ranks:
        assert r["hessian"] == pytest.approx(hessian, rel=1e-5)


def test_autocast_is_measured_in_full_precision(ranks: list[dict[str, Any]]) -> None:
    for r in ranks:
        assert r["autocast"] == pytest.approx(expected(nested()), rel=0.01)


def test_a_rank_without_data_has_a_batch_of_weight_zero(ranks: list[dict[str, Any]]) -> None:
    x, y = part(0, 2, 0)
    half = critical_lr(nested(), CRITERION, x, y, tol=1e-8, max_matvecs=80).lambda_max / 2
    for r in ranks:
        assert r["weightless"] == pytest.approx(half, rel=1e-6)


def test_training_with_a_monitor_is_the_one_without(ranks: list[dict[str, Any]]) -> None:
    assert all(r["untouched"] for r in ranks)


def test_log_is_written_once_and_says_what_a_rank_keeps(ranks: list[dict[str, Any]], folder: Path) -> None:
    header = read_log(folder / "CatapultSGD.jsonl").header
    p = sum(p.numel() for p in nested().parameters())
    assert header["parameters"] == p and header["batch_size"] == 12
    assert p * 8 <= header["extra_bytes"] < 1.3 * p * 8  # two copies of a half, and what does not divide


def test_what_cannot_be_is_refused(ranks: list[dict[str, Any]]) -> None:
    for r in ranks:
        for engine in ("forward", "double-backward", "layerwise-gram"):
            assert f"got {engine!r}" in r["errors"][engine]
        assert "fully_shard" in r["errors"]["FSDP1"] and "fully_shard" in r["errors"]["in part"]
        assert "no engine can measure" in r["errors"]["bfloat16"]


@pytest.mark.slow
def test_replicated_and_sharded_on_four() -> None:
    """HSDP: weights sharded over pairs and replicated over two of them."""
    for r in run(both, 4):
        assert r == pytest.approx([expected(nested())] * 2, rel=1e-6)


def both(rank: int) -> list[float]:
    observer_module._COLD_TOL, observer_module._COLD_MATVECS = 1e-8, 80
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return [once(sharded(nested(), **s), rank, 4, GGN, direct) for s in ({"mesh": mesh}, {})]
