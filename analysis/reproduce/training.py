"""Training loops that several artefacts share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain, count, islice

import torch
from torch import Tensor, nn

from catapult_opt import CatapultMonitor

from ..agop import agop, alignment
from ..tasks import RegressionTask, Split
from .artefact import Result

__all__ = ["TARGET_LOSS", "batches", "mse", "train_sgd"]

TARGET_LOSS = 1e-3  # the thesis stops here (Appendix C.6)


def train_sgd(
    model: nn.Module,
    task: RegressionTask,
    *,
    lr: float,
    batch_size: int,
    max_steps: int,
    evaluate_every: int,
    measure_every: int,
    generator: torch.Generator,
) -> Result:
    """SGD at a constant rate on the mean squared error; everything is taken at the best validation loss.

    Super-critical steps (eta - eta_crit(batch) > 1e-8, the thesis' count of catapults in SGD, Section 4.4) are those of
    the measured steps up to the best validation loss, one in ``measure_every``.
    """
    criterion = nn.MSELoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    monitor = CatapultMonitor(optimizer, model=model, criterion=criterion, every=measure_every)
    best: Result = {"val_loss": math.inf}
    curves: dict[str, list[float]] = {"step": [], "train_loss": [], "val_loss": []}
    train_loss = math.nan
    for step, batch in enumerate(islice(batches(len(task.train), batch_size, generator), max_steps), start=1):
        optimizer.zero_grad()
        loss = criterion(model(task.train.inputs[batch]), task.train.targets[batch])
        loss.backward()
        optimizer.step()
        if step % evaluate_every == 0:
            train_loss, val_loss = mse(model, task.train), mse(model, task.val)
            for key, value in zip(curves, (step, train_loss, val_loss), strict=True):
                curves[key].append(value)
            if val_loss < best["val_loss"]:
                best = {
                    "best_step": step,
                    "val_loss": val_loss,
                    "test_loss": mse(model, task.test),
                    "alignment": alignment(agop(model, task.train.inputs), task.egop),
                    "super_critical": monitor.super_critical_steps,
                    "measured": monitor.measured_steps,
                    "super_critical_share": monitor.super_critical_steps / max(monitor.measured_steps, 1),
                }
            if not TARGET_LOSS <= train_loss < math.inf:
                break
    monitor.detach()
    missing = {} if "test_loss" in best else dict.fromkeys(("test_loss", "alignment", "super_critical_share"), math.nan)
    return {**best, **missing, "lr": lr, "train_loss": train_loss, "steps": step, "curves": curves}


def batches(n: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of batches without end, the data shuffled anew in every epoch."""
    return chain.from_iterable(torch.split(torch.randperm(n, generator=generator), batch_size) for _ in count())


@torch.no_grad()
def mse(model: nn.Module, split: Split) -> float:
    """Mean squared error over a split."""
    return float(nn.functional.mse_loss(model(split.inputs), split.targets))
