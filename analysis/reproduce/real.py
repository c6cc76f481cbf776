"""Classification of real images; their true features are those of a reference network trained on more examples."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from ..agop import agop
from ..datasets import Data, averaged, standardized, with_label_noise
from ..networks import cnn, mlp, myrtle5, wide_resnet
from ..tasks import RegressionTask, Split
from .artefact import Setting
from .training import batches

__all__ = ["image_network", "real_task"]

_DATASETS: dict[str, tuple[str, tuple[int, ...] | None]] = {
    "usps-2": ("usps", (0, 2)),  # classes 0 and 2: Appendix C.6
    "fashion-2": ("fashion_mnist", (0, 2)),
    "svhn-2": ("svhn", (0, 2)),
    "svhn": ("svhn", None),
    "celeba": ("celeba", None),  # with and without glasses
}


def real_task(name: str, spec: Setting, seed: int, data: Data) -> RegressionTask:
    """Two classes as -1 and +1 or several one-hot, pixels standardised and flattened; EGOP: a reference network's AGOP.

    The reference is in PyTorch's parameterisation, trained by Adam on the training and validation examples: a Myrtle
    network for two classes, a Wide ResNet 16-2 for more. Its AGOP is taken over the training inputs. ``target`` is the
    reference.

    Args:
        name: usps-2, fashion-2, svhn-2, svhn (ten classes) or celeba.
        spec: ``n``, ``n_eval``: training examples; validation and test examples, each. ``image_size``: reached by
            averaging pixels. ``reference_steps``: of Adam, 100 examples each. ``label_noise``: share of the training
            examples that get another class, if any; the reference sees the true ones.
        seed: of the splits and the reference.
    """
    folder = None if data.folder is None else str(data.folder)
    sizes = spec["n"], spec["n_eval"], spec["image_size"], spec["reference_steps"]
    task = _made(name, *sizes, seed, folder, data.download)
    noisy = with_label_noise(task.train, spec.get("label_noise", 0.0), seed)
    return RegressionTask(name, task.target, 0.0, noisy, task.val, task.test, task.egop)


@lru_cache(maxsize=4)
def _made(
    name: str, n: int, n_eval: int, image_size: int, reference_steps: int, seed: int, folder: str | None, download: bool
) -> RegressionTask:
    """Of plain values, because results are kept for the next case."""
    dataset, classes = _DATASETS[name]
    every = Data(folder, download).load(dataset, classes=classes, limit=n + 2 * n_eval)
    train, val, test = standardized(
        *(averaged(split, image_size) for split in every.draw(n, n_eval, n_eval, seed=seed))
    )
    more = Split(torch.cat([train.inputs, val.inputs]), torch.cat([train.targets, val.targets]))
    reference = _reference(more, reference_steps, seed)
    shape = train.inputs.shape[1:]

    def target(x: Tensor) -> Tensor:
        outputs: Tensor = reference(x.reshape(-1, *shape))
        return outputs

    egop = agop(reference, train.inputs)
    return RegressionTask(name, target, 0.0, _flat(train), _flat(val), _flat(test), egop)


def image_network(task: RegressionTask, spec: Setting, seed: int, parameterization: str = "ntk") -> nn.Module:
    """A task's network on flattened images: ``spec["network"]`` fcn, cnn or myrtle, of ``width`` (and ``depth``)."""
    generator = torch.Generator().manual_seed(10_000 + seed)  # not the task's seed
    d, d_out = task.train.inputs.shape[1], task.train.targets.shape[1]
    width, size = spec["width"], spec["image_size"]
    kind = spec.get("network", "fcn")
    if kind == "fcn":
        return mlp(d, width, spec["depth"], d_out, parameterization=parameterization, generator=generator)
    channels = d // size**2
    if kind == "cnn":
        net = cnn(channels, width, spec["depth"], size, d_out, parameterization=parameterization, generator=generator)
    else:
        net = myrtle5(channels, width, d_out, parameterization=parameterization, generator=generator)
    return nn.Sequential(nn.Unflatten(1, (channels, size, size)), net)


def _flat(split: Split) -> Split:
    return Split(split.inputs.flatten(1), split.targets)


def _reference(split: Split, steps: int, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(30_000 + seed)
    channels, k = split.inputs.shape[1], split.targets.shape[1]
    model = (
        myrtle5(channels, 32, parameterization="torch", generator=generator)
        if k == 1
        else wide_resnet(channels, k, depth=16, widen=2, parameterization="torch", generator=generator)
    )
    criterion, optimizer = nn.MSELoss(), torch.optim.Adam(model.parameters(), lr=2e-3)
    for _, batch in zip(range(steps), batches(len(split), 100, generator), strict=False):
        optimizer.zero_grad()
        criterion(model(split.inputs[batch]), split.targets[batch]).backward()
        optimizer.step()
    return model.eval()
