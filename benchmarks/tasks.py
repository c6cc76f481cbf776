"""The tasks of the generalization benchmark: a line each.

Tasks "-ntk" use the thesis' networks (no biases, NTK parameterisation), all others PyTorch's default layers. Rank tasks
are the thesis' synthetic regressions; the rest are small pieces of public data sets, read from a folder of the user's.
The seed draws everything: samples or split, label noise, initial weights, order of the batches. It never depends on the
optimizer, so that runs of one seed are paired.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from catapult_opt.analysis import tasks as synthetic
from catapult_opt.analysis.datasets import Data, DataSet, standardized, with_label_noise
from catapult_opt.analysis.networks import mlp
from catapult_opt.analysis.tasks import Split

_EVALUATION_CHUNK = 1000


@dataclass(frozen=True)
class Task:
    """What is trained on what; all numbers are at the benchmark's small size."""

    name: str
    source: str  # "rank-2", "rank-3", "rank-4", or a data set of catapult_opt.analysis.datasets
    net: str  # "ntk" (the thesis' MLP), "mlp" or "cnn" (PyTorch's defaults)
    depth: int  # weight layers
    width: int  # of the hidden layers, channels of the first convolution
    train: int  # samples
    steps: int
    batch: int | None = None  # None: all of them
    loss: str = "mse"  # "mse" or "ce"
    classes: tuple[int, ...] | None = None  # the data set's labels; all without them
    noise: float = 0.0  # part of the labels that are wrong, in training and validation
    d: int = 50  # inputs of a rank task
    val: int = 500
    test: int = 1000

    @property
    def classifies(self) -> bool:
        return not self.source.startswith("rank-")

    @property
    def metric(self) -> str:
        return "test error, %" if self.classifies else "test loss"

    def enlarged(self) -> Task:
        """Four times as wide, twice the samples, inputs and steps: nearer to the thesis' sizes, some 30 times the work.

        SVHN has 1,705 pictures of 0 and 2, so that its training set stays.
        """
        samples = 1 if self.source == "svhn" else 2
        return replace(self, width=4 * self.width, train=samples * self.train, d=2 * self.d, steps=2 * self.steps)


@dataclass(frozen=True, eq=False)
class Problem:
    """A task with its data drawn."""

    task: Task
    train: Split
    val: Split
    test: Split
    egop: Tensor | None = None  # (d, d), of a rank task

    def build(self) -> nn.Module:
        """The network, with weights from the global random state."""
        task = self.task
        shape = self.train.inputs.shape[1:]
        outputs = 1 if not task.classifies else self._outputs()
        if task.net == "ntk":
            return mlp(shape.numel(), task.width, task.depth, outputs, parameterization="ntk")
        return _cnn(shape, task.width, task.depth, outputs) if task.net == "cnn" else _mlp(shape, task, outputs)

    def _outputs(self) -> int:
        if self.task.loss == "mse":
            return self.train.targets.shape[1]
        return int(max(split.targets.max() for split in (self.train, self.val, self.test))) + 1

    def batches(self, seed: int) -> Iterator[Tensor]:
        """Row numbers, endless: all of them, or a new order every epoch (the last, smaller batch left out)."""
        n, generator = len(self.train), torch.Generator().manual_seed(seed)
        if self.task.batch is None:
            yield from itertools.repeat(torch.arange(n))
        size = self.task.batch or n
        while True:
            order = torch.randperm(n, generator=generator)
            yield from torch.split(order[: n - n % size], size)

    @torch.no_grad()
    def outputs(self, model: nn.Module, split: Split) -> Tensor:
        return torch.cat([model(x) for x in torch.split(split.inputs, _EVALUATION_CHUNK)])

    def loss(self, model: nn.Module, split: Split) -> float:
        return float(criterion(self.task)(self.outputs(model, split), split.targets))

    def value(self, model: nn.Module) -> float:
        """The metric on the test split: error in per cent, or loss."""
        outputs, targets = self.outputs(model, self.test), self.test.targets
        if not self.task.classifies:
            return float(criterion(self.task)(outputs, targets))
        if self.task.loss == "ce":
            wrong = outputs.argmax(1) != targets
        elif targets.shape[1] == 1:
            wrong = (outputs > 0) != (targets > 0)
        else:
            wrong = outputs.argmax(1) != targets.argmax(1)
        return 100 * float(wrong.float().mean())


def criterion(task: Task) -> nn.Module:
    return nn.MSELoss() if task.loss == "mse" else nn.CrossEntropyLoss()


def draw(task: Task, folder: Path | None, seed: int) -> Problem:
    """The task's data of this seed.

    Raises:
        DataError: a data set is missing; says how to get it.
    """
    if not task.classifies:
        made = synthetic.rank(int(task.source[-1]), task.train, task.val, task.test, d=task.d, seed=seed)
        return Problem(task, made.train, made.val, made.test, made.egop)
    data = _load(folder, task.source, task.classes)
    train, val, test = data.draw(task.train, task.val, min(task.test, len(data) - task.train - task.val), seed=seed)
    train, val = (with_label_noise(split, task.noise, seed=seed + i) for i, split in enumerate((train, val)))
    if train.inputs.ndim > 2:  # pictures and spectrograms; a bag of words has rows of length 1 and stays
        train, val, test = standardized(train, val, test)
    if task.loss == "ce":
        train, val, test = (replace(split, targets=_numbers(split.targets)) for split in (train, val, test))
    return Problem(task, train, val, test)


def check(tasks: Iterable[Task], folder: Path | None) -> None:
    """Read every data set that is needed, so that a missing one is known before hours have passed.

    Raises:
        DataError: says which, and how to get it.
    """
    for task in tasks:
        if task.classifies:
            _load(folder, task.source, task.classes)


@functools.cache
def _load(folder: Path | None, name: str, classes: tuple[int, ...] | None) -> DataSet:
    data = Data(folder).load(name, classes)
    if data.inputs.ndim == 4 and data.inputs.shape[-1] == 32:  # 32x32 pictures at 16x16: four times the speed
        return replace(data, inputs=nn.functional.avg_pool2d(data.inputs, 2))
    return data


def _numbers(targets: Tensor) -> Tensor:
    """Places of the classes, from -1 and +1 or one-hot rows."""
    return (targets[:, 0] > 0).long() if targets.shape[1] == 1 else targets.argmax(1)


def _mlp(shape: torch.Size, task: Task, outputs: int) -> nn.Module:
    sizes = [shape.numel()] + [task.width] * (task.depth - 1)
    hidden = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(sizes[-1], outputs))


def _cnn(shape: torch.Size, width: int, depth: int, outputs: int) -> nn.Module:
    """Convolutions of twice the channels and half the size each, and a linear layer."""
    channels = [shape[0]] + [width * 2**i for i in range(depth - 1)]
    layers = [
        layer
        for a, b in itertools.pairwise(channels)
        for layer in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    ]
    size = shape[1] // 2 ** (depth - 1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * size**2, outputs))


DEFAULT: tuple[Task, ...] = (
    Task("rank2", "rank-2", "mlp", depth=2, width=256, train=1000, steps=400),
    Task("rank4", "rank-4", "mlp", depth=4, width=64, train=1000, steps=400),
    Task("fashion", "fashion_mnist", "mlp", depth=3, width=64, train=1000, steps=1000, batch=50, loss="ce"),
    Task("mnist-noise", "mnist", "mlp", depth=3, width=64, train=1000, steps=1000, batch=50, noise=0.1),
    Task("rank2-b50", "rank-2", "mlp", depth=2, width=128, train=1000, steps=1500, batch=50),
    Task("usps-noise", "usps", "mlp", depth=3, width=64, train=500, steps=500, loss="ce", noise=0.1),
    Task("plane-bird", "cifar10", "cnn", depth=3, width=6, train=1000, steps=500, batch=32, loss="ce", classes=(0, 2)),
    Task("ag-news", "ag_news", "mlp", depth=2, width=64, train=1000, steps=1000, batch=50, loss="ce"),
    Task("svhn", "svhn", "cnn", depth=3, width=6, train=500, steps=500, batch=32, classes=(0, 2)),
    Task("rank4-ntk-b50", "rank-4", "ntk", depth=4, width=64, train=1000, steps=1200, batch=50),
    Task("horse-truck", "cifar10", "mlp", depth=3, width=64, train=300, steps=500, classes=(7, 9)),
    Task("fsdd", "fsdd", "mlp", depth=3, width=64, train=500, steps=600, batch=20, loss="ce"),
    Task("rank3", "rank-3", "mlp", depth=4, width=64, train=1000, steps=400),
    Task("rank2-ntk", "rank-2", "ntk", depth=2, width=256, train=1000, steps=400),
)  # fmt: skip

_MORE: tuple[Task, ...] = (
    Task("rank2-ntk-b10", "rank-2", "ntk", depth=2, width=256, train=1000, steps=3000, batch=10),
    Task("rank2-ntk-b100", "rank-2", "ntk", depth=2, width=256, train=1000, steps=1500, batch=100),
    Task("rank3-ntk", "rank-3", "ntk", depth=4, width=64, train=1000, steps=400),
    Task("rank4-ntk", "rank-4", "ntk", depth=4, width=64, train=1000, steps=400),
    Task("rank4-b50", "rank-4", "mlp", depth=4, width=64, train=1000, steps=1600, batch=50),
    Task("mnist", "mnist", "mlp", depth=3, width=64, train=1000, steps=1500, batch=50),
    Task("usps", "usps", "mlp", depth=3, width=64, train=500, steps=800, loss="ce"),
    Task("plane-bird-mlp", "cifar10", "mlp", depth=3, width=64, train=500, steps=800, loss="ce", classes=(0, 2)),
    Task("horse-truck-cnn", "cifar10", "cnn", depth=3, width=6, train=300, steps=600, classes=(7, 9)),
    Task("fashion-100", "fashion_mnist", "mlp", depth=3, width=64, train=100, steps=600, loss="ce"),
    Task("fashion-2000", "fashion_mnist", "mlp", depth=3, width=64, train=2000, steps=2000, batch=50, loss="ce"),
)  # fmt: skip


def _with_the_other_loss(task: Task) -> Task:
    loss = "ce" if task.loss == "mse" else "mse"
    return replace(task, name=f"{task.name}-{loss}", loss=loss)


# Every real task also with the loss it does not have above, as "fashion-mse".
TASKS: dict[str, Task] = {
    task.name: task
    for task in (*DEFAULT, *_MORE, *(_with_the_other_loss(t) for t in (*DEFAULT, *_MORE) if t.classifies))
}
