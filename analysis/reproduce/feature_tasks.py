"""Tasks and networks of the artefacts on feature learning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import tasks
from ..networks import ntk_mlp
from ..tasks import RegressionTask
from .artefact import Data, Record, Setting
from .real import image_network, real_task

if TYPE_CHECKING:
    pass

__all__ = [
    "CELEBA",
    "CELEBA_RECORDED",
    "FEW_IMAGES",
    "FIG48_TASKS",
    "FULL_RANK",
    "RANK4",
    "REAL_TASKS",
    "SVHN",
    "SVHN_RECORDED",
    "distinct",
    "of_task",
    "results_by",
    "task_and_model",
]


def task_and_model(setting: Setting, name: str, seed: int, data: Data) -> tuple[RegressionTask, nn.Module]:
    """The task and its network: 2 layers for rank-2 and the full-rank task, 4 for the others; images say which."""
    spec = setting["tasks"][name]
    if "image_size" in spec:
        task = real_task(name, spec, seed, data)
        return task, image_network(task, spec, seed)
    counts = {"n_train": spec["n"], "n_val": setting["n_eval"], "n_test": setting["n_eval"], "d": setting["d"]}
    task = (
        tasks.full_rank(**counts, seed=seed) if name == "full-rank" else tasks.rank(int(name[-1]), **counts, seed=seed)
    )
    generator = torch.Generator().manual_seed(10_000 + seed)  # not the task's seed
    return task, ntk_mlp(setting["d"], spec["width"], spec["depth"], generator=generator)


def of_task(records: Sequence[Record], task: str) -> list[Record]:
    return [record for record in records if record["case"]["task"] == task]


def distinct(records: Sequence[Record], key: str = "task") -> list[Any]:
    return list(dict.fromkeys(record["case"][key] for record in records))


def results_by(records: Sequence[Record], task: str, factor: str, key: str) -> dict[Any, list[float]]:
    """A task's results ``key``, over its seeds, for every value of a factor of the cases."""
    chosen = of_task(records, task)
    return {
        value: [r["result"][key] for r in chosen if r["case"][factor] == value] for value in distinct(chosen, factor)
    }


FIG48_TASKS: dict[str, dict[str, Any]] = {
    "rank-2": {
        "n": 2000, "width": 1024, "depth": 2, "lr": 2.0, "rates": [8, 16, 30, 50, 75, 80],
        "at": [50, 150, 220, 280, 350, 400], "steps": 500, "increases": [0, 1, 2, 3, 4, 5, 6],
        "near_zero_lr": 24.0, "near_zero_steps": 1500,
    },
    "rank-3": {
        "n": 1000, "width": 256, "depth": 4, "lr": 2.0, "rates": [40, 100, 150], "at": [20, 60, 80], "steps": 400,
        "increases": [0, 1, 2, 3],
    },
}  # fmt: skip


# Validation and test examples: 5,000 each in the thesis, more than the official files have of two classes.
REAL: dict[str, Any] = {
    "n": 1000, "n_eval": 400, "width": 256, "depth": 4, "lr": 2.0, "increases": [0, 1, 2, 3], "decay": True,
}  # fmt: skip


REAL_TASKS: dict[str, dict[str, Any]] = {
    "usps-2": {
        **REAL, "image_size": 16, "reference_steps": 300, "rates": [15, 30, 40], "at": [10, 30, 45], "steps": 200,
    },
    "fashion-2": {
        **REAL, "n": 700, "image_size": 14, "reference_steps": 300, "rates": [10, 40, 55], "at": [6, 20, 30],
        "steps": 200,
    },
}  # fmt: skip


# Panels (c) and (d) of Figures 4.8 and 4.11. The first rates are those of Table C.1.
SVHN: dict[str, Any] = {
    "n": 1000, "n_eval": 5000, "image_size": 32, "reference_steps": 3000, "network": "cnn", "width": 256, "depth": 5,
    "lr": 5.0, "rates": [30, 60, 90], "at": [10, 35, 50], "steps": 200, "increases": [0, 1, 2, 3], "decay": True,
}  # fmt: skip


CELEBA: dict[str, Any] = {
    **SVHN, "image_size": 96, "network": "fcn", "depth": 4, "lr": 10.0, "rates": [40, 70, 100],
}  # fmt: skip


# SVHN: what the small file of its test part has of the two classes.
SVHN_RECORDED: dict[str, Any] = {"n": 300, "n_eval": 500, "image_size": 8, "reference_steps": 200, "width": 32}


CELEBA_RECORDED: dict[str, Any] = {"n_eval": 2000, "image_size": 32, "reference_steps": 600}


RANK4: dict[str, Any] = {
    "n": 1000, "width": 256, "depth": 4, "lr": 1.0, "rates": [15, 40, 60], "at": [50, 75, 110], "steps": 400,
    "increases": [0, 1, 2, 3], "decay": True,
}  # fmt: skip


# The rate is raised until step 280, long after the training loss falls below 1e-3: there is no stop at that.
FULL_RANK: dict[str, Any] = {
    "n": 128, "width": 1024, "depth": 2, "lr": 6.0, "rates": [7, 12, 40, 80], "at": [30, 120, 180, 280], "steps": 400,
    "increases": [0, 1, 2, 3, 4], "target_loss": 0.0,
}  # fmt: skip


# Of tasks of images, at the quick scale.
FEW_IMAGES: dict[str, Any] = {"n": 60, "n_eval": 40, "width": 16, "reference_steps": 20}
