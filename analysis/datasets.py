"""Real data sets of the thesis, read from a folder of the user's in their official formats."""

from __future__ import annotations

import difflib
import hashlib
import shutil
import tarfile
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import formats
from .formats import DataError, Raw
from .tasks import Split

__all__ = ["Data", "DataError", "DataSet", "averaged", "standardized", "with_label_noise"]


@dataclass(frozen=True, eq=False)
class DataSet:
    """Examples of a data set, its original training and test part together."""

    name: str
    inputs: Tensor  # (n, channels, height, width) in [0, 1]; (n, words) for texts
    labels: Tensor  # (n,) int64, places in `classes`
    classes: tuple[int, ...]  # the data set's own labels

    def __len__(self) -> int:
        return len(self.labels)

    def targets(self) -> Tensor:
        """(n, 1) of -1 for the first and +1 for the second of two classes, else one-hot (n, k)."""
        k = len(self.classes)
        if k == 2:
            return self.labels[:, None].float() * 2 - 1
        return torch.nn.functional.one_hot(self.labels, k).float()

    def draw(self, *sizes: int, seed: int = 0) -> list[Split]:
        """Disjoint random splits of these sizes, drawn from all examples.

        Raises:
            DataError: there are not so many examples.
        """
        if sum(sizes) > len(self):
            raise DataError(f"{self.name}: {sum(sizes)} examples are asked for, and there are {len(self)}")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[: sum(sizes)]
        targets = self.targets()
        return [Split(self.inputs[part], targets[part]) for part in torch.split(order, list(sizes))]


def standardized(train: Split, *others: Split) -> list[Split]:
    """Splits with every channel shifted and scaled to mean 0 and variance 1 over ``train``."""
    axes = [0, *range(2, train.inputs.ndim)]
    mean = train.inputs.mean(axes, keepdim=True)
    scale = train.inputs.std(axes, keepdim=True).clamp_min(1e-12)
    return [replace(split, inputs=(split.inputs - mean) / scale) for split in (train, *others)]


def averaged(split: Split, size: int) -> Split:
    """Images (n, channels, h, w) reduced to ``size`` by ``size`` by averaging squares of pixels.

    Raises:
        ValueError: the side of the images is not a multiple of ``size``.
    """
    side = split.inputs.shape[-1]
    if side % size:
        raise ValueError(f"size must divide the side of the images, {side}, got {size}")
    return replace(split, inputs=torch.nn.functional.avg_pool2d(split.inputs, side // size))


def with_label_noise(split: Split, fraction: float, seed: int = 0) -> Split:
    """A split in which this fraction of the examples, drawn at random, have another class than their own.

    For targets of -1 and +1 the sign is turned; for one-hot targets the new class is drawn among the others.

    Raises:
        ValueError: the fraction is not in [0, 1].
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be in [0, 1], got {fraction!r}")
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(split), generator=generator)[: round(fraction * len(split))]
    targets = split.targets.clone()
    k = targets.shape[1]
    if k == 1:
        targets[rows] *= -1
    else:
        shift = torch.randint(1, k, (len(rows),), generator=generator)
        places = (targets[rows].argmax(1) + shift) % k
        targets[rows] = torch.nn.functional.one_hot(places, k).to(targets.dtype)
    return replace(split, targets=targets)


class Data:
    """The data sets in a folder.

    Official files are sought in the folder itself and in a folder of the data set's name, also as torchvision names
    them; compact files (``cifar10*.npz``, ...) in the folder itself.

    Args:
        folder: where they are; None: nowhere, so that whatever needs a data set says how to get it.
        download: fetch what is missing from its official address, and check what came.
    """

    def __init__(self, folder: Path | str | None = None, download: bool = False) -> None:
        self.folder = None if folder is None else Path(folder)
        self.download = download

    def load(self, name: str, classes: Sequence[int] | None = None, *, limit: int | None = None) -> DataSet:
        """All examples of a data set, or those of some classes, which are then numbered in the order given.

        Args:
            name: cifar10, svhn, mnist, fashion_mnist, usps, celeba (label: Eyeglasses), fsdd or ag_news.
            classes: the data set's own labels; all without them.
            limit: read about that many examples, of CelebA only: all of it takes 22 GB.

        Raises:
            DataError: no such data set, class or folder, or it is missing or damaged: which file, where it was sought
                and how to get it.
        """
        if name not in _SOURCES:
            close = difflib.get_close_matches(name, _SOURCES, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(_SOURCES)}"
            raise DataError(f"no data set is called {name!r}: {hint}")
        source = _SOURCES[name]
        if self.folder is None:
            raise DataError(f"{source.title} is needed: say with --data DIR where it is. {source.how}")
        if not self.folder.is_dir() and not self.download:
            raise DataError(f"{self.folder} is not a folder; {source.title} was to be read from there. {source.how}")
        try:
            x, y, to_unit = self._read(name, source, limit)
        except DataError as error:
            raise DataError(f"{source.title}: {error}. {source.how}") from None
        present = np.unique(y)
        chosen = tuple(int(c) for c in (present if classes is None else classes))
        if not set(chosen) <= set(present.tolist()) or len(set(chosen)) != len(chosen):
            raise DataError(f"{source.title}: classes {list(chosen)} asked for, there are {present.tolist()}")
        keep = np.flatnonzero(np.isin(y, chosen))
        places = np.zeros(int(present.max()) + 1, np.int64)
        places[list(chosen)] = range(len(chosen))
        inputs = np.ascontiguousarray(to_unit(x[keep]))
        return DataSet(name, torch.from_numpy(inputs), torch.from_numpy(places[y[keep]]), chosen)

    def _read(self, name: str, source: _Source, limit: int | None) -> Raw:
        assert self.folder is not None
        read = partial(formats.celeba, limit=limit) if name == "celeba" else source.read
        places = [self.folder / place for place in source.places]
        can_fetch = self.download and bool(source.files)
        for place in places:
            if any(any(place.glob(marker)) for marker in source.markers):
                try:
                    return read(place)
                except DataError:  # a file is missing or damaged, as after an interrupted download
                    if not can_fetch:
                        raise
                    return self._fetched(source)
        compact = sorted([*self.folder.glob(f"{name}*.npz"), *self.folder.glob(f"{name}.csv.gz")])
        if compact:
            return formats.compact(name, compact)
        if can_fetch:
            return self._fetched(source)
        sought = f"{' or '.join(source.markers)} in {', '.join(map(str, places))}, and {name}*.npz in {self.folder}"
        raise DataError(f"not found; sought {sought}")

    def _fetched(self, source: _Source) -> Raw:
        """What is not there in full and with the right sum is downloaded to the first place, and read from there."""
        assert self.folder is not None
        target = self.folder / source.places[0]
        for url, checksum in source.files:
            fetch(url, checksum, target / url.rpartition("/")[2])
        for url, _ in source.files:
            if url.endswith(".tar.gz"):
                with tarfile.open(target / url.rpartition("/")[2]) as archive:
                    archive.extractall(target, filter="data")
        for place in (self.folder / place for place in source.places):
            if place.is_relative_to(target) and any(any(place.glob(marker)) for marker in source.markers):
                return source.read(place)
        raise DataError(f"what was downloaded to {target} does not hold {' or '.join(source.markers)}")


_PATIENCE = 60  # seconds without a byte


def fetch(url: str, checksum: str, path: Path) -> None:
    """Download a file unless it is there, and check its MD5 sum.

    Raises:
        DataError: it cannot be reached, breaks off, or is not what it should be; nothing is kept then, and the next
            call starts anew.
    """
    if path.exists() and _md5(path) == checksum:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_name(path.name + ".part")
    try:
        with urllib.request.urlopen(url, timeout=_PATIENCE) as response, open(partial_path, "wb") as file:
            shutil.copyfileobj(response, file)
            length = response.headers.get("Content-Length")
            if length is not None and file.tell() < int(length):
                raise OSError(f"broken off after {file.tell()} of {length} bytes")
        if (found := _md5(partial_path)) != checksum:
            raise DataError(f"{url} is not the file expected (MD5 {found}, not {checksum})")
        partial_path.replace(path)
    except (OSError, HTTPException) as error:
        raise DataError(f"{url} cannot be fetched ({error}); put the file at {path} yourself") from None
    finally:
        partial_path.unlink(missing_ok=True)


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.md5(usedforsecurity=False)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class _Source:
    title: str
    read: Callable[[Path], Raw]
    markers: tuple[str, ...]  # a place that has one of these holds the data set
    places: tuple[str, ...]  # below the user's folder; downloads go to the first
    how: str  # to get it
    files: tuple[tuple[str, str], ...] = ()  # official address and MD5 sum


def _idx_source(title: str, places: tuple[str, ...], address: str, sums: tuple[str, ...]) -> _Source:
    names = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    how = f"Get {', '.join(names)} from {address} into {places[0]}/ (or use --download)"
    files = tuple((address + name, checksum) for name, checksum in zip(names, sums, strict=True))
    markers = ("train-images-idx3-ubyte", "train-images-idx3-ubyte.gz")
    return _Source(title, formats.idx, markers, places, how, files)


_CIFAR = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
_SVHN = "http://ufldl.stanford.edu/housenumbers/"
_USPS = "https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/multiclass/"
_NEWS = "https://raw.githubusercontent.com/mhjabreel/CharCnn_Keras/master/data/ag_news_csv/"

_SOURCES = {
    "cifar10": _Source(
        "CIFAR-10", formats.cifar10, ("data_batch_1", "data_batch_1.bin"),
        ("cifar10", "cifar-10-batches-py", "cifar-10-batches-bin", "cifar10/cifar-10-batches-py", "."),
        f"Get {_CIFAR} and unpack it there (or use --download)", ((_CIFAR, "c58f30108f718f92721af3b95e74349a"),),
    ),
    "svhn": _Source(
        "SVHN", formats.svhn, ("train_32x32.mat", "test_32x32.mat"), ("svhn", "SVHN", "."),
        f"Get train_32x32.mat and test_32x32.mat from {_SVHN} into svhn/ (or use --download)",
        (
            (_SVHN + "train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373"),
            (_SVHN + "test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3"),
        ),
    ),
    "mnist": _idx_source(
        "MNIST", ("mnist", "MNIST/raw", "MNIST"), "https://ossci-datasets.s3.amazonaws.com/mnist/",
        (
            "f68b3c2dcbeaaa9fbdd348bbdeb94873", "d53e105ee54ea40749a09fcbcd1e9432",
            "9fb629c4189551a2d022fa330f9573f3", "ec29112dd5afa0611ce80d1b7f02629c",
        ),
    ),
    "fashion_mnist": _idx_source(
        "Fashion-MNIST", ("fashion_mnist", "FashionMNIST/raw", "FashionMNIST"),
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        (
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d", "25c81989df183df01b3e8a0aad5dffbe",
            "bef4ecab320f06d8554ea6380940ec79", "bb300cfdad3c16e7a12a480ee83cd310",
        ),
    ),
    "usps": _Source(
        "USPS", formats.usps, ("zip.train", "zip.train.gz", "usps", "usps.bz2"), ("usps", "USPS", "."),
        f"Get usps.bz2 and usps.t.bz2 from {_USPS} into usps/ (or use --download)",
        (
            (_USPS + "usps.bz2", "ec16c51db3855ca6c91edd34d0e9b197"),
            (_USPS + "usps.t.bz2", "8ea070ee2aca1ac39742fdd1ef5ed118"),
        ),
    ),
    "celeba": _Source(
        "CelebA", formats.celeba, ("list_attr_celeba.txt",), ("celeba", "CelebA", "."),
        "Its agreement forbids handing it on: get list_attr_celeba.txt and img_align_celeba.zip from "
        "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html, and unpack into celeba/",
    ),
    "fsdd": _Source(
        "Free Spoken Digit Dataset", formats.fsdd, ("[0-9]_*_*.wav",),
        ("fsdd/recordings", "free-spoken-digit-dataset/recordings", "recordings", "fsdd", "."),
        "Get it with: git clone https://github.com/Jakobovski/free-spoken-digit-dataset",
    ),
    "ag_news": _Source(
        "AG News", formats.ag_news, ("train.csv",), ("ag_news", "ag_news_csv", "AG_NEWS", "."),
        f"Get train.csv and test.csv from {_NEWS} into ag_news/ (or use --download)",
        (
            (_NEWS + "train.csv", "b1a00f826fdfbd249f79597b59e1dc12"),
            (_NEWS + "test.csv", "d52ea96a97a2d943681189a97654912d"),
        ),
    ),
}  # fmt: skip
