"""Readers of the official file formats of the data sets: a folder in, arrays out."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import pickle
import wave
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["CELEBA_SIDE", "WORDS", "DataError", "Raw", "ag_news", "celeba", "cifar10", "compact", "fsdd", "idx", "svhn"]

Array = npt.NDArray[Any]
# Examples (n, channels, height, width) or (n, features), their labels (n,), and what takes the numbers to [0, 1].
Raw = tuple[Array, Array, Callable[[Array], Array]]

CELEBA_SIDE = 96  # pixels; the thesis does not say to which size it scales the images
WORDS = 1000  # size of the bag of words; the thesis does not say how it encodes texts
_RATE = 8000  # samples a second of the spoken digits


class DataError(ValueError):
    """A data set is missing or damaged: says which, where it was sought and how to get it."""


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Any failure while reading becomes a DataError that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path} is missing") from None
    except DataError:
        raise
    except Exception as error:  # a damaged file can make a reader fail in any way
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error})") from None


def bytes_to_unit(x: Array) -> Array:
    """0 ... 255 to [0, 1]."""
    return x.astype(np.float32) / 255


def symmetric_to_unit(x: Array) -> Array:
    """[-1, 1] to [0, 1]."""
    return (x.astype(np.float32) + 1) / 2


def as_they_are(x: Array) -> Array:
    return x.astype(np.float32)


# ------------------------------------------------------------------------------------------------------------ CIFAR-10


def cifar10(folder: Path) -> Raw:
    """The python version (data_batch_1 ... test_batch) or the binary version (data_batch_1.bin ... test_batch.bin)."""
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    binary = (folder / "data_batch_1.bin").exists()
    parts = []
    for name in names:
        path = folder / (name + ".bin" if binary else name)
        with _reading(path):
            parts.append(_cifar_binary(path) if binary else _cifar_pickle(path))
    x, y = (np.concatenate(pieces) for pieces in zip(*parts, strict=True))
    return x.reshape(-1, 3, 32, 32), y, bytes_to_unit


def _cifar_binary(path: Path) -> tuple[Array, Array]:
    data = np.frombuffer(path.read_bytes(), np.uint8)
    if not data.size or data.size % 3073:
        raise ValueError(f"{data.size} bytes are not a whole number of records of 3073")
    records = data.reshape(-1, 3073)
    return records[:, 1:], _labels(records[:, 0], 10)


def _cifar_pickle(path: Path) -> tuple[Array, Array]:
    content = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    x = np.asarray(content[b"data"], np.uint8)
    if x.ndim != 2 or x.shape[1] != 3072 or len(x) != len(content[b"labels"]):
        raise ValueError(f"images of shape {x.shape} and {len(content[b'labels'])} labels")
    return x, _labels(np.asarray(content[b"labels"]), 10)


class _ArraysOnly(pickle.Unpickler):
    """Pickles can run any code: this one makes arrays and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.empty(0).__reduce__()[0]
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes for Python 2
            return lambda text, _encoding: text.encode("latin1")
        raise pickle.UnpicklingError(f"asks for {module}.{name}, which no CIFAR-10 file needs")


def _labels(labels: Array, k: int) -> Array:
    labels = labels.astype(np.int64).ravel()
    if labels.size and not 0 <= labels.min() <= labels.max() < k:
        raise ValueError(f"labels from {labels.min()} to {labels.max()}, expected 0 to {k - 1}")
    return labels


# --------------------------------------------------------------------------------------------- SVHN, MNIST and the like


def svhn(folder: Path) -> Raw:
    """Cropped digits: train_32x32.mat and test_32x32.mat, X (32, 32, 3, n) and y (n, 1) with 10 for the digit 0."""
    from scipy.io import loadmat

    parts = []
    for name in ("train_32x32.mat", "test_32x32.mat"):
        with _reading(folder / name):
            content = loadmat(folder / name)
            x, y = content["X"], _labels(content["y"] % 10, 10)
            if x.shape != (32, 32, 3, len(y)):
                raise ValueError(f"X of shape {x.shape} for {len(y)} labels")
            parts.append((np.moveaxis(x, (3, 2), (0, 1)), y))
    xs, ys = (np.concatenate(pieces) for pieces in zip(*parts, strict=True))
    return xs, ys, bytes_to_unit


def idx(folder: Path) -> Raw:
    """MNIST and Fashion-MNIST: train-images-idx3-ubyte, train-labels-idx1-ubyte and t10k-..., each perhaps with .gz."""
    parts = []
    for part in ("train", "t10k"):
        x, y = _idx_file(folder / f"{part}-images-idx3-ubyte", 3), _idx_file(folder / f"{part}-labels-idx1-ubyte", 1)
        if len(x) != len(y):
            raise DataError(f"{folder}: {len(x)} images but {len(y)} labels in {part}")
        parts.append((x[:, None], y.astype(np.int64)))
    xs, ys = (np.concatenate(pieces) for pieces in zip(*parts, strict=True))
    return xs, ys, bytes_to_unit


def _idx_file(path: Path, dimensions: int) -> Array:
    path = _either(path, path.with_name(path.name + ".gz"))
    with _reading(path):
        data = _unpacked(path)
        if data[:4] != bytes([0, 0, 8, dimensions]):
            raise ValueError(f"does not start like unsigned bytes in {dimensions} dimensions")
        shape = np.frombuffer(data, ">u4", dimensions, 4).astype(int)
        values = np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions)
        if values.size != shape.prod():
            raise ValueError(f"{values.size} values, expected {' x '.join(map(str, shape))}")
        return values.reshape(shape)


def usps(folder: Path) -> Raw:
    """zip.train and zip.test (a line: digit and 256 values), or usps and usps.t in LIBSVM's format (labels 1 to 10)."""
    lines_of_zip = any((folder / f"zip.train{suffix}").exists() for suffix in ("", ".gz"))
    names, suffix = (("zip.train", "zip.test"), ".gz") if lines_of_zip else (("usps", "usps.t"), ".bz2")
    parts = []
    for name in names:
        path = _either(folder / name, folder / (name + suffix))
        with _reading(path):
            lines = [line.split() for line in _unpacked(path).decode("ascii").splitlines() if line.strip()]
            values = np.array([[float(v.rpartition(":")[2]) for v in line[1:]] for line in lines], np.float32)
            digits = np.array([round(float(line[0])) for line in lines]) - (0 if lines_of_zip else 1)
            parts.append((values.reshape(-1, 1, 16, 16), _labels(digits, 10)))
    xs, ys = (np.concatenate(pieces) for pieces in zip(*parts, strict=True))
    return xs, ys, symmetric_to_unit


def _either(first: Path, second: Path) -> Path:
    return second if second.exists() and not first.exists() else first


def _unpacked(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".gz":
        return gzip.decompress(data)
    return bz2.decompress(data) if path.suffix == ".bz2" else data


# ---------------------------------------------------------------------------------------------- faces, sounds and texts


def celeba(folder: Path, limit: int | None = None) -> Raw:
    """list_attr_celeba.txt and img_align_celeba/*.jpg; the label is the attribute Eyeglasses.

    The middle square is scaled to CELEBA_SIDE pixels. ``limit``: that many images, drawn at random (seed 0).
    """
    path = folder / "list_attr_celeba.txt"
    with _reading(path):
        count, header, *lines = path.read_text().splitlines()
        column = header.split().index("Eyeglasses") + 1
        rows = [line.split() for line in lines if line.strip()]
        if len(rows) != int(count):
            raise ValueError(f"{len(rows)} lines, but it announces {count}")
        files, y = [row[0] for row in rows], np.array([row[column] == "1" for row in rows], np.int64)
    chosen = np.arange(len(y))
    if limit is not None and limit < len(y):
        chosen = np.sort(np.random.default_rng(0).permutation(len(y))[:limit])
    images = [_face(folder / "img_align_celeba" / files[i]) for i in chosen]
    return np.moveaxis(np.stack(images), -1, 1), y[chosen], bytes_to_unit


def _face(path: Path) -> Array:
    try:
        from PIL import Image
    except ImportError:
        raise DataError("CelebA is JPEG: reading it needs Pillow, pip install pillow") from None
    with _reading(path), Image.open(path) as image:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.convert("RGB").resize(
            (CELEBA_SIDE, CELEBA_SIDE), Image.Resampling.BILINEAR, (left, top, left + side, top + side)
        )
        return np.asarray(square)


def fsdd(folder: Path) -> Raw:
    """recordings/{digit}_{speaker}_{number}.wav, 16 bits mono; see `spectrogram`."""
    paths = sorted(folder.glob("*_*_*.wav"))
    sounds = []
    for path in paths:
        with _reading(path), wave.open(str(path), "rb") as file:
            if (file.getnchannels(), file.getsampwidth(), file.getframerate()) != (1, 2, _RATE):
                raise ValueError(f"not 16 bits mono at {_RATE} Hz")
            sounds.append(np.frombuffer(file.readframes(file.getnframes()), "<i2"))
    with _reading(folder):
        digits = _labels(np.array([int(path.name.split("_")[0]) for path in paths]), 10)
    return spectrogram(sounds), digits, as_they_are


def spectrogram(sounds: list[Array]) -> Array:
    """log(1 + power) of the first second, (n, 1, 65 frequencies, 62 frames), as a share of its largest value.

    Shorter recordings are followed by silence. The thesis does not say how it presents sounds to a network.
    """
    samples = np.zeros((len(sounds), _RATE // 128 * 128))
    for row, sound in zip(samples, sounds, strict=True):
        row[: len(sound)] = sound[: len(row)] / 2**15
    frames = samples.reshape(len(sounds), -1, 128) * np.hanning(128)
    power = np.log1p(np.abs(np.fft.rfft(frames)) ** 2).transpose(0, 2, 1)
    shares: Array = power[:, None] / np.maximum(power.max(axis=(1, 2), keepdims=True)[:, None], 1e-12)
    return shares


def ag_news(folder: Path) -> Raw:
    """train.csv and test.csv: class 1 to 4, title, description; see `bag_of_words`."""
    texts, labels = [], []
    for name in ("train.csv", "test.csv"):
        with _reading(folder / name), open(folder / name, newline="", encoding="utf-8") as file:
            for row in csv.reader(file):
                texts.append(f"{row[1]} {row[2]}")
                labels.append(int(row[0]) - 1)
    with _reading(folder):
        return bag_of_words(texts), _labels(np.array(labels), 4), as_they_are


def bag_of_words(texts: list[str]) -> Array:
    """Counts (n, WORDS) of the most frequent words of at least three letters, each row of length 1."""
    words = [[word for word in _letters(text).split() if len(word) >= 3] for text in texts]
    totals: dict[str, int] = {}
    for row in words:
        for word in row:
            totals[word] = totals.get(word, 0) + 1
    frequent = sorted(totals, key=lambda word: (-totals[word], word))[:WORDS]
    column = {word: i for i, word in enumerate(frequent)}
    counts = np.zeros((len(texts), WORDS), np.float32)
    for i, row in enumerate(words):
        for word in row:
            if word in column:
                counts[i, column[word]] += 1
    rows: Array = counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-12)
    return rows


def _letters(text: str) -> str:
    return "".join(c if c.isalpha() else " " for c in text.lower())


# ------------------------------------------------------------------------------------------------------- compact files


def compact(name: str, paths: list[Path]) -> Raw:
    """Subsets in one .npz each: x (n, height, width[, 3]) and y, or the sounds of fsdd end to end; ag_news.csv.gz."""
    parts = []
    for path in paths:
        with _reading(path):
            if path.suffix == ".gz":
                rows = list(csv.DictReader(io.StringIO(gzip.decompress(path.read_bytes()).decode())))
                texts = [f"{row['title']} {row['description']}" for row in rows]
                return bag_of_words(texts), _labels(np.array([int(row["label"]) for row in rows]), 4), as_they_are
            with np.load(path) as content:
                y = _labels(content["y"], 10)
                if name == "fsdd":
                    samples = np.ascontiguousarray(content["audio_lohi"].T).view("<i2").ravel()
                    return spectrogram(np.split(samples, content["offsets"][1:-1])), y, as_they_are
                x = content["x"]
                parts.append((np.moveaxis(x, -1, 1) if x.ndim == 4 else x[:, None], y))
    xs, ys = (np.concatenate(pieces) for pieces in zip(*parts, strict=True))
    # USPS is kept as a thousand times its value in [-1, 1].
    return xs, ys, (lambda x: symmetric_to_unit(x / 1000)) if name == "usps" else bytes_to_unit
