"""Optimizers and feature learning: Figure 4.11, Table C.1."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.stats import spearmanr

from .artefact import Artefact, Case, Data, Record, Result, Setting, Verdict, graded, mean_sd
from .feature_tasks import (
    CELEBA,
    CELEBA_RECORDED,
    FEW_IMAGES,
    SVHN,
    SVHN_RECORDED,
    distinct,
    of_task,
    results_by,
    task_and_model,
)
from .training import batches, measure, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ARTEFACTS"]


_OPTIMIZERS: dict[str, Any] = {
    "GD": torch.optim.SGD,
    "SGD": torch.optim.SGD,
    "SGD+M": lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9),
    "Adadelta": torch.optim.Adadelta,
    "Adagrad": torch.optim.Adagrad,
    "RMSprop": torch.optim.RMSprop,
    "Adam": torch.optim.Adam,
}


# Table C.1.
_LR = {
    "rank-2": {"SGD": 2.0, "GD": 2.0, "SGD+M": 2.0, "Adadelta": 2.0, "Adagrad": 0.1, "RMSprop": 1e-2, "Adam": 1e-2},
    "rank-3": {"SGD": 2.0, "GD": 2.0, "SGD+M": 2.0, "Adadelta": 2.0, "Adagrad": 1e-2, "RMSprop": 1e-2, "Adam": 1e-3},
    "rank-4": {"SGD": 1.0, "GD": 1.0, "SGD+M": 1.0, "Adadelta": 1.0, "Adagrad": 5e-3, "RMSprop": 1e-3, "Adam": 1e-3},
    "svhn-2": {"SGD": 5.0, "GD": 5.0, "SGD+M": 5.0, "Adadelta": 5.0, "Adagrad": 5e-3, "RMSprop": 1e-4, "Adam": 1e-3},
    "celeba": {"SGD": 10.0, "GD": 10.0, "SGD+M": 10.0, "Adadelta": 10.0, "Adagrad": 5e-3, "RMSprop": 1e-3,
               "Adam": 1e-3},
}  # fmt: skip


def _optimizer_cases(setting: Setting) -> list[Case]:
    return [
        {"task": task, "optimizer": name, "seed": seed}
        for task in setting["tasks"]
        for seed in range(setting["seeds"])
        for name in _OPTIMIZERS
    ]


def _run_optimizer(setting: Setting, case: Case, data: Data) -> Result:
    task, model = task_and_model(setting, case["task"], case["seed"], data)
    name = case["optimizer"]
    optimizer = _OPTIMIZERS[name](model.parameters(), lr=_LR[case["task"]][name])
    size = len(task.train) if name == "GD" else min(setting["batch_size"], len(task.train))
    source = batches(len(task.train), size, torch.Generator().manual_seed(20_000 + case["seed"]))
    steps = setting["gd_steps"] if name == "GD" else setting["steps"]
    return train(model, task, optimizer, source, steps=steps, evaluate_every=setting["evaluate_every"])


def _judge_correlation(setting: Setting, records: list[Record]) -> Verdict:
    passed, failures, texts = [], [], []
    for task in distinct(records):
        test = measure(of_task(records, task))
        loss, features = (
            results_by(records, task, "optimizer", test),
            results_by(records, task, "optimizer", "alignment"),
        )
        finite = [name for name in loss if np.isfinite(loss[name]).all() and np.isfinite(features[name]).all()]
        a, b = ([float(np.mean(values[name])) for name in finite] for values in (features, loss))
        r = float(np.corrcoef(a, b)[0, 1]) if len(finite) > 2 else math.nan
        rank = float(spearmanr(a, b).statistic) if len(finite) > 2 else math.nan
        passed.append(r <= -0.9 and rank <= -0.9)
        if not passed[-1]:
            failures.append(f"{task}: not both correlations are -0.9 or below.")
        texts.append(
            f"{task}: correlation with the {test.replace('_', ' ')} {r:.2f}, of ranks {rank:.2f} over {len(finite)} "
            "optimizers (" + ", ".join(f"{name} {mean_sd(loss[name])}/{mean_sd(features[name])}" for name in loss) + ")"
        )
    return graded(passed, "; ".join(texts), failures)


def _judge_trains(setting: Setting, records: list[Record]) -> Verdict:
    passed, failures, texts = [], [], []
    for task in distinct(records):
        loss = results_by(records, task, "optimizer", "train_loss")
        for name, values in loss.items():
            passed.append(bool(np.isfinite(values).all()) and max(values) < 0.1)
            if not passed[-1]:
                failures.append(f"{task}, {name}: training loss {max(values):.2g} after all steps.")
        texts.append(f"{task}: " + ", ".join(f"{name} {mean_sd(values, 4)}" for name, values in loss.items()))
    return graded(passed, "training loss at the end: " + "; ".join(texts), failures)


def _draw_optimizers(records: list[Record], figure: Figure) -> None:
    names = distinct(records)
    for ax, task in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        test = measure(of_task(records, task))
        loss, features = (
            results_by(records, task, "optimizer", test),
            results_by(records, task, "optimizer", "alignment"),
        )
        for name in loss:
            ax.plot(features[name], loss[name], "o", label=name)
        ax.set(title=task, xlabel="AGOP alignment", ylabel=test.replace("_", " "))
        ax.legend(frameon=False, fontsize="small")


_OPTIMIZER_FULL: Setting = {
    "d": 100, "n_eval": 5000, "batch_size": 100, "steps": 20_000, "gd_steps": 20_000, "evaluate_every": 100, "seeds": 3,
    "tasks": {
        "rank-2": {"n": 2000, "width": 1024, "depth": 2},
        "rank-3": {"n": 1000, "width": 256, "depth": 4},
        "rank-4": {"n": 1000, "width": 256, "depth": 4},
    },
}  # fmt: skip


_OPTIMIZER_SCALES: dict[str, Setting] = {
    "full": _OPTIMIZER_FULL,
    "recorded": {
        **_OPTIMIZER_FULL, "n_eval": 2000, "steps": 1000, "gd_steps": 300, "evaluate_every": 50, "seeds": 2,
        "tasks": {"rank-2": _OPTIMIZER_FULL["tasks"]["rank-2"], "rank-4": _OPTIMIZER_FULL["tasks"]["rank-4"]},
    },
    "quick": {
        **_OPTIMIZER_FULL, "n_eval": 500, "steps": 100, "gd_steps": 50, "evaluate_every": 25, "seeds": 1,
        "tasks": {"rank-2": {"n": 300, "width": 128, "depth": 2}},
    },
}  # fmt: skip


def _image_optimizer_scales(name: str, full: dict[str, Any], recorded: dict[str, Any]) -> dict[str, Setting]:
    keys = ("n", "n_eval", "image_size", "reference_steps", "network", "width", "depth")
    spec = {key: full[key] for key in keys}
    small = {"steps": 150, "gd_steps": 80, "evaluate_every": 25, "seeds": 1}
    return {
        "full": {**_OPTIMIZER_FULL, "tasks": {name: spec}},
        "recorded": {**_OPTIMIZER_FULL, **small, "tasks": {name: {**spec, **recorded}}},
        "quick": {
            **_OPTIMIZER_FULL, **small, "steps": 10, "gd_steps": 5, "evaluate_every": 5, "seeds": 1,
            "tasks": {name: {**spec, **recorded, **FEW_IMAGES}},
        },
    }  # fmt: skip


_OPTIMIZERS_CLAIM = "Over optimizers, a better AGOP alignment goes with a lower test {}."


_IMAGE_OPTIMIZERS: dict[str, Any] = {
    "claim": _OPTIMIZERS_CLAIM.format("error"), "cases": _optimizer_cases, "run": _run_optimizer,
    "judge": _judge_correlation, "draw": _draw_optimizers,
}  # fmt: skip

ARTEFACTS = (
    Artefact(
        name="fig-4.11",
        title="Test loss against AGOP alignment over seven optimizers",
        source="Figure 4.11 and Appendix C.6",
        claim=_OPTIMIZERS_CLAIM.format("loss"),
        printed="",
        scales=_OPTIMIZER_SCALES,
        cases=_optimizer_cases,
        run=_run_optimizer,
        judge=_judge_correlation,
        draw=_draw_optimizers,
    ),
    Artefact(
        name="fig-4.11c",
        title="Test error against AGOP alignment over seven optimizers, SVHN-2",
        source="Figure 4.11 (c), Table C.1 and Appendix C.6",
        printed="the rates of Table C.1",
        scales=_image_optimizer_scales("svhn-2", SVHN, SVHN_RECORDED),
        **_IMAGE_OPTIMIZERS,
    ),
    Artefact(
        name="fig-4.11d",
        title="Test error against AGOP alignment over seven optimizers, CelebA",
        source="Figure 4.11 (d), Table C.1 and Appendix C.6",
        printed="the rates of Table C.1",
        scales=_image_optimizer_scales("celeba", CELEBA, CELEBA_RECORDED),
        **_IMAGE_OPTIMIZERS,
    ),
    Artefact(
        name="table-c.1",
        title="The learning rates of Figure 4.11 train the networks",
        source="Table C.1",
        claim="With the table's rates every optimizer fits the training set.",
        printed="the rates",
        scales=_OPTIMIZER_SCALES,
        cases=_optimizer_cases,
        run=_run_optimizer,
        judge=_judge_trains,
        draw=_draw_optimizers,
        shares="fig-4.11",
    ),
)
