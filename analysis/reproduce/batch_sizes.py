"""Smaller batches, more catapults, better features: Figures 4.9 and C.18 to C.21, Table 4.1."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from catapult_opt import critical_lr

from .. import tasks
from ..networks import mlp
from .artefact import Artefact, Case, Data, Record, Result, Setting, Verdict, mean_sd
from .real import image_network, real_task
from .training import measure, train_sgd

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ARTEFACTS"]

# Test loss and AGOP alignment by batch size.
_TABLE = {2000: (0.74, 0.81), 50: (0.71, 0.84), 10: (0.59, 0.89), 5: (0.42, 0.95)}


def _task(setting: Setting, name: str, seed: int, data: Data) -> tuple[tasks.RegressionTask, nn.Module]:
    """A task and its network: 2 layers for rank-2, 4 for the others (Appendix C.6, Figure 4.8); images say which."""
    if "image_size" in setting:
        spec = {**setting, "n": setting["n_train"]}
        task = real_task(name, spec, seed, data)
        return task, image_network(task, spec, seed)
    k = int(name.removeprefix("rank-"))
    n, m = setting["n_train"], setting["n_eval"]
    task = tasks.rank(k, n, m, m, d=setting["d"], seed=seed)
    # Not the task's seed: the same stream of normal numbers would make the first weights equal to the first inputs.
    generator = torch.Generator().manual_seed(10_000 + seed)
    width, depth = (setting["width"], 2) if k == 2 else (setting["deep_width"], 4)
    parameterization = setting.get("parameterization", "ntk")
    return task, mlp(setting["d"], width, depth, parameterization=parameterization, generator=generator)


def _of_task(setting: Setting, name: str) -> Setting:
    """The setting, with what it holds under the task's name."""
    return {**setting, **setting.get(name, {})}


def _cases(setting: Setting) -> list[Case]:
    return [
        {"task": task, "batch_size": min(size, chosen["n_train"]), "seed": seed}
        for task in setting["tasks"]
        for chosen in [_of_task(setting, task)]
        for seed in range(setting["seeds"])
        for size in chosen["batch_sizes"]
    ]


def _run(setting: Setting, case: Case, data: Data) -> Result:
    setting = _of_task(setting, case["task"])
    task, model = _task(setting, case["task"], case["seed"], data)
    eta = setting.get("lr")
    if eta is None:
        some = slice(setting.get("n_critical"))
        eta_crit = critical_lr(model, nn.MSELoss(), task.train.inputs[some], task.train.targets[some]).eta_crit
        eta = eta_crit / setting["below_critical"]
    return train_sgd(
        model,
        task,
        lr=eta,
        batch_size=case["batch_size"],
        max_steps=setting["max_steps"],
        evaluate_every=setting["evaluate_every"],
        measure_every=50 if case["batch_size"] == setting["n_train"] else setting["measure_every"],
        generator=torch.Generator().manual_seed(20_000 + case["seed"]),
    )


def by_batch(records: list[Record], task: str, key: str) -> dict[int, list[float]]:
    """Values of a key, a list over the seeds for each batch size, large batches first."""
    chosen = [record for record in records if record["case"]["task"] == task]
    sizes = sorted({record["case"]["batch_size"] for record in chosen}, reverse=True)
    return {size: [r["result"][key] for r in chosen if r["case"]["batch_size"] == size] for size in sizes}


def rises(values: Sequence[float]) -> bool:
    return all(a < b for a, b in pairwise(values))


def _orders(records: list[Record], task: str, count: bool) -> tuple[bool, bool, str]:
    """Is it better at every smaller batch on average, and at the smallest than at the largest on every seed?

    ``count``: and are there never fewer super-critical steps, and more at the smallest than at the largest?
    """
    test = measure([record for record in records if record["case"]["task"] == task])
    loss, features, share = (by_batch(records, task, key) for key in (test, "alignment", "super_critical_share"))
    ordered = all(
        rises([sign * float(np.mean(v)) for v in values.values()]) for sign, values in ((-1, loss), (1, features))
    )
    if count:
        shares = [float(np.mean(v)) for v in share.values()]
        ordered = ordered and shares == sorted(shares) and shares[0] < shares[-1]
    large, small = max(loss), min(loss)
    ends = all(s < b for s, b in zip(loss[small], loss[large], strict=True)) and all(
        s > b for s, b in zip(features[small], features[large], strict=True)
    )
    digits = 2 if test == "test_loss" else 3
    measured = "; ".join(
        f"batch {size}: {test.replace('_', ' ')} {mean_sd(loss[size], digits)}, "
        f"alignment {mean_sd(features[size])}, super-critical {100 * float(np.mean(share[size])):.0f} %"
        for size in loss
    )
    return ordered, ends, f"{task}: {measured}"


def _judge_figure(setting: Setting, records: list[Record]) -> Verdict:
    found = {task: _orders(records, task, count=True) for task in setting["tasks"]}
    measured = ". ".join(text for _, _, text in found.values())
    return _verdict([ordered for ordered, _, _ in found.values()], [ends for _, ends, _ in found.values()], measured)


def _judge_table(setting: Setting, records: list[Record]) -> Verdict:
    ordered, ends, measured = _orders(records, "rank-2", count=False)
    return _verdict([ordered], [ends], measured)


def _judge_validation(setting: Setting, records: list[Record]) -> Verdict:
    """Figures C.19 and C.20: the best validation loss is lower at every smaller batch."""
    ordered, ends, texts = [], [], []
    for task in dict.fromkeys(record["case"]["task"] for record in records):
        loss = by_batch(records, task, "val_loss")
        ordered.append(rises([-float(np.mean(v)) for v in loss.values()]))
        ends.append(all(s < b for s, b in zip(loss[min(loss)], loss[max(loss)], strict=True)))
        texts.append(f"{task}: " + ", ".join(f"{mean_sd(v)} at batch {size}" for size, v in loss.items()))
    return _verdict(ordered, ends, "best validation loss " + "; ".join(texts))


def _verdict(ordered: list[bool], ends: list[bool], measured: str) -> Verdict:
    if all(ordered) and all(ends):
        return Verdict("holds", measured)
    why = "" if all(ordered) else "The means are not in order at every batch size. "
    why += "" if all(ends) else "The smallest batch is not better than the largest on every seed. "
    return Verdict("holds in part" if all(ends) or any(ordered) else "fails", measured, why.strip())


def _draw(records: list[Record], figure: Figure) -> None:
    names = sorted({record["case"]["task"] for record in records})
    axes = figure.subplots(len(names), 3, squeeze=False)
    for row, task in zip(axes, names, strict=True):
        test = measure([record for record in records if record["case"]["task"] == task])
        panels = {
            test: test.replace("_", " "), "alignment": "AGOP alignment", "super_critical_share": "super-critical steps"
        }  # fmt: skip
        for ax, (key, label) in zip(row, panels.items(), strict=True):
            values = by_batch(records, task, key)
            positions = range(len(values))
            spread = [np.std(v, ddof=1) if len(v) > 1 else 0.0 for v in values.values()]
            ax.errorbar(positions, [np.mean(v) for v in values.values()], spread, marker="o", capsize=3, label="here")
            column = {"test_loss": 0, "alignment": 1}.get(key)
            if task == "rank-2" and column is not None:
                there = {i: _TABLE[size][column] for i, size in enumerate(values) if size in _TABLE}
                ax.plot(list(there), list(there.values()), "kD", fillstyle="none", label="thesis")
                ax.legend(frameon=False)
            ax.set_xticks(positions, [str(size) for size in values])
            ax.set(title=f"{task}: {label}", xlabel="batch size")


_FULL: dict[str, Any] = {
    "tasks": ["rank-2", "rank-3"], "batch_sizes": [5, 10, 50, 100, 2000], "d": 100, "width": 1024, "deep_width": 256,
    "n_train": 2000, "n_eval": 5000, "below_critical": 2, "max_steps": 10_000, "evaluate_every": 100,
    "measure_every": 10, "seeds": 3,
}  # fmt: skip
_QUICK: dict[str, Any] = {
    "batch_sizes": [5, 50, 500], "d": 40, "width": 256, "deep_width": 64, "n_train": 500, "n_eval": 1000,
    "max_steps": 1000, "evaluate_every": 25,
}  # fmt: skip
# Table 4.1 (rank-2) is recorded in the thesis' setting; gradient descent of the deep networks takes too long for it.
_DEEP: dict[str, Any] = {"batch_sizes": [5, 50, 500], "n_train": 500, "n_eval": 2000, "max_steps": 1500}
_SCALES = {
    "full": _FULL,
    "recorded": {**_FULL, "rank-3": _DEEP},
    "quick": {**_FULL, **_QUICK, "seeds": 1},
}
_TORCH_FULL: dict[str, Any] = {**_FULL, "parameterization": "torch", "lr": 0.01}
_TORCH_SCALES: dict[str, Setting] = {
    "full": _TORCH_FULL,
    "recorded": {
        **_TORCH_FULL, "tasks": ["rank-2"], "batch_sizes": [5, 50, 500], "d": 40, "n_train": 500, "n_eval": 2000,
        "max_steps": 5000, "seeds": 2,
    },
    "quick": {**_TORCH_FULL, **_QUICK, "seeds": 1},
}  # fmt: skip
_RANK4_FULL: dict[str, Any] = {**_FULL, "tasks": ["rank-4"]}
_RANK4_SCALES: dict[str, Setting] = {
    "full": _RANK4_FULL,
    "recorded": {**_RANK4_FULL, **_DEEP, "seeds": 2},
    "quick": {**_RANK4_FULL, **_QUICK, "seeds": 1},
}
# Panels (c) and (d) of Figure 4.9, (b) and (c) of Figure C.21.
_IMAGES: dict[str, Any] = {
    **{key: _FULL[key] for key in ("batch_sizes", "below_critical", "max_steps", "evaluate_every", "measure_every")},
    "n_eval": 5000, "n_critical": 5000, "reference_steps": 3000, "width": 256, "depth": 4, "seeds": 3,
}  # fmt: skip
_SVHN: dict[str, Any] = {
    **_IMAGES, "tasks": ["svhn"], "n_train": 73_257, "image_size": 32, "network": "myrtle", "max_steps": 100_000,
}  # fmt: skip
_CELEBA: dict[str, Any] = {**_IMAGES, "tasks": ["celeba"], "n_train": 162_770, "image_size": 96, "max_steps": 100_000}
_NOISY: dict[str, Any] = {**_IMAGES, "n_train": 2000, "label_noise": 0.1}
_USPS: dict[str, Any] = {**_NOISY, "tasks": ["usps-2"], "image_size": 16}
_FASHION: dict[str, Any] = {**_NOISY, "tasks": ["fashion-2"], "image_size": 28}


def _image_scales(full: dict[str, Any], **recorded: Any) -> dict[str, Setting]:
    small = {"batch_sizes": [5, 50, recorded["n_train"]], "evaluate_every": 50, "seeds": 2, **recorded}
    tiny = {**small, "batch_sizes": [5, 60], "n_train": 60, "n_eval": 40, "width": 16, "max_steps": 40}
    tiny |= {"evaluate_every": 20, "reference_steps": 10, "seeds": 1}
    return {"full": full, "recorded": {**full, **small}, "quick": {**full, **tiny}}


_CLAIM = (
    "With SGD at half the full batch's critical rate, a smaller batch goes above its own critical rate more often, "
    "and ends with a lower test loss and a better AGOP alignment."
)

_IMAGE_FIGURE: dict[str, Any] = {
    "claim": _CLAIM.replace("test loss", "test error"), "printed": "", "cases": _cases, "run": _run,
    "judge": _judge_figure, "draw": _draw,
}  # fmt: skip

ARTEFACTS = (
    Artefact(
        name="fig-4.9",
        title="Batch size against test loss, AGOP alignment and catapults, rank-2 and rank-3",
        source="Figure 4.9 (a, b) and Appendix C.6",
        claim=_CLAIM,
        printed="",
        scales=_SCALES,
        cases=_cases,
        run=_run,
        judge=_judge_figure,
        draw=_draw,
    ),
    Artefact(
        name="fig-4.9c",
        title="Batch size against test error, AGOP alignment and catapults, SVHN",
        source="Figure 4.9 (c) and Appendix C.6",
        scales=_image_scales(
            _SVHN, n_train=300, n_eval=1000, image_size=8, width=32, reference_steps=100, max_steps=500, seeds=1
        ),
        **_IMAGE_FIGURE,
    ),
    Artefact(
        name="fig-4.9d",
        title="Batch size against test error, AGOP alignment and catapults, CelebA",
        source="Figure 4.9 (d) and Appendix C.6",
        scales=_image_scales(_CELEBA, n_train=2000, n_eval=2000, image_size=32, reference_steps=600, max_steps=5000),
        **_IMAGE_FIGURE,
    ),
    Artefact(
        name="table-4.1",
        title="Batch size against test loss and AGOP alignment, rank-2",
        source="Table 4.1",
        claim="A smaller batch leads to a better AGOP alignment and a lower test loss.",
        printed="; ".join(f"batch {size}: test loss {loss}, alignment {a}" for size, (loss, a) in _TABLE.items()),
        scales=_SCALES,
        cases=lambda setting: [case for case in _cases(setting) if case["task"] == "rank-2"],
        run=_run,
        judge=_judge_table,
        draw=_draw,
        shares="fig-4.9",
    ),
    Artefact(
        name="fig-c.18",
        title="Batch size with PyTorch's default parameterisation, rank-2 and rank-3",
        source="Figure C.18 (a, b) and Appendix C.6",
        claim=_CLAIM.replace("half the full batch's critical rate", "rate 0.01"),
        printed="rate 0.01",
        scales=_TORCH_SCALES,
        cases=_cases,
        run=_run,
        judge=_judge_figure,
        draw=_draw,
    ),
    Artefact(
        name="fig-c.19",
        title="Best validation loss by batch size, rank-2 and rank-3",
        source="Figure C.19 (a, b) (the setting of Figure 4.9)",
        claim="A smaller batch reaches a lower validation loss.",
        printed="",
        scales=_SCALES,
        cases=_cases,
        run=_run,
        judge=_judge_validation,
        draw=_draw,
        shares="fig-4.9",
    ),
    Artefact(
        name="fig-c.20",
        title="Best validation loss by batch size with PyTorch's default parameterisation",
        source="Figure C.20 (a, b) (the setting of Figure C.18)",
        claim="A smaller batch reaches a lower validation loss.",
        printed="",
        scales=_TORCH_SCALES,
        cases=_cases,
        run=_run,
        judge=_judge_validation,
        draw=_draw,
        shares="fig-c.18",
    ),
    Artefact(
        name="fig-c.21",
        title="Batch size against test loss, AGOP alignment and catapults, rank-4",
        source="Figure C.21 (a) and Appendix C.6",
        claim=_CLAIM,
        printed="",
        scales=_RANK4_SCALES,
        cases=_cases,
        run=_run,
        judge=_judge_figure,
        draw=_draw,
    ),
    Artefact(
        name="fig-c.21b",
        title="Batch size against test error, AGOP alignment and catapults, USPS with 10 % label noise",
        source="Figure C.21 (b) and Appendix C.6",
        scales=_image_scales(_USPS, n_train=500, n_eval=400, reference_steps=100, max_steps=1500),
        **_IMAGE_FIGURE,
    ),
    Artefact(
        name="fig-c.21c",
        title="Batch size against test error, AGOP alignment and catapults, Fashion-MNIST with 10 % label noise",
        source="Figure C.21 (c) and Appendix C.6",
        scales=_image_scales(_FASHION, n_train=500, n_eval=400, image_size=14, reference_steps=100, max_steps=1500),
        **_IMAGE_FIGURE,
    ),
)
