"""Panels on real images: from small files in the official formats; missing data is said; decay after a catapult."""

import copy
import math

import numpy as np
import pytest
import scipy.io
import torch
from torch import nn

from catapult_opt.analysis.networks import ntk_mlp
from catapult_opt.analysis.ntk import critical_rate, ntk
from catapult_opt.analysis.reproduce import ARTEFACTS, features
from catapult_opt.analysis.reproduce.artefact import Data
from catapult_opt.analysis.reproduce.real import image_network, real_task
from catapult_opt.analysis.reproduce.training import batches, measure, train
from catapult_opt.analysis.tasks import rank
from catapult_opt.cli import main

KNOWN = {artefact.name: artefact for artefact in ARTEFACTS}
PANELS = ("fig-4.8", "fig-4.9", "fig-4.11")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """CelebA (attributes and pictures of 178 x 218) and SVHN (.mat), in which the class shows in the left half."""
    image_module = pytest.importorskip("PIL.Image")
    root = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, 90)
    pictures = root / "celeba" / "img_align_celeba"
    pictures.mkdir(parents=True)
    rows = [f"{i:06}.jpg -1 {2 * label - 1:2d} 1" for i, label in enumerate(labels, 1)]
    (root / "celeba" / "list_attr_celeba.txt").write_text("90\nBald Eyeglasses Young\n" + "\n".join(rows) + "\n")
    for i, label in enumerate(labels, 1):
        pixels = random.integers(60, 120, (218, 178, 3), dtype=np.uint8)
        pixels[:, :89] += np.uint8(100 * label)
        image_module.fromarray(pixels).save(pictures / f"{i:06}.jpg")
    (root / "svhn").mkdir()
    digits = np.resize(np.arange(10), 300)
    for part, chosen in (("train", digits[:200]), ("test", digits[200:])):
        x = random.integers(0, 100, (32, 32, 3, len(chosen)), dtype=np.uint8)
        x[:, :16] += (15 * chosen).astype(np.uint8)
        content = {"X": x, "y": np.where(chosen == 0, 10, chosen)[:, None].astype(np.uint8)}
        scipy.io.savemat(root / "svhn" / f"{part}_32x32.mat", content)
    return root


def tiny(name):
    """The quick setting in a few steps."""
    setting = copy.deepcopy(KNOWN[name].scales["quick"])
    sizes = {"n": 30, "n_eval": 12, "image_size": 8, "reference_steps": 5, "width": 8}
    if "max_steps" in setting:
        sizes = {**sizes, "n_train": 30, "batch_sizes": [5, 30], "max_steps": 6, "evaluate_every": 3}
        return {**setting, **sizes}
    for spec in setting["tasks"].values():
        spec.update({**sizes, "steps": 4})
    return {**setting, "steps": 4, "gd_steps": 2, "evaluate_every": 2}


@pytest.mark.parametrize("name", [f"{figure}{panel}" for figure in PANELS for panel in "cd"])
def test_panels_run_on_the_official_formats(folder, name):
    artefact, setting = KNOWN[name], tiny(name)
    cases = artefact.cases(setting)
    ends = [cases[0], cases[-1]]
    results = [artefact.run(setting, case, Data(folder)) for case in ends]
    assert all(0 <= result["test_error"] <= 1 for result in results)
    assert all(0 <= result["alignment"] <= 1 for result in results)
    records = [{"case": case, "result": result} for case, result in zip(ends, results, strict=True)]
    verdict = artefact.judge(setting, records)
    assert "test error" in verdict.measured


@pytest.mark.parametrize("name", [f"{figure}d" for figure in PANELS])
def test_without_celeba_the_command_says_how_to_get_it(tmp_path, capsys, name):
    assert main(["reproduce", name, "--quick", "--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    for part in ("CelebA: not found; sought list_attr_celeba.txt", "forbids handing it on", "projects/CelebA.html"):
        assert part in said


def test_ten_classes_are_one_hot_and_the_reference_sees_the_true_labels(folder):
    spec = {"n": 100, "n_eval": 60, "image_size": 8, "reference_steps": 15, "width": 8, "network": "myrtle"}
    task = real_task("svhn", spec, 0, Data(folder))
    noisy = real_task("svhn", {**spec, "label_noise": 0.2}, 0, Data(folder))
    assert task.train.targets.shape == (100, 10)
    assert int((task.train.targets.argmax(1) != noisy.train.targets.argmax(1)).sum()) == 20
    torch.testing.assert_close(task.val.targets, noisy.val.targets)
    torch.testing.assert_close(task.egop, noisy.egop)
    right = (task.target(task.train.inputs).argmax(1) == task.train.targets.argmax(1)).float().mean()
    assert right > 0.2  # by chance 0.1
    columns = task.egop.diag().reshape(3, 8, 8).sum((0, 1))
    assert float(columns[:4].sum()) > 1.2 * float(columns[4:].sum())
    assert image_network(task, spec, 0)(task.val.inputs).shape == (60, 10)


def test_error_counts_the_examples_in_another_class(folder):
    task = real_task("celeba", {"n": 40, "n_eval": 20, "image_size": 8, "reference_steps": 40}, 0, Data(folder))
    model = image_network(task, {"width": 64, "depth": 2, "image_size": 8}, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    found = train(model, task, optimizer, batches(40, 40, torch.Generator()), steps=30, evaluate_every=30)
    wrong = [
        float(model(x[None]).detach()) * float(y) < 0 for x, y in zip(task.test.inputs, task.test.targets, strict=True)
    ]
    assert found["test_error"] == pytest.approx(sum(wrong) / 20)
    assert measure([{"case": {}, "result": found}]) == "test_error"
    assert measure([{"case": {}, "result": {"test_loss": 1.0}}]) == "test_loss"


def test_after_a_catapult_the_rate_is_held_below_critical_until_it_is_raised_again():
    task = rank(2, 40, 5, 5, d=8)
    model = ntk_mlp(8, 64, 2, generator=torch.Generator().manual_seed(0))
    lrs = [1.0] * 12 + [9.0] * 20 + [20.0] * 20
    decay = features._Decay(model, task, lrs)
    calm, spike = [1.0 - t / 100 for t in range(12)], [0.9, 2.0, 1.5, 0.5, 0.4, 0.4, 0.4, 0.4]
    assert decay(calm[:10]) == math.inf
    assert decay(calm) == math.inf
    expected = 0.9 * critical_rate(ntk(model, task.train.inputs))
    assert decay(calm + spike) == pytest.approx(expected, rel=1e-3)
    assert decay([*calm, *spike, 0.4]) == pytest.approx(expected, rel=1e-3)
    assert decay([*calm, *spike, *[0.4] * 12]) == math.inf


def test_a_limit_cuts_the_rates_off():
    task = rank(2, 20, 5, 5, d=4)
    used = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            used.append(self.param_groups[0]["lr"])
            return super().step(closure)

    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    seen = []

    def limit(losses):
        seen.append(len(losses))
        return 0.15

    source = batches(20, 20, torch.Generator())
    train(model, task, Watched(model.parameters(), lr=1.0), source, steps=3, evaluate_every=1, lrs=[0.1, 0.2, 0.3],
          limit=limit)  # fmt: skip
    assert used == [0.1, 0.15, 0.15]
    assert seen == [0, 1, 2]
