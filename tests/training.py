"""One small training under any of the faces, which the tests of trainings share.

A face is "CatapultSGD", "CatapultLR" or "CatapultMonitor"; "" is a torch optimizer alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from catapult_opt import CatapultLR, CatapultMonitor, CatapultPolicy, CatapultSGD

FACES = ("CatapultSGD", "CatapultLR", "CatapultMonitor")
DRIVING = FACES[:2]  # those that set the rate
Batch = tuple[Any, Any]
Base = Callable[[Any], Optimizer]

# Whatever the policy does it does soon: some tens of steps pass through all of it.
QUICK = CatapultPolicy(start=1.0, near=1.0, climb=0.5, creep=0.2, hold=2, height=0.5)
BASES: dict[str, Base] = {
    "CatapultLR": lambda params: Adam(params, lr=0.01),
    "CatapultMonitor": lambda params: SGD(params, lr=0.01, momentum=0.5),
}


def net(
    *sizes: int, activation: type[nn.Module] = nn.Tanh, norm: bool = False, dropout: float = 0.0, seed: int = 0
) -> nn.Sequential:
    """Linear layers of these sizes with BatchNorm, activation and Dropout between them; a seed gives the weights."""
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for i, (a, b) in enumerate(itertools.pairwise(sizes)):
            if i:
                layers += [nn.BatchNorm1d(a)] if norm else []
                layers += [activation()]
                layers += [nn.Dropout(dropout)] if dropout else []
            layers.append(nn.Linear(a, b))
    return nn.Sequential(*layers)


def noise(n: int, inputs: int, outputs: int = 1, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Batch:
    """Inputs and targets of `n` samples that have nothing to do with each other."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, k, generator=generator, dtype=dtype) for k in (inputs, outputs))
    return x, y


def product(n: int = 40, inputs: int = 6) -> Batch:
    """The target is the product of the first two inputs: small nets that learn it make catapults."""
    x = torch.randn(n, inputs, generator=torch.Generator().manual_seed(7))
    return x, x[:, :1] * x[:, 1:2]


def connect(face: str, params: Any, base: Base | None = None, **settings: Any) -> tuple[Any, Any]:
    """The optimizer that a loop steps, and who measures in it. `base` makes the optimizer that a face stands beside."""
    if face == "CatapultSGD":
        optimizer = CatapultSGD(params, **settings)
        return optimizer, optimizer
    other = (base or BASES[face])(params)
    if face == "":
        return other, None
    return other, (CatapultLR if face == "CatapultLR" else CatapultMonitor)(other, **settings)


class Training:
    """Model, criterion, batches in turn, the optimizer, and `watch`, who measures: under CatapultSGD the optimizer.

    `settings` go to the face. A criterion that is a plain function is called as the face's module around it.
    """

    def __init__(
        self,
        face: str = "CatapultSGD",
        model: nn.Module | None = None,
        data: Batch | list[Batch] | None = None,
        *,
        criterion: Any = None,
        params: Any = None,
        base: Base | None = None,
        **settings: Any,
    ) -> None:
        self.model: Any = net(5, 16, 1) if model is None else model
        given = noise(20, 5) if data is None else data
        self.batches = given if isinstance(given, list) else [given]
        self.criterion: Any = nn.MSELoss() if criterion is None else criterion
        params = list(self.model.parameters()) if params is None else params
        if face:
            settings = {"model": self.model, "criterion": self.criterion, **settings}
        self.optimizer, self.watch = connect(face, params, base, **settings)
        if self.watch is not None and not isinstance(self.criterion, nn.Module):
            self.criterion = self.watch.criterion
        self.done = 0

    @property
    def batch(self) -> Batch:
        """The next one."""
        return self.batches[self.done % len(self.batches)]

    @property
    def x(self) -> Any:
        return self.batch[0]

    @property
    def y(self) -> Any:
        return self.batch[1]

    def loss(self, x: Any = None, y: Any = None) -> Tensor:
        x, y = self.batch if x is None else (x, y)
        loss: Tensor = self.criterion(self.model(x), y)
        return loss

    def backward(self, x: Any = None, y: Any = None) -> Tensor:
        """The loss of the batch, with fresh gradients: a closure, too."""
        self.optimizer.zero_grad()
        loss = self.loss(x, y)
        loss.backward()
        return loss

    def step(self, x: Any = None, y: Any = None) -> float:
        """One step on the next batch, or on the one given; its loss."""
        loss = self.backward(x, y)
        self.optimizer.step()
        self.done += 1
        return float(loss.detach())

    def steps(self, count: int, *, closure: bool = False, schedulers: Iterable[Any] = ()) -> list[float]:
        losses = []
        for _ in range(count):
            if closure:
                losses.append(float(self.optimizer.step(lambda: self.backward()).detach()))
                self.done += 1
            else:
                losses.append(self.step())
            for scheduler in schedulers:
                scheduler.step(losses[-1]) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()
        return losses

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])

    def rates(self) -> list[float]:
        """What each group moved at."""
        return [float(group["effective_lr"]) for group in self.optimizer.param_groups]

    def finite(self) -> bool:
        """Weights, and running statistics."""
        return all(bool(t.isfinite().all()) for t in self.model.state_dict().values())

    def hooks(self) -> int:
        """On the modules of model and criterion."""
        modules = [*self.model.modules(), *self.criterion.modules()]
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        return sum(len(getattr(module, kind)) for module in modules for kind in kinds)

    def parts(self) -> dict[str, Any]:
        """What has a state_dict."""
        parts = {"model": self.model, "optimizer": self.optimizer}
        return {**parts, "controller": self.watch} if isinstance(self.watch, CatapultLR) else parts

    def checkpoint(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts().items()}

    def load(self, checkpoint: dict[str, Any]) -> None:
        for name, part in self.parts().items():
            part.load_state_dict(checkpoint[name])
