"""Training loops that several artefacts share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, count, islice

import torch
from torch import Tensor, nn

from catapult_opt import CatapultMonitor

from ..agop import agop, alignment
from ..tasks import RegressionTask, Split
from .artefact import Record, Result

__all__ = ["TARGET_LOSS", "batches", "measure", "mse", "train", "train_sgd"]

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
                    **_test_error(model, task.test),
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


def train(
    model: nn.Module,
    task: RegressionTask,
    optimizer: torch.optim.Optimizer,
    source: Iterator[Tensor],
    *,
    steps: int,
    evaluate_every: int,
    lrs: Sequence[float] | None = None,
    limit: Callable[[Sequence[float]], float] | None = None,
    target_loss: float = TARGET_LOSS,
) -> Result:
    """Any optimizer on the mean squared error; test loss and AGOP alignment are those at the best validation loss.

    Args:
        source: batches as indices, see `batches`.
        lrs: the rate of every step, in place of the optimizer's own.
        limit: called before every step with the training losses so far; ``lrs`` is cut off at what it returns.

    Ends after ``steps``, below ``target_loss``, or at a loss that is not finite.
    """
    criterion = nn.MSELoss()
    best: Result = {"val_loss": math.inf, "test_loss": math.nan, "alignment": math.nan, "best_step": 0}
    curves: dict[str, list[float]] = {"loss": [], "val_step": [], "val_loss": []}
    for step in range(steps + 1):
        if step % evaluate_every == 0 or step == steps:
            val_loss = mse(model, task.val)
            curves["val_step"].append(step)
            curves["val_loss"].append(val_loss)
            if val_loss < best["val_loss"]:
                best = {"val_loss": val_loss, "best_step": step, "test_loss": mse(model, task.test)}
                best["alignment"], best["agop"] = _features(model, task)
                best.update(_test_error(model, task.test))
            if step and not target_loss <= mse(model, task.train) < math.inf:
                break
        if step == steps:
            break
        batch = next(source)
        if lrs is not None:
            cut = math.inf if limit is None else limit(curves["loss"])
            optimizer.param_groups[0]["lr"] = min(lrs[step], cut)
        optimizer.zero_grad()
        loss = criterion(model(task.train.inputs[batch]), task.train.targets[batch])
        curves["loss"].append(float(loss.detach()))
        loss.backward()
        optimizer.step()
    block = best.pop("agop", torch.zeros(0, 0))[:10, :10]
    final = mse(model, task.train)
    return {**best, "steps": step, "train_loss": final, "curves": {**curves, "agop_block": block.tolist()}}


@torch.no_grad()
def _test_error(model: nn.Module, split: Split) -> Result:
    """Share of the examples that are put into another class than their own; nothing for regression."""
    targets = split.targets
    if targets.shape[1] > 1:
        wrong = model(split.inputs).argmax(1) != targets.argmax(1)
    elif bool((targets.abs() == 1).all()):
        wrong = model(split.inputs).sign() != targets
    else:
        return {}
    return {"test_error": float(wrong.float().mean())}


def measure(records: Sequence[Record]) -> str:
    """The key by which the test performance goes: of classification the error, of regression the loss."""
    return "test_error" if all("test_error" in record["result"] for record in records) else "test_loss"


def _features(model: nn.Module, task: RegressionTask) -> tuple[float, Tensor]:
    """Alignment of the model's AGOP on the training inputs with the task's EGOP, and the AGOP."""
    found = agop(model, task.train.inputs)
    return (alignment(found, task.egop) if bool(found.any()) else 0.0), found
