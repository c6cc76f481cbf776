"""Training on a small set with its whole tangent kernel taken before every step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn

from catapult_opt.catapults import SPIKE as SPIKE
from catapult_opt.catapults import above

from .. import tasks
from ..datasets import averaged, standardized
from ..networks import cnn, mlp, myrtle5, vit, wide_resnet
from ..ntk import critical_rate, eigenspaces, loss_in_eigenspace, ntk
from ..tasks import Split
from .artefact import Data, Setting
from .training import batches

__all__ = ["DOUBLE", "SPIKE", "WIGGLE", "Trace", "episodes", "examples", "mean", "network", "rises", "share", "trace"]

DIVERGED = 1e6  # times the first loss
# The figures of SGD (4.5 to 4.7) also show spikes lower than `SPIKE`, the package's: a rise by a tenth, and back.
WIGGLE = 1.1
DOUBLE = 2.0


@dataclass
class Trace:
    """One entry a step, taken before the step; the last entry is taken after the last step."""

    loss: list[float] = field(default_factory=list)
    top: list[float] = field(default_factory=list)  # in the top eigenspace of the kernel
    rest: list[float] = field(default_factory=list)  # in its complement
    norm: list[float] = field(default_factory=list)  # spectral norm of the kernel
    rate: list[float] = field(default_factory=list)  # critical rate of the training set, n / norm
    batch_rate: list[float] = field(default_factory=list)  # of the step's batch, one less than the others
    lr: list[float] = field(default_factory=list)  # of the step, one less than the others

    @property
    def diverged(self) -> bool:
        return not self.loss[-1] <= DIVERGED * self.loss[0]

    @property
    def curves(self) -> dict[str, list[float]]:
        return {key: [float(f"{x:.6g}") for x in values] for key, values in vars(self).items()}


def trace(
    model: nn.Module,
    train: Split,
    lrs: Sequence[float],
    *,
    top: int = 5,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
    target: float = 0.0,
) -> Trace:
    """Gradient descent on (1/n) |f - y|^2, or SGD if there is a ``batch_size``, at the given rate of every step.

    Ends after the last rate, at a training loss below ``target``, or when the loss has diverged. The critical rate of a
    batch comes from its block of the kernel, so the model must not depend on batch statistics.
    """
    found = Trace()
    n = len(train)
    source = batches(n, batch_size or n, generator or torch.Generator())
    for lr in [*lrs, None]:
        residual, kernel = _residual(model, train), ntk(model, train.inputs)
        loss = float(residual.square().sum()) / n
        found.loss.append(loss)
        if not math.isfinite(loss) or not bool(kernel.isfinite().all()):
            for values in (found.top, found.rest, found.norm, found.rate):
                values.append(math.nan)
            break
        spaces = eigenspaces(kernel)
        inside, outside = loss_in_eigenspace(residual, spaces, top)
        norm = float(spaces.values[0])
        for values, value in ((found.top, inside), (found.rest, outside), (found.norm, norm)):
            values.append(value)
        found.rate.append(n / norm if norm > 0 else math.inf)
        if lr is None or loss < target or found.diverged:
            break
        batch = next(source)
        found.lr.append(lr)
        found.batch_rate.append(_block_rate(kernel, batch, n))
        _step(model, train, batch, lr)
    return found


def _block_rate(kernel: Tensor, batch: Tensor, n: int) -> float:
    k = len(kernel) // n
    rows = (batch[:, None] * k + torch.arange(k)).flatten()
    return critical_rate(kernel[rows][:, rows], len(batch))


@torch.no_grad()
def _residual(model: nn.Module, split: Split) -> Tensor:
    outputs: Tensor = model(split.inputs)
    return outputs - split.targets


def _step(model: nn.Module, train: Split, batch: Tensor, lr: float) -> None:
    loss = (model(train.inputs[batch]) - train.targets[batch]).square().sum() / len(batch)
    params = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p, g in zip(params, torch.autograd.grad(loss, params), strict=True):
            p.sub_(g, alpha=lr)


# ----------------------------------------------------------------------------------------------------------- problems


def examples(problem: Setting, n: int, seed: int, data: Data, *sizes: int) -> list[Split]:
    """Random splits of a problem's data set: a training set of ``n`` first, then these sizes.

    Args:
        problem: ``dataset``, and ``classes`` and ``image_size``; "rank-2" and the like are the synthetic tasks. Pixels
            are averaged down to ``image_size`` first; then ``pixels`` says what becomes of them: "standardised" per
            channel by the training set, which is what happens without it, or "[-1, 1]". The thesis prints neither.
    """
    if problem["dataset"].startswith("rank-"):
        task = tasks.rank(int(problem["dataset"][-1]), n, max(sizes, default=1), 1, seed=seed)
        return [task.train, *([task.val] if sizes else [])]
    every = data.load(problem["dataset"], classes=problem["classes"])
    splits = [averaged(split, problem["image_size"]) for split in every.draw(n, *sizes, seed=seed)]
    if problem.get("pixels", "standardised") == "standardised":
        return standardized(*splits)
    return [Split(2 * split.inputs - 1, split.targets) for split in splits]


def network(problem: Setting, train: Split, seed: int) -> nn.Module:
    """The problem's ``network``, of its ``width``: fcn-2, fcn-5, cnn-5, wrn-10, vit-4 or myrtle-5.

    Its ``parameterization`` and ``bias`` are those of `networks.mlp`. The Wide ResNet has no BatchNorm: with it the
    outputs, and so the kernel, depend on the batch.
    """
    options = {key: problem[key] for key in ("parameterization", "bias") if key in problem}
    generator = torch.Generator().manual_seed(10_000 + seed)  # not the data's seed
    kind, _, depth = problem["network"].partition("-")
    width = problem["width"]
    d_out = train.targets.shape[1]
    shape = train.inputs.shape[1:]
    if kind == "fcn":
        return mlp(math.prod(shape), width, int(depth), d_out, generator=generator, **options)
    channels, size = shape[0], shape[-1]
    if kind == "cnn":
        return cnn(channels, width, int(depth), size, d_out, generator=generator, **options)
    if kind == "wrn":
        return wide_resnet(channels, d_out, widen=width, norm=False, generator=generator, **options)
    if kind == "myrtle":
        return myrtle5(channels, width, d_out, generator=generator, **options)
    if kind == "vit":
        return vit(channels, size, d_out, width=width, depth=int(depth), generator=generator, **options)
    raise ValueError(f"no network is called {problem['network']!r}")


def episodes(losses: Sequence[float], factor: float = SPIKE) -> list[tuple[int, int]]:
    """Spikes as (start, end): the loss rises above ``factor`` times its value at start, and is back at end.

    A spike that has not come back by the end of training is not one. `CatapultCounter` counts the same episodes in a
    run that goes on, and asks for a lower curvature besides.
    """
    found = []
    start, up = 0, False
    for t, loss in enumerate(losses):
        if up and loss <= losses[start]:
            found.append((start, t))
            up = False
        if not up and loss <= losses[start]:
            start = t
        up = up or loss > above(losses[start], factor)
    return found


def rises(losses: Sequence[float]) -> list[int]:
    """Steps t after which the loss is higher than before."""
    return [t for t, (before, after) in enumerate(pairwise(losses)) if after > before]


def share(flags: Sequence[bool]) -> float:
    """Of the flags that are set; NaN where there are none."""
    return sum(flags) / len(flags) if flags else math.nan


def mean(numbers: Sequence[float]) -> float:
    """NaN where there are none."""
    return sum(numbers) / len(numbers) if numbers else math.nan
