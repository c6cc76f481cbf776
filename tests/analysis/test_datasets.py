"""Official file formats are read, from small files made in them; what is missing or damaged is named."""

import bz2
import gzip
import hashlib
import http.server
import pickle
import re
import struct
import subprocess
import tarfile
import threading
import types
import wave

import numpy as np
import pytest
import scipy.io
import torch

from catapult_opt.analysis import datasets
from catapult_opt.analysis.datasets import Data, DataError, DataSet, averaged, standardized, with_label_noise
from catapult_opt.analysis.formats import bag_of_words, spectrogram
from catapult_opt.analysis.tasks import Split

RANDOM = np.random.default_rng(0)


def pixels(*shape):
    return RANDOM.integers(0, 256, shape, dtype=np.uint8)


def write_cifar(folder, kind="python", n=3):
    folder.mkdir(parents=True, exist_ok=True)
    x, y = pixels(6, n, 3, 32, 32), RANDOM.integers(0, 10, (6, n))
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for name, images, labels in zip(names, x, y, strict=True):
        if kind == "binary":
            rows = np.hstack([labels[:, None].astype(np.uint8), images.reshape(n, -1)])
            (folder / f"{name}.bin").write_bytes(rows.tobytes())
        else:
            content = {b"data": images.reshape(n, -1), b"labels": labels.tolist(), b"batch_label": b"one"}
            (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    return x.reshape(-1, 3, 32, 32), y.ravel()


def write_idx(folder, compressed, n=4):
    folder.mkdir(parents=True, exist_ok=True)
    x, y = pixels(2, n, 28, 28), RANDOM.integers(0, 10, (2, n)).astype(np.uint8)
    for part, images, labels in zip(("train", "t10k"), x, y, strict=True):
        for name, array in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            data = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
            path = folder / (name + ".gz" * compressed)
            path.write_bytes(gzip.compress(data) if compressed else data)
    return x.reshape(-1, 1, 28, 28), y.ravel()


def write_svhn(folder, n=5):
    folder.mkdir(parents=True, exist_ok=True)
    x, y = pixels(2, n, 3, 32, 32), RANDOM.integers(0, 10, (2, n))
    for name, images, labels in zip(("train", "test"), x, y, strict=True):
        content = {"X": images.transpose(2, 3, 1, 0), "y": np.where(labels == 0, 10, labels)[:, None].astype(np.uint8)}
        scipy.io.savemat(folder / f"{name}_32x32.mat", content)
    return x.reshape(-1, 3, 32, 32), y.ravel()


def same(found, x, y):
    """All examples, whatever classes happened to be drawn."""
    labels = torch.tensor(found.classes)[found.labels]
    np.testing.assert_array_equal(labels.numpy(), y)
    np.testing.assert_allclose(found.inputs.numpy(), x, atol=1e-6)
    assert found.inputs.dtype == torch.float32


# --------------------------------------------------------------------------------------------------------- the formats


@pytest.mark.parametrize(
    ("kind", "place"), [("python", "cifar-10-batches-py"), ("binary", "cifar-10-batches-bin"), ("python", "cifar10")]
)
def test_cifar10_python_and_binary(tmp_path, kind, place):
    x, y = write_cifar(tmp_path / place, kind)
    same(Data(tmp_path).load("cifar10"), x / 255, y)


@pytest.mark.parametrize(
    ("name", "place"), [("mnist", "mnist"), ("mnist", "MNIST/raw"), ("fashion_mnist", "FashionMNIST/raw")]
)
@pytest.mark.parametrize("compressed", [True, False])
def test_idx_files(tmp_path, name, place, compressed):
    x, y = write_idx(tmp_path / place, compressed)
    same(Data(tmp_path).load(name), x / 255, y)


def test_mnist_is_not_taken_for_fashion_mnist(tmp_path):
    write_idx(tmp_path / "mnist", True)
    with pytest.raises(DataError, match="Fashion-MNIST: not found"):
        Data(tmp_path).load("fashion_mnist")


def test_svhn_mat_where_ten_means_zero(tmp_path):
    x, y = write_svhn(tmp_path / "svhn")
    same(Data(tmp_path).load("svhn"), x / 255, y)


def write_usps(folder, kind):
    folder.mkdir(parents=True, exist_ok=True)
    x, y = RANDOM.integers(-1000, 1001, (2, 3, 256)) / 1000, RANDOM.integers(0, 10, (2, 3))
    names = ("zip.train", "zip.test") if kind.startswith("zip") else ("usps", "usps.t")
    for name, images, labels in zip(names, x, y, strict=True):
        if kind.startswith("zip"):
            lines = [f"{d:.4f} " + " ".join(f"{v:.4f}" for v in row) for row, d in zip(images, labels, strict=True)]
        else:
            lines = [
                f"{d + 1} " + " ".join(f"{i}:{v:.4f}" for i, v in enumerate(row, 1))
                for row, d in zip(images, labels, strict=True)
            ]
        data = ("\n".join(lines) + "\n").encode()
        pack = {"gz": gzip.compress, "bz2": bz2.compress}.get(kind.rpartition(".")[2], bytes)
        (folder / (name + kind.removeprefix("zip").removeprefix("libsvm"))).write_bytes(pack(data))
    return (x.reshape(-1, 1, 16, 16) + 1) / 2, y.ravel()


@pytest.mark.parametrize("kind", ["zip", "zip.gz", "libsvm", "libsvm.bz2"])
def test_usps_as_lines_of_numbers_and_as_libsvm(tmp_path, kind):
    x, y = write_usps(tmp_path, kind)
    same(Data(tmp_path).load("usps"), x, y)


def test_celeba_attributes_and_images(tmp_path):
    image_module = pytest.importorskip("PIL.Image")
    folder = tmp_path / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    glasses = [1, -1, -1, 1]
    rows = [f"{i + 1:06}.jpg  1 {value:2d} -1" for i, value in enumerate(glasses)]
    (folder / "list_attr_celeba.txt").write_text("4\nBald Eyeglasses Young\n" + "\n".join(rows) + "\n")
    for i in range(4):
        image_module.new("RGB", (178, 218), (60 * i, 10, 200)).save(folder / "img_align_celeba" / f"{i + 1:06}.jpg")
    found = Data(tmp_path).load("celeba")
    assert found.inputs.shape == (4, 3, 96, 96)
    assert found.labels.tolist() == [1, 0, 0, 1]
    np.testing.assert_allclose(found.inputs[:, 0].mean((1, 2)) * 255, [0, 60, 120, 180], atol=3)
    assert len(Data(tmp_path).load("celeba", limit=3)) == 3
    (folder / "img_align_celeba" / "000003.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"000003\.jpg is damaged"):
        Data(tmp_path).load("celeba")


def test_fsdd_recordings(tmp_path):
    folder = tmp_path / "free-spoken-digit-dataset" / "recordings"
    folder.mkdir(parents=True)
    for digit, speaker, frequency in ((7, "ann", 1000), (3, "bob", 2000)):
        samples = 2**14 * np.sin(2 * np.pi * frequency * np.arange(4000) / 8000)
        with wave.open(str(folder / f"{digit}_{speaker}_0.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(8000)
            file.writeframes(samples.astype("<i2").tobytes())
    found = Data(tmp_path).load("fsdd", classes=(7, 3))
    assert found.inputs.shape == (2, 1, 65, 62)
    by_label = {int(label): sound for label, sound in zip(found.labels, found.inputs, strict=True)}
    assert [int(by_label[i][0].mean(1).argmax()) for i in (0, 1)] == [16, 32]  # bands of 62.5 Hz
    assert float(by_label[0][0, :, 40:].abs().max()) == 0  # silence after half a second


def test_spectrogram_of_a_sound_shorter_than_a_frame_and_of_silence():
    sounds = [np.ones(5, np.int16), np.zeros(20_000, np.int16)]
    assert np.isfinite(spectrogram(sounds)).all()


def test_ag_news_csv_with_quotes_and_line_breaks(tmp_path):
    rows = '"3","Oil, gold","Prices of oil\nrise"\n"4","A ""robot""","robot robot"\n'
    for name in ("train.csv", "test.csv"):
        (tmp_path / name).write_text(rows, encoding="utf-8")
    found = Data(tmp_path).load("ag_news")
    assert found.classes == (2, 3)
    assert found.labels.tolist() == [0, 1, 0, 1]
    torch.testing.assert_close(found.inputs.norm(dim=1), torch.ones(4))
    # robot 6 times in all, oil 4, then gold, prices and rise in alphabetical order.
    assert (found.inputs > 0).int()[:2, :5].tolist() == [[0, 1, 1, 1, 1], [1, 0, 0, 0, 0]]


def test_bag_of_words_of_an_empty_text_is_zero():
    assert bag_of_words(["", "a bb"]).sum() == 0


def test_compact_files(tmp_path):
    x = {7: pixels(3, 32, 32, 3), 9: pixels(3, 32, 32, 3)}
    for label in x:
        np.savez(tmp_path / f"cifar10_{label}.npz", x=x[label], y=np.full(3, label))
    same(Data(tmp_path).load("cifar10"), np.concatenate([*x.values()]).transpose(0, 3, 1, 2) / 255, [7] * 3 + [9] * 3)
    ink = RANDOM.integers(-1000, 1001, (4, 16, 16)).astype(np.int16)
    np.savez(tmp_path / "usps.npz", x=ink, y=np.arange(4))
    same(Data(tmp_path).load("usps"), (ink[:, None] / 1000 + 1) / 2, range(4))
    sounds = RANDOM.integers(-1000, 1000, 300).astype("<i2")
    lohi = np.ascontiguousarray(sounds.view(np.uint8).reshape(-1, 2).T)
    np.savez(tmp_path / "fsdd.npz", audio_lohi=lohi, offsets=[0, 120, 300], y=[1, 3])
    same(Data(tmp_path).load("fsdd"), spectrogram([sounds[:120], sounds[120:]]), [1, 3])
    news = "label,title,description,split,src_row\n0,One,two three,1,0\n3,Four,five six,1,1\n"
    (tmp_path / "ag_news.csv.gz").write_bytes(gzip.compress(news.encode()))
    assert Data(tmp_path).load("ag_news").classes == (0, 3)


# ------------------------------------------------------------------------------------------------ missing and damaged


def test_missing_data_set_says_where_it_was_sought_and_how_to_get_it(tmp_path):
    with pytest.raises(DataError) as caught:
        Data(tmp_path).load("cifar10")
    message = str(caught.value)
    for part in (
        "CIFAR-10: not found",
        "data_batch_1",
        str(tmp_path / "cifar-10-batches-py"),
        "https://www.cs.toronto",
    ):
        assert part in message


def test_no_folder_and_no_such_data_set_or_class(tmp_path):
    with pytest.raises(DataError, match=r"SVHN is needed: say with --data DIR where it is. Get train_32x32.mat"):
        Data().load("svhn")
    with pytest.raises(DataError, match=r"nowhere is not a folder; SVHN was to be read from there"):
        Data(tmp_path / "nowhere").load("svhn")
    with pytest.raises(DataError, match="no data set is called 'cifar-10': did you mean cifar10"):
        Data(tmp_path).load("cifar-10")
    write_cifar(tmp_path)
    with pytest.raises(DataError, match=r"classes \[7, 12\] asked for"):
        Data(tmp_path).load("cifar10", classes=(7, 12))


@pytest.mark.parametrize("name", ["data_batch_4", "test_batch"])
def test_one_missing_file_is_named(tmp_path, name):
    write_cifar(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=f"{name} is missing"):
        Data(tmp_path).load("cifar10")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize(
    ("name", "write", "victim"),
    [
        ("cifar10", write_cifar, "data_batch_3"),
        ("cifar10", lambda folder: write_cifar(folder, "binary"), "test_batch.bin"),
        ("svhn", write_svhn, "test_32x32.mat"),
        ("mnist", lambda folder: write_idx(folder / "mnist", True), "mnist/t10k-images-idx3-ubyte.gz"),
        ("mnist", lambda folder: write_idx(folder / "mnist", False), "mnist/train-labels-idx1-ubyte"),
    ],
)
def test_a_truncated_file_is_named(tmp_path, name, write, victim):
    write(tmp_path)
    truncate(tmp_path / victim)
    with pytest.raises(DataError, match=f"{re.escape(victim)} is damaged"):
        Data(tmp_path).load(name)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return subprocess.call, (["touch", str(tmp_path / "pwned")],)

    write_cifar(tmp_path)
    (tmp_path / "data_batch_2").write_bytes(pickle.dumps({b"data": Evil()}, protocol=2))
    with pytest.raises(DataError, match=r"data_batch_2 is damaged .*asks for \w+\.call"):
        Data(tmp_path).load("cifar10")
    assert not (tmp_path / "pwned").exists()


# ------------------------------------------------------------------------------------------------------------ download


def test_download_checks_and_unpacks(tmp_path, monkeypatch):
    """From a file: address, in place of the official one."""
    x, y = write_cifar(tmp_path / "source" / "cifar-10-batches-py")
    archive = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "source" / "cifar-10-batches-py", "cifar-10-batches-py")
    checksum = hashlib.md5(archive.read_bytes()).hexdigest()

    def offer(checksum):
        source = datasets.replace(datasets._SOURCES["cifar10"], files=((archive.as_uri(), checksum),))
        monkeypatch.setitem(datasets._SOURCES, "cifar10", source)

    offer("0" * 32)
    with pytest.raises(DataError, match="is not the file expected"):
        Data(tmp_path / "new", download=True).load("cifar10")
    offer(checksum)
    same(Data(tmp_path / "new", download=True).load("cifar10"), x / 255, y)
    archive.unlink()
    same(Data(tmp_path / "new").load("cifar10"), x / 255, y)
    with pytest.raises(DataError, match="cannot be fetched"):
        Data(tmp_path / "again", download=True).load("cifar10")


@pytest.fixture
def server(tmp_path):
    """Serves tmp_path/served; what is asked for, and files that break off in the middle or never come."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path / "served"))

        def do_GET(self):
            offered.asked.append(self.path)
            if self.path in offered.silent:
                offered.done.wait(10)
            elif self.path in offered.broken:
                data = (tmp_path / "served" / self.path[1:]).read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2])
            else:
                super().do_GET()

        def log_message(self, *args):
            pass

    (tmp_path / "served").mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        offered = types.SimpleNamespace(
            address=f"http://127.0.0.1:{running.server_port}/", asked=[], broken=set(), silent=set(),
            done=threading.Event(),
        )  # fmt: skip
        yield offered
        offered.done.set()
        running.shutdown()


def serve(name, folder):
    """Official files of a data set in ``folder``; what should be read."""
    if name == "cifar10":
        x, y = write_cifar(folder / "cifar-10-batches-py")
        with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz") as tar:
            tar.add(folder / "cifar-10-batches-py", "cifar-10-batches-py")
        return x / 255, y
    if name == "svhn":
        x, y = write_svhn(folder)
        return x / 255, y
    if name == "usps":
        return write_usps(folder, "libsvm.bz2")
    x, y = write_idx(folder, True)
    return x / 255, y


def offer(monkeypatch, name, folder, address):
    """The declared files at another address, with the sums of the small ones."""
    source = datasets._SOURCES[name]
    names = [url.rpartition("/")[2] for url, _ in source.files]
    files = tuple((address + file, hashlib.md5((folder / file).read_bytes()).hexdigest()) for file in names)
    monkeypatch.setitem(datasets._SOURCES, name, datasets.replace(source, files=files))
    return names


@pytest.mark.parametrize("name", ["cifar10", "svhn", "mnist", "fashion_mnist", "usps"])
def test_download_from_a_server_then_without_it(tmp_path, monkeypatch, server, name):
    x, y = serve(name, tmp_path / "served")
    names = offer(monkeypatch, name, tmp_path / "served", server.address)
    same(Data(tmp_path / "new", download=True).load(name), x, y)
    assert server.asked == ["/" + file for file in names]
    same(Data(tmp_path / "new", download=True).load(name), x, y)
    assert len(server.asked) == len(names)


def test_a_file_that_is_not_the_expected_one_is_not_kept(tmp_path, monkeypatch, server):
    serve("svhn", tmp_path / "served")
    offer(monkeypatch, "svhn", tmp_path / "served", server.address)
    good = (tmp_path / "served" / "test_32x32.mat").read_bytes()
    (tmp_path / "served" / "test_32x32.mat").write_bytes(good[:-1] + b"x")
    with pytest.raises(DataError, match=r"test_32x32\.mat is not the file expected \(MD5 [0-9a-f]{32}, not "):
        Data(tmp_path / "new", download=True).load("svhn")
    assert [path.name for path in (tmp_path / "new" / "svhn").iterdir()] == ["train_32x32.mat"]


def test_an_interrupted_download_says_so_and_is_taken_up_again(tmp_path, monkeypatch, server):
    x, y = serve("svhn", tmp_path / "served")
    offer(monkeypatch, "svhn", tmp_path / "served", server.address)
    server.broken = {"/train_32x32.mat"}
    with pytest.raises(DataError, match=r"train_32x32\.mat cannot be fetched \(broken off after \d+ of \d+ bytes\)"):
        Data(tmp_path / "new", download=True).load("svhn")
    assert not list((tmp_path / "new" / "svhn").iterdir())
    server.broken = set()
    same(Data(tmp_path / "new", download=True).load("svhn"), x, y)


def test_a_file_that_is_gone_and_a_server_that_does_not_answer(tmp_path, monkeypatch, server):
    serve("svhn", tmp_path / "served")
    offer(monkeypatch, "svhn", tmp_path / "served", server.address)
    (tmp_path / "served" / "train_32x32.mat").unlink()
    with pytest.raises(DataError, match=r"cannot be fetched \(HTTP Error 404.*put the file at .*train_32x32\.mat"):
        Data(tmp_path / "new", download=True).load("svhn")
    monkeypatch.setattr(datasets, "_PATIENCE", 0.2)
    server.silent = {"/train_32x32.mat"}
    with pytest.raises(DataError, match=r"cannot be fetched \(timed out\)"):
        Data(tmp_path / "new", download=True).load("svhn")


def test_a_download_that_stopped_between_two_files_is_finished(tmp_path, monkeypatch, server):
    x, y = serve("mnist", tmp_path / "served")
    offer(monkeypatch, "mnist", tmp_path / "served", server.address)
    server.broken = {"/t10k-images-idx3-ubyte.gz"}
    with pytest.raises(DataError, match="broken off"):
        Data(tmp_path / "new", download=True).load("mnist")
    server.broken = set()
    with pytest.raises(DataError, match="t10k-images-idx3-ubyte is missing"):
        Data(tmp_path / "new").load("mnist")
    server.asked.clear()
    same(Data(tmp_path / "new", download=True).load("mnist"), x, y)
    assert server.asked == ["/t10k-images-idx3-ubyte.gz", "/t10k-labels-idx1-ubyte.gz"]


def test_an_archive_that_was_unpacked_in_part_is_unpacked_again(tmp_path, monkeypatch, server):
    x, y = serve("cifar10", tmp_path / "served")
    offer(monkeypatch, "cifar10", tmp_path / "served", server.address)
    Data(tmp_path / "new", download=True).load("cifar10")
    unpacked = tmp_path / "new" / "cifar10" / "cifar-10-batches-py"
    (unpacked / "data_batch_4").unlink()
    truncate(unpacked / "test_batch")
    same(Data(tmp_path / "new", download=True).load("cifar10"), x, y)
    assert len(server.asked) == 1


# ------------------------------------------------------------------------------------------------------- after reading


def small(k=3, n=60):
    labels = torch.arange(n) % k
    return DataSet("made up", torch.arange(float(n)).reshape(n, 1, 1, 1).expand(n, 2, 2, 2), labels, tuple(range(k)))


def test_classes_are_numbered_in_the_order_given(tmp_path):
    x, _ = write_cifar(tmp_path, n=10)
    y = np.arange(60) % 10
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        content = {b"data": x[10 * i : 10 * i + 10].reshape(10, -1), b"labels": y[10 * i : 10 * i + 10].tolist()}
        (tmp_path / name).write_bytes(pickle.dumps(content, protocol=2))
    found = Data(tmp_path).load("cifar10", classes=(9, 7))
    assert found.classes == (9, 7)
    keep = np.isin(y, (7, 9))
    np.testing.assert_array_equal(found.labels.numpy(), (y[keep] == 7).astype(int))
    np.testing.assert_allclose(found.inputs.numpy(), x[keep] / 255, atol=1e-6)
    assert found.targets().ravel().tolist() == [1.0 if label == 7 else -1.0 for label in y[keep]]


def test_splits_are_disjoint_and_decided_by_the_seed():
    data = small()
    before = torch.get_rng_state()
    a, b = data.draw(20, 30, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    rows = torch.cat([a.inputs, b.inputs])[:, 0, 0, 0]
    assert len(rows.unique()) == 50
    assert torch.equal(torch.cat([a.targets, b.targets]).argmax(1), rows.long() % 3)
    assert torch.equal(data.draw(20, 30, seed=1)[1].inputs, b.inputs)
    assert not torch.equal(data.draw(20, seed=2)[0].inputs, a.inputs)
    with pytest.raises(DataError, match="61 examples are asked for, and there are 60"):
        data.draw(60, 1)


def test_averaging_pixels():
    images = torch.arange(16.0).reshape(1, 1, 4, 4)
    found = averaged(Split(images, torch.ones(1, 1)), 2)
    assert found.inputs.flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    with pytest.raises(ValueError, match="size must divide the side of the images, 4, got 3"):
        averaged(Split(images, torch.ones(1, 1)), 3)


def test_standardized_by_the_training_split_alone():
    train = Split(torch.randn(50, 3, 4, 4) * torch.tensor([1.0, 5.0, 9.0])[:, None, None] + 2, torch.ones(50, 1))
    a, b = standardized(train, Split(train.inputs * 2, train.targets))
    torch.testing.assert_close(a.inputs.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(a.inputs.std((0, 2, 3)), torch.ones(3))
    shift = train.inputs.mean((0, 2, 3)) / train.inputs.std((0, 2, 3))
    torch.testing.assert_close(b.inputs, 2 * a.inputs + shift[:, None, None])
    constant = Split(torch.ones(5, 3), torch.ones(5, 1))
    assert torch.equal(standardized(constant)[0].inputs, torch.zeros(5, 3))


def test_label_noise_changes_exactly_its_share():
    for k in (2, 5):
        data = small(k)
        (split,) = data.draw(50)
        noisy = with_label_noise(split, 0.1, seed=3)
        changed = (noisy.targets != split.targets).any(1)
        assert int(changed.sum()) == 5
        assert torch.equal(noisy.targets.sum(1).abs(), split.targets.sum(1).abs())
        assert torch.equal(noisy.inputs, split.inputs)
    for fraction in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="fraction must be in"):
            with_label_noise(split, fraction)
