"""Run a function in several processes of one gloo group and collect what each returns; a small task for it."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as torch_multiprocessing
from torch import Tensor, nn

# Where the platform can: every rank is forked from a fresh process that has imported already what takes seconds.
_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
_PRELOADED = ["torch._dynamo", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp", "catapult_opt"]


def run(function: Callable[..., Any], ranks: int, *args: Any) -> list[Any]:
    """function(rank, *args) on every rank, its results in the order of ranks; a module-level function."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.set_forkserver_preload(_PRELOADED)
        arguments = (function, ranks, folder, args)
        torch_multiprocessing.start_processes(_enter, arguments, nprocs=ranks, start_method=_METHOD)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def _enter(rank: int, function: Callable[..., Any], ranks: int, folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    try:
        torch.save(function(rank, *args), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def network(norm: bool = False) -> nn.Module:
    torch.manual_seed(1)
    layers = [nn.Linear(5, 16), nn.BatchNorm1d(16)] if norm else [nn.Linear(5, 16)]
    return nn.Sequential(*layers, nn.Tanh(), nn.Linear(16, 3)).double()


def batch(step: int, n: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    return x, torch.randn(n, 3, generator=generator, dtype=torch.float64)


def part(rank: int, ranks: int, step: int) -> tuple[Tensor, Tensor]:
    x, y = batch(step)
    return x[rank::ranks], y[rank::ranks]
