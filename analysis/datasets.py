"""Real data sets of the thesis, read from a folder of the user's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .tasks import Split

__all__ = ["Data", "DataError", "DataSet"]


class DataError(ValueError):
    """A data set is missing or damaged: says which, where it was sought and how to get it."""


@dataclass(frozen=True, eq=False)
class DataSet:
    """Examples of a data set, its original training and test part together."""

    name: str
    inputs: Tensor  # (n, channels, height, width) in [0, 1] for images
    labels: Tensor  # (n,) int64, places in `classes`
    classes: tuple[int, ...]  # the data set's own labels

    def __len__(self) -> int:
        return len(self.labels)

    def targets(self) -> Tensor:
        """(n, 1) of -1 and +1 for two classes, else one-hot (n, k)."""
        k = len(self.classes)
        if k == 2:
            return self.labels[:, None].float() * 2 - 1
        return torch.nn.functional.one_hot(self.labels, k).float()

    def draw(self, *sizes: int, seed: int = 0) -> list[Split]:
        """Disjoint random splits of these sizes, drawn from all examples; flattening and normalising are the user's."""
        if sum(sizes) > len(self):
            raise DataError(f"{self.name}: {sum(sizes)} examples are asked for, and there are {len(self)}")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[: sum(sizes)]
        targets = self.targets()
        return [Split(self.inputs[part], targets[part]) for part in torch.split(order, list(sizes))]


class Data:
    """The data sets in a folder.

    Args:
        folder: where they are; None: nowhere, so that whatever needs one says how to get it.
        download: fetch what is missing.
    """

    def __init__(self, folder: Path | str | None = None, download: bool = False) -> None:
        self.folder = None if folder is None else Path(folder)
        self.download = download

    def load(self, name: str, classes: Sequence[int] | None = None) -> DataSet:
        """All examples of a data set, or of some of its classes (in this order).

        Raises:
            DataError: it is missing or damaged.
        """
        if self.folder is None:
            raise DataError(f"{name}: is needed; say where it is with --data DIR")
        x, y = self._compact(name)
        chosen = tuple(int(c) for c in (np.unique(y) if classes is None else classes))
        keep = np.flatnonzero(np.isin(y, chosen))
        places = {label: place for place, label in enumerate(chosen)}
        labels = torch.tensor([places[int(label)] for label in y[keep]])
        return DataSet(name, torch.from_numpy(x[keep]), labels, chosen)

    def _compact(self, name: str) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.float32]], np.ndarray]:
        assert self.folder is not None
        paths = sorted(self.folder.glob(f"{name}*.npz"))
        if not paths:
            raise DataError(f"{name}: no {name}*.npz in {self.folder}")
        x, y = (np.concatenate([np.load(path)[key] for path in paths]) for key in "xy")
        x = (x / 2000 + 0.5 if name == "usps" else x / 255).astype(np.float32)
        return (np.moveaxis(x, -1, 1) if x.ndim == 4 else x[:, None]), y
