"""What a measurement exchanges and keeps on several processes, counted here; what that comes to at 7B on 64 GPUs.

    python benchmarks/scaling.py            # two processes, under a minute; prints the tables of docs/scaling.md

Counted on a small transformer under DistributedDataParallel and under `fully_shard`: collectives and their volume in a
training step and in a curvature product (by a dispatch mode; DDP's gradient buckets by a communication hook), and the
most copies of a process' parameters alive in a measurement. Worked out from the counts, with the hardware stated
below: bytes, memory, seconds and share of a step for 7 billion parameters on 64 GPUs. Simulated: how often the policy
measures in a training of 100,000 steps, by running the policy itself with its budget on made-up losses.
"""

from __future__ import annotations

import math
import random
import tempfile
import weakref
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from catapult_opt import CatapultLR, CatapultMonitor
from catapult_opt.observer import MINI_BATCH_WINDOW
from catapult_opt.policy import _MEASUREMENT, Catapulter, CatapultPolicy

RANKS, STEPS = 2, 8
FEW = 64  # numbers: latency, not volume
# The assumptions. 64 GPUs, 8 a node; a batch of 4 million tokens; bfloat16 autocast in training, float32 (TF32) in a
# measurement; bytes cross the network once per collective, at what one GPU's link sustains.
PARAMETERS, GPUS, TOKENS = 7e9, 64, 4e6
BF16_FLOPS, TF32_FLOPS, BYTES_PER_SECOND = 4e14, 2e14, 4e10


class Traffic(TorchDispatchMode):
    """Collectives by name, and the most elements that a process sends or gets in them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.elements: Counter[str] = Counter()

    def note(self, name: str, elements: int) -> None:
        key = name if elements > FEW else "a few numbers"
        self.calls[key] += 1
        self.elements[key] += elements

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func._schema.name.split("::")
        if namespace == "c10d":
            name = next(k for k in ("reduce_scatter", "allgather", "allreduce", "broadcast") if k in name)
            self.note(name, max(t.numel() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)))
        return func(*args, **(kwargs or {}))


class Kept(TorchDispatchMode):
    """Elements of the floating-point storage made inside that are alive, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in _parts((args, kwargs))}
        found = func(*args, **(kwargs or {}))
        for t in _parts(found):
            if t.is_floating_point():
                storage = t.untyped_storage()
                if storage._cdata in given:  # written in place, or a view: not new
                    continue
                key, size = storage._cdata, storage.nbytes() // t.element_size()
                if key not in self._known:
                    self._known.add(key)
                    self.alive += size
                    self.most = max(self.most, self.alive)
                    weakref.finalize(storage, self._gone, key, size)
        return found

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def _parts(tree: Any) -> list[Tensor]:
    """The plain tensors in it, of a DTensor this process' part."""
    tensors = [t for t in tree_leaves(tree) if isinstance(t, Tensor)]
    return [t.to_local() if hasattr(t, "to_local") else t for t in tensors]


@dataclass
class Counted:
    """Volumes in units of the model's parameters, memory in units of what a process holds of them."""

    step: Traffic
    measurement: Traffic
    products: int
    parameters: int
    held: int
    most: float
    left: float


def count(rank: int, store: str, shard: bool, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, RANKS), rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True) for _ in range(4)]
    model: nn.Module = nn.Sequential(*layers, nn.Linear(64, 8))
    parameters = sum(p.numel() for p in model.parameters())
    step, measurement = Traffic(), Traffic()
    if shard:
        for layer in layers:
            fully_shard(layer)
        fully_shard(model)
    else:
        model = DistributedDataParallel(model)
        model.register_comm_hook(None, lambda state, bucket: _gradients(bucket))
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    watch: Any = CatapultMonitor(optimizer, model=model, criterion=criterion, every=2, engine="finite-difference")
    for i in range(STEPS):
        for traffic in (step, measurement):
            traffic.calls.clear()
            traffic.elements.clear()
        measuring = i % 2 == 0  # the others count a plain training step
        with measurement if measuring else step:
            _backward(model, criterion, optimizer, 10 * i + rank)
            if measuring:  # what the training step itself exchanged does not count
                measurement.calls.clear()
                measurement.elements.clear()
                optimizer.step()
        if not measuring:
            optimizer.step()
            last_step = step.calls.copy(), step.elements.copy()
        else:
            last = measurement.calls.copy(), measurement.elements.copy()
            products = watch.last.matvecs
    watch.detach()
    step.calls, step.elements = last_step
    measurement.calls, measurement.elements = last
    most, left, held = _copies(model, criterion, rank)
    if rank == 0:
        traffic = [(t.calls, t.elements) for t in (step, measurement)]
        torch.save((traffic, products, parameters, held, most, left), out)
    dist.destroy_process_group()


def _backward(
    model: nn.Module, criterion: nn.Module, optimizer: Any, seed: int, samples: int = 4, length: int = 16
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(samples, length, 64, generator=generator), torch.randint(8, (samples,), generator=generator)
    optimizer.zero_grad()
    criterion(model(x)[:, 0], y).backward()


def _gradients(bucket: dist.GradBucket) -> Any:
    """What DDP does itself, where the dispatch mode sees it."""
    future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return future.then(lambda done: done.value()[0] / RANKS)


def _copies(model: nn.Module, criterion: nn.Module, rank: int) -> tuple[float, float, int]:
    """Most memory in a step of CatapultLR on SGD that measures, and what stays; the batch is one short sample."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    held = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in model.parameters())
    controller = CatapultLR(optimizer, model=model, criterion=criterion, every=1, engine="finite-difference")
    kept = Kept()
    for i in range(3):
        _backward(model, criterion, optimizer, 100 + 10 * i + rank, samples=1, length=1)
        kept.most = kept.alive
        with kept:
            optimizer.step()
    controller.detach()
    return kept.most / held, kept.alive / held, held


def counted(shard: bool) -> Counted:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(count, (f"{folder}/store", shard, f"{folder}/out"), nprocs=RANKS)
        traffic, *rest = torch.load(f"{folder}/out", weights_only=False)
    step, measurement = Traffic(), Traffic()
    (step.calls, step.elements), (measurement.calls, measurement.elements) = traffic
    return Counted(step, measurement, *rest)


def table_of_counts(kinds: dict[str, Counted]) -> Table:
    table = Table(title="Counted on two processes", title_justify="left", box=box.MARKDOWN)
    for column in ("", "collective", "a training step", "volume / parameters", "a product", "volume / parameters"):
        table.add_column(column, justify="left" if column in ("", "collective") else "right")
    for kind, c in kinds.items():
        for name in sorted(set(c.step.calls) | set(c.measurement.calls)):
            each = c.measurement.calls[name] / c.products
            volumes = c.step.elements[name] / c.parameters, c.measurement.elements[name] / c.products / c.parameters
            shown = [f"{volume:.2f}" if volume > 0.01 else "" for volume in volumes]
            table.add_row(kind, name, str(c.step.calls[name]), shown[0], f"{each:.3g}", shown[1])
    return table


def table_of_copies(kinds: dict[str, Counted]) -> Table:
    table = Table(title="Beside weights and gradients, in copies of them", title_justify="left", box=box.MARKDOWN)
    for column in ("", "products of the last measurement", "at most, within it", "between measurements"):
        table.add_column(column, justify="right" if column else "left")
    for kind, c in kinds.items():
        table.add_row(kind, str(c.products), f"{c.most:.1f}", f"{c.left:.1f}")
    return table


def worked_out(sharded: Counted) -> Table:
    """fully_shard on the assumed hardware; the volumes are those counted, a product reads and writes in float32."""
    volume = sum(v for k, v in sharded.measurement.elements.items() if k != "a few numbers")
    per_product = volume / sharded.products / sharded.parameters * PARAMETERS * 4
    latency = sharded.measurement.calls["a few numbers"] * 5e-5
    flops = 6 * PARAMETERS * TOKENS / GPUS  # forward 2, backward 4 a token and parameter
    step, product = flops / BF16_FLOPS, flops / TF32_FLOPS
    forward = product / 3
    per_step = (2 * 2 + 4) * PARAMETERS  # gathered twice in bfloat16 at best, reduced in float32
    # Under autocast the step's own outputs are no base for differences: one more forward pass a measurement.
    measurement = sharded.products * product + forward + latency
    shard = PARAMETERS * 4 / GPUS / 1e9
    table = Table(title="7B on 64 GPUs under fully_shard, worked out", title_justify="left", box=box.MARKDOWN)
    table.add_column("")
    table.add_column("", justify="right")
    for name, value in {
        "training step: compute": f"{step:.1f} s",
        "training step: exchanged per GPU": f"{per_step / 1e9:.0f} GB, {per_step / BYTES_PER_SECOND:.1f} s",
        "curvature product: compute (float32)": f"{product:.1f} s",
        "curvature product: exchanged per GPU": f"{per_product / 1e9:.0f} GB, {per_product / BYTES_PER_SECOND:.1f} s",
        f"measurement of {sharded.products} products": f"{measurement:.0f} s, {measurement / step:.1f} steps",
        "  of that, waiting for a few numbers": f"{latency * 1e3:.1f} ms",
        "  by the policy's own count": f"{_MEASUREMENT:.1f} steps",
        "memory per GPU: weights, float32": f"{shard:.2f} GB",
        "memory per GPU: kept between measurements": f"{sharded.left * shard:.2f} GB",
        "memory per GPU: at most in a measurement": f"{sharded.most * shard:.1f} GB",
    }.items():
        table.add_row(name, value)
    return table


def simulated(steps: int, squared_error: bool) -> tuple[int, int]:
    """Measurements and restores of the policy over so many steps, on a loss that falls by itself.

    Above the edge the loss grows as on the quadratic and the curvature falls by a twentieth a step, below it the
    curvature rises slowly (progressive sharpening); batches scatter the loss by 3 % and the curvature by 14 %.
    """
    machine, dice = Catapulter(CatapultPolicy(total_steps=steps)), random.Random(0)
    log_lam, spike, due, measurements, restores = 0.0, 0.0, 1, 0, 0
    for step in range(1, steps + 1):
        base = 3.0 * step**-0.1
        loss = (base + spike) * math.exp(dice.gauss(0, 0.03))
        measured = step >= due
        eta_crit = 2 / math.exp(log_lam + dice.gauss(0, 0.14)) if measured else None
        decision = machine.update(
            step=step, loss=loss, eta_crit=eta_crit, window=MINI_BATCH_WINDOW, squared_error=squared_error
        )
        above = decision.rate * math.exp(log_lam) / 2
        spike = min(max(spike, 1e-3) * min((2 * above - 1) ** 2, 4.0) if above > 1 else spike * 0.7, 1e9)
        log_lam += -0.05 if above > 1 else 2.0 / steps
        restores += decision.restore
        spike = 0.0 if decision.restore else spike
        measurements += measured
        due = step + decision.measure_in
    return measurements, restores


def cadence(products: int, steps: int = 100_000) -> Table:
    table = Table(title=f"The policy over {steps:,} steps, simulated", title_justify="left", box=box.MARKDOWN)
    for column in ("loss", "measured steps", "one in", "restores", "share at the seconds above"):
        table.add_column(column, justify="right" if column != "loss" else "left")
    cost = (products + 1 / 3) * BF16_FLOPS / TF32_FLOPS
    for name, squared in (("cross-entropy (below the edge)", False), ("squared error (catapults)", True)):
        measured, restores = simulated(steps, squared)
        share = measured * cost / steps
        table.add_row(name, str(measured), f"{steps / measured:.0f}", str(restores), f"{share:.2%}")
    return table


def main() -> None:
    console = Console(width=120)
    kinds = {"DDP": counted(shard=False), "fully_shard": counted(shard=True)}
    console.print(table_of_counts(kinds), table_of_copies(kinds))
    console.print(worked_out(kinds["fully_shard"]), cadence(kinds["fully_shard"].products))


if __name__ == "__main__":
    main()
