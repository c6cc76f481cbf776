"""One small training in every framework, and the same as a plain PyTorch loop, which is the oracle."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from training import connect

SAMPLES, BATCH = 48, 8  # six batches an epoch


@dataclass(frozen=True)
class Feature:
    """What a training uses beside the optimizer."""

    groups: bool = False
    schedule: bool = False
    accumulate: int = 1
    clip: float | None = None
    amp: bool = False
    compile: bool = False
    epochs: int = 1


FEATURES = {
    "plain": Feature(),
    "groups": Feature(groups=True),
    "scheduler": Feature(schedule=True),
    "accumulation": Feature(accumulate=2),
    "clipping": Feature(clip=0.05),
    "amp": Feature(amp=True),
    "compile": Feature(compile=True),
}


@dataclass
class Seen:
    """What a training looked like: a number a step, and the weights at its end."""

    rates: list[float] = field(default_factory=list)
    eta_crit: list[float] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)

    def step(self, optimizer: Any, watch: Any) -> None:
        self.rates.append(optimizer.param_groups[-1]["effective_lr"])
        self.eta_crit.append(watch.last.eta_crit)

    def end(self, model: nn.Module) -> Seen:
        self.weights = [p.detach().clone() for p in model.parameters()]
        return self


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 2))


def loader(batch: int = BATCH) -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, 6, generator=generator)
    y = torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin()], 1)
    return DataLoader(TensorDataset(x, y), batch_size=batch)


def optimizer_for(kind: str, model: nn.Module, net: nn.Module, criterion: Any, feature: Feature, **more: Any) -> Any:
    """The optimizer of the loop and who measures. `model` is what the loop calls, `net` what has the parameters."""
    groups: Any = net.parameters()
    if feature.groups:
        groups = [{"params": net[0].parameters()}, {"params": net[2].parameters(), "lr": 0.5}]  # type: ignore[index]
    connection = {"model": model, "criterion": criterion, "every": 1, **more}
    if kind == "CatapultSGD":
        return connect(kind, groups, momentum=0.5, **connection)
    return connect(kind, groups, lambda params: torch.optim.AdamW(params, lr=1.0), **connection)


def schedule_for(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.LinearLR(optimizer, 0.2, total_iters=4)


def compiled(net: nn.Module, feature: Feature) -> Any:
    return torch.compile(net, backend="eager") if feature.compile else net


def plain(kind: str, feature: Feature, batch: int = BATCH) -> Seen:
    """The loop by hand."""
    net, criterion, seen = network(), nn.MSELoss(), Seen()
    model = compiled(net, feature)
    optimizer, watch = optimizer_for(kind, model, net, criterion, feature)
    schedule = schedule_for(optimizer) if feature.schedule else None
    for _ in range(feature.epochs):
        for i, (x, y) in enumerate(loader(batch)):
            with torch.autocast("cpu", torch.bfloat16) if feature.amp else nullcontext():
                loss = criterion(model(x), y)
            (loss / feature.accumulate).backward()
            if (i + 1) % feature.accumulate:
                continue
            if feature.clip is not None:
                nn.utils.clip_grad_norm_(net.parameters(), feature.clip)
            optimizer.step()
            optimizer.zero_grad()
            seen.step(optimizer, watch)
            if schedule is not None:
                schedule.step()
    return seen.end(net)


def assert_same(ours: Seen, oracle: Seen) -> None:
    """To the bit: a framework calls the same operations in the same order."""
    assert ours.eta_crit == oracle.eta_crit and ours.rates == oracle.rates
    assert all(torch.equal(p, q) for p, q in zip(ours.weights, oracle.weights, strict=True))
