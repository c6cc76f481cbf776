"""Random training problems for the guards: depth, width, scale, loss, batch, dtype, and how the optimizer is set.

As a command it runs many and names the seeds that fail: `python tests/random_problems.py --problems 1000`.
"""

from __future__ import annotations

import argparse
import math
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from catapult_opt import CatapultPolicy, CatapultSGD, MeasurementError

STEPS = 200


@dataclass
class Problem:
    """One problem, the same for the same seed."""

    seed: int
    model: nn.Module
    criterion: nn.Module
    x: Tensor
    y: Tensor
    batch: int
    options: dict[str, Any]
    what: dict[str, Any] = field(default_factory=dict)  # how it was drawn

    def loss(self) -> float:
        """Of all the data, in train mode: the statistics of BatchNorm lag behind a rate as high as these."""
        with torch.no_grad():
            return float(self.criterion(self.model(self.x), self.y))


@dataclass
class Outcome:
    seed: int
    before: float
    after: float
    finite: bool  # the loss and every weight
    what: dict[str, Any]
    refused: str = ""  # the first batch could not be measured, and the error said so

    @property
    def failed(self) -> bool:
        return not self.refused and (not self.finite or self.after > self.before)


LOSSES: dict[str, Callable[[], nn.Module]] = {
    "mse": nn.MSELoss,
    "cross-entropy": nn.CrossEntropyLoss,
    "bce": nn.BCEWithLogitsLoss,
    "huber": nn.HuberLoss,
}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


def make(seed: int) -> Problem:
    """A net of random shape and scale, random data with something to learn in it, a random setting."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    depth, width, d = draw.randint(1, 5), draw.choice([4, 16, 64, 128]), draw.choice([2, 8, 20])
    n, loss = draw.choice([16, 64, 128]), draw.choice(list(LOSSES))
    batch = draw.choice([4, 16, n, n])
    dtype = draw.choice([torch.float32, torch.float32, torch.float64])
    scale, unit = draw.choice([0.3, 1.0, 1.0, 3.0]), draw.choice([0.1, 1.0, 10.0])
    outputs = 1 if loss in ("mse", "huber") and draw.random() < 0.6 else draw.randint(2, 5)
    activation, norm, bias = (
        draw.choice(list(ACTIVATIONS)),
        draw.choice(["", "", "batch", "layer"]),
        draw.random() < 0.7,
    )
    momentum, decay = draw.choice([0.0, 0.0, 0.5, 0.9]), draw.choice([0.0, 0.0, 1e-4, 1e-2])
    model = _net(d, width, depth, outputs, ACTIVATIONS[activation], norm, bias)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale if p.ndim > 1 else 1.0)
    x = torch.randn(n, d) * draw.choice([0.3, 1.0, 3.0])
    signal = (x @ torch.randn(d, outputs)).tanh() + 0.1 * torch.randn(n, outputs)
    y = {"cross-entropy": signal.argmax(1), "bce": (signal > 0).to(dtype)}.get(loss, (unit * signal).to(dtype))
    return Problem(
        seed,
        model.to(dtype),
        nn.HuberLoss(delta=unit) if loss == "huber" else LOSSES[loss](),
        x.to(dtype),
        y,
        batch,
        {"momentum": momentum, "weight_decay": decay},
        {"depth": depth, "width": width, "loss": loss, "batch": f"{batch}/{n}", "dtype": str(dtype)[6:],
         "scale": scale, "unit": unit, "activation": activation, "norm": norm, "bias": bias, "momentum": momentum,
         "weight_decay": decay},
    )  # fmt: skip


def _net(
    d: int, width: int, depth: int, outputs: int, activation: Callable[[], nn.Module], norm: str, bias: bool
) -> nn.Module:
    layers: list[nn.Module] = []
    for i in range(depth):
        layers.append(nn.Linear(d if i == 0 else width, width, bias=bias))
        layers += {"batch": [nn.BatchNorm1d(width)], "layer": [nn.LayerNorm(width)]}.get(norm, [])
        layers.append(activation())
    return nn.Sequential(*layers, nn.Linear(width, outputs, bias=bias))


def run(seed: int, *, steps: int = STEPS, total_known: bool = True) -> Outcome:
    """Train problem `seed` with nothing set (but the length, where it is known)."""
    problem = make(seed)
    policy = CatapultPolicy(total_steps=steps) if total_known else None
    optimizer = CatapultSGD(
        problem.model.parameters(), model=problem.model, criterion=problem.criterion, policy=policy, **problem.options
    )
    before = problem.loss()
    order = torch.Generator().manual_seed(seed)
    n, done = len(problem.x), 0
    while done < steps:
        for rows in torch.randperm(n, generator=order).split(problem.batch) if problem.batch < n else [slice(None)]:
            optimizer.zero_grad()
            problem.criterion(problem.model(problem.x[rows]), problem.y[rows]).backward()
            try:
                optimizer.step()
            except MeasurementError as error:
                return Outcome(seed, before, before, True, problem.what, refused=str(error))
            done += 1
            if done == steps:
                break
    optimizer.detach()
    after = problem.loss()
    finite = math.isfinite(after) and all(bool(p.isfinite().all()) for p in problem.model.parameters())
    return Outcome(seed, before, after, finite, problem.what)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train random problems; name those that end worse than they began.")
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first problem")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--open-end", action="store_true", help="without total_steps")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    failures = []
    for seed in range(options.first, options.first + options.problems):
        outcome = run(seed, steps=options.steps, total_known=not options.open_end)
        if outcome.failed:
            failures.append(seed)
            print(f"seed {seed}: {outcome.before:.4g} -> {outcome.after:.4g} {outcome.what}", flush=True)
    print(f"{len(failures)} of {options.problems} problems ended non-finite or above their first loss: {failures}")


if __name__ == "__main__":
    main()
