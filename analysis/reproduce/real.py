"""Two-class tasks of real images; their true features are those of a reference network trained on more examples."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..agop import agop
from ..datasets import Data, standardized
from ..networks import myrtle5
from ..tasks import RegressionTask, Split
from .training import batches

__all__ = ["real_task"]

_DATASETS = {"usps-2": "usps", "fashion-2": "fashion_mnist", "svhn-2": "svhn"}
_CLASSES = (0, 2)  # Appendix C.6


@lru_cache(maxsize=4)
def real_task(
    name: str, n: int, n_eval: int, image_size: int, reference_steps: int, seed: int, folder: str | None, download: bool
) -> RegressionTask:
    """Classes 0 and 2 as -1 and +1, pixels standardised and flattened, EGOP estimated by a reference network's AGOP.

    The reference is a Myrtle network in PyTorch's parameterisation, trained by Adam on the training and validation
    examples; its AGOP is taken over the training inputs. ``target`` is the reference.

    Args:
        name: usps-2, fashion-2 or svhn-2.
        n, n_eval: training examples; validation and test examples, each.
        image_size: reached by averaging pixels.
        reference_steps: of Adam, 100 examples each.
        seed: of the splits and the reference.
        folder, download: of `Data`; plain values, because results are kept for the next case.
    """
    every = Data(folder, download).load(_DATASETS[name], classes=_CLASSES)
    splits = standardized(*every.draw(n, n_eval, n_eval, seed=seed))
    factor = every.inputs.shape[-1] // image_size
    train, val, test = (Split(F.avg_pool2d(split.inputs, factor), split.targets) for split in splits)
    more = Split(torch.cat([train.inputs, val.inputs]), torch.cat([train.targets, val.targets]))
    reference = _reference(more, reference_steps, seed)
    shape = train.inputs.shape[1:]

    def target(x: Tensor) -> Tensor:
        outputs: Tensor = reference(x.reshape(-1, *shape))
        return outputs

    egop = agop(reference, train.inputs)
    return RegressionTask(name, target, 0.0, _flat(train), _flat(val), _flat(test), egop)


def _flat(split: Split) -> Split:
    return Split(split.inputs.flatten(1), split.targets)


def _reference(split: Split, steps: int, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(30_000 + seed)
    model = myrtle5(split.inputs.shape[1], 32, parameterization="torch", generator=generator)
    criterion, optimizer = nn.MSELoss(), torch.optim.Adam(model.parameters(), lr=2e-3)
    for _, batch in zip(range(steps), batches(len(split), 100, generator), strict=False):
        optimizer.zero_grad()
        criterion(model(split.inputs[batch]), split.targets[batch]).backward()
        optimizer.step()
    return model
