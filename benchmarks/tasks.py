"""The tasks of the generalization benchmark: a line each.

Tasks "-ntk" use the thesis' networks (no biases, NTK parameterisation), all others PyTorch's default layers. Rank tasks
are the thesis' synthetic regressions, the sine task is one more, with a smooth network. The text is that of Python's
help topics, which differ a little from one version of Python to the next. The rest are small pieces of public data
sets, read from a folder of the user's.
The seed draws everything: samples or split, label noise, initial weights, order of the batches. It never depends on the
optimizer, so that runs of one seed are paired.
"""

from __future__ import annotations

import functools
import itertools
import math
import string
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from models import GPT, WideBlock
from torch import Tensor, nn

from catapult_opt.analysis import tasks as synthetic
from catapult_opt.analysis.datasets import Data, DataSet, standardized, with_label_noise
from catapult_opt.analysis.networks import mlp
from catapult_opt.analysis.tasks import Split

_EVALUATION_CHUNK = 1000
_CONTEXT = 32  # characters that the GPT sees
_HEADS = 2
_CHARACTERS = string.printable  # its vocabulary: any other character becomes a question mark


@dataclass(frozen=True)
class Task:
    """What is trained on what; all numbers are at the benchmark's small size."""

    name: str
    source: str  # "rank-2", "rank-3", "rank-4", "sine", "topics", or a data set of catapult_opt.analysis.datasets
    net: str  # "ntk" (the thesis' MLP), or of PyTorch's layers "mlp", "tanh", "cnn", "resnet" (BatchNorm) or "gpt"
    depth: int  # weight layers; of a GPT blocks
    width: int  # of the hidden layers, channels of the first convolution
    train: int  # samples
    steps: int
    batch: int | None = None  # None: all of them
    loss: str = "mse"  # "mse" or "ce"
    classes: tuple[int, ...] | None = None  # the data set's labels; all without them
    noise: float = 0.0  # part of the labels that are wrong, in training and validation
    d: int = 50  # inputs of a synthetic task
    val: int = 500
    test: int = 1000
    base: str = "sgd"  # the optimizer whose rate CatapultSGD's controller drives: "sgd" or "adamw"

    @property
    def synthetic(self) -> bool:
        return self.source.startswith("rank-") or self.source == "sine"

    @property
    def classifies(self) -> bool:
        return not self.synthetic and self.source != "topics"

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
    egop: Tensor | None = None  # (d, d), of a synthetic task

    def build(self) -> nn.Module:
        """The network, with weights from the global random state."""
        task = self.task
        shape = self.train.inputs.shape[1:]
        if task.net == "gpt":
            return GPT(len(_CHARACTERS), _CONTEXT, task.width, task.depth, _HEADS)
        outputs = self._outputs() if task.classifies else 1
        if task.net == "ntk":
            return mlp(shape.numel(), task.width, task.depth, outputs, parameterization="ntk")
        if task.net == "resnet":
            return _resnet(shape, task.width, outputs)
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

    def pairs(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets of the batches."""
        return ((self.train.inputs[rows], self.train.targets[rows]) for rows in self.batches(seed))

    @torch.no_grad()
    def outputs(self, model: nn.Module, split: Split) -> Tensor:
        """In evaluation mode, out of which the model comes as it went in."""
        training = model.training
        model.eval()
        out = torch.cat([model(x) for x in torch.split(split.inputs, _EVALUATION_CHUNK)])
        model.train(training)
        return out

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
    if task.source == "topics":
        train, val, test = _text(task, seed)
        return Problem(task, train, val, test)
    if task.source == "sine":
        (train, val, test), egop = sine((task.train, task.val, task.test), task.d, seed)
        return Problem(task, train, val, test, egop)
    if task.synthetic:
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


def sine(sizes: tuple[int, ...], d: int, seed: int) -> tuple[list[Split], Tensor]:
    """Splits with x ~ N(0, I_d) and y = sin(2 x1) + x2 x3, scaled to variance 1, without noise; and the EGOP (d, d)."""
    generator = torch.Generator().manual_seed(seed)
    variance = (1 - math.exp(-8)) / 2 + 1  # E sin(2 x)^2 + E (x2 x3)^2
    splits = []
    for n in sizes:
        x = torch.randn(n, d, generator=generator)
        y = torch.sin(2 * x[:, :1]) + x[:, 1:2] * x[:, 2:3]
        splits.append(Split(x, y / math.sqrt(variance)))
    slopes = torch.zeros(d)
    slopes[:3] = torch.tensor([2 * (1 + math.exp(-8)), 1.0, 1.0])  # E (2 cos 2 x1)^2, E x3^2, E x2^2
    return splits, torch.diag(slopes / variance)


@functools.cache
def _topics() -> Tensor:
    """Numbers of the characters of Python's help topics, in the order of their names."""
    from pydoc_data.topics import topics

    other = _CHARACTERS.index("?")
    places = {character: i for i, character in enumerate(_CHARACTERS)}
    text = "\n".join(topics[name] for name in sorted(topics))
    return torch.tensor([places.get(character, other) for character in text])


def _text(task: Task, seed: int) -> list[Split]:
    """Windows of the text that do not overlap, dealt out at random; the targets are the next characters."""
    text = _topics()
    windows = text[: len(text) // (_CONTEXT + 1) * (_CONTEXT + 1)].view(-1, _CONTEXT + 1)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    parts = torch.split(windows[order[: task.train + task.val + task.test]], [task.train, task.val, task.test])
    return [Split(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in parts]


def _mlp(shape: torch.Size, task: Task, outputs: int) -> nn.Module:
    sizes = [shape.numel()] + [task.width] * (task.depth - 1)
    between = nn.Tanh if task.net == "tanh" else nn.ReLU
    hidden = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), between())]
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


def _resnet(shape: torch.Size, width: int, outputs: int) -> nn.Module:
    """ResNet-8 with BatchNorm before the activations: three stages of one block, twice the channels each."""
    blocks = [WideBlock(width, width, 1), WideBlock(width, 2 * width, 2), WideBlock(2 * width, 4 * width, 2)]
    head = [nn.BatchNorm2d(4 * width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, outputs)]
    return nn.Sequential(nn.Conv2d(shape[0], width, 3, 1, 1, bias=False), *blocks, *head)


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
    Task("sine-tanh", "sine", "tanh", depth=3, width=64, train=1000, steps=600, d=20),
    Task("resnet", "cifar10", "resnet", depth=8, width=6, train=1000, steps=250, batch=32, loss="ce", classes=(0, 2)),
    Task("gpt", "topics", "gpt", depth=2, width=32, train=2000, steps=400, batch=16, loss="ce", val=200, test=300,
         base="adamw"),
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
    Task("resnet-horse-truck", "cifar10", "resnet", depth=8, width=6, train=1000, steps=250, batch=32, loss="ce",
         classes=(7, 9)),
    Task("gpt-sgd", "topics", "gpt", depth=2, width=32, train=2000, steps=400, batch=16, loss="ce", val=200, test=300),
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
