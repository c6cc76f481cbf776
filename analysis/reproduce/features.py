"""Catapults of gradient descent and feature learning: Figures 4.8 and C.13 to C.17."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import nn

from catapult_opt import critical_lr

from ..networks import scale_weights_
from ..tasks import RegressionTask
from .artefact import Artefact, Case, Data, Record, Result, Setting, Verdict, graded, mean_sd, on_panels
from .feature_tasks import (
    CELEBA,
    CELEBA_RECORDED,
    FEW_IMAGES,
    FIG48_TASKS,
    FULL_RANK,
    RANK4,
    REAL_TASKS,
    SVHN,
    SVHN_RECORDED,
    distinct,
    of_task,
    results_by,
    task_and_model,
)
from .tracing import episodes
from .training import TARGET_LOSS, batches, measure, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ARTEFACTS"]

_NEAR_ZERO = "near zero"


# --------------------------------------------------------------------------------------------------- rates raised again


def _schedule_cases(setting: Setting) -> list[Case]:
    """For every task: gradient descent with the first 0, 1, ... of its increases, and from near zero if asked for."""
    return [
        {"task": name, "increases": increases, "seed": seed}
        for name, spec in setting["tasks"].items()
        for seed in range(setting["seeds"])
        for increases in [*spec["increases"], *([_NEAR_ZERO] if "near_zero_lr" in spec else [])]
    ]


def _run_schedule(setting: Setting, case: Case, data: Data) -> Result:
    spec = setting["tasks"][case["task"]]
    task, model = task_and_model(setting, case["task"], case["seed"], data)
    if case["increases"] == _NEAR_ZERO:
        scale_weights_(model, 0.1)
        lrs = [spec["near_zero_lr"]] * spec["near_zero_steps"]
    else:
        raised = [spec["lr"], *spec["rates"][: case["increases"]]]
        at = spec["at"][: case["increases"]]
        lrs = [raised[sum(t >= s for s in at)] for t in range(spec["steps"])]
    optimizer = torch.optim.SGD(model.parameters(), lr=lrs[0])
    source = batches(len(task.train), len(task.train), torch.Generator())
    found = train(
        model,
        task,
        optimizer,
        source,
        steps=len(lrs),
        evaluate_every=setting["evaluate_every"],
        lrs=lrs,
        limit=_Decay(model, task, lrs) if spec.get("decay") else None,
        target_loss=spec.get("target_loss", TARGET_LOSS),
    )
    losses = found["curves"]["loss"]
    return {**found, "catapults": len(episodes(losses))}


class _Decay:
    """Between a catapult and the next increase of the rate: 0.9 times the critical rate, measured every 10 steps.

    "We decay the learning rate if necessary after the catapult to avoid extra catapults" (Appendix C.6).
    """

    def __init__(self, model: nn.Module, task: RegressionTask, lrs: Sequence[float]) -> None:
        self.model, self.task, self.lrs = model, task, lrs
        self.start, self.limit = 0, math.inf

    def __call__(self, losses: Sequence[float]) -> float:
        t = len(losses)
        if t and self.lrs[t] > self.lrs[t - 1]:
            self.start, self.limit = t, math.inf
        if t % 10 == 0 and episodes(losses[self.start :]):
            train = self.task.train
            self.limit = 0.9 * critical_lr(self.model, nn.MSELoss(), train.inputs, train.targets).eta_crit
        return self.limit


def _judge_schedule(setting: Setting, records: list[Record]) -> Verdict:
    """By the test loss of regression and the test error of classification."""
    passed, failures, texts = [], [], []
    for task in distinct(records):
        test = measure(of_task(records, task))
        label = test.replace("_", " ")
        loss, features, spikes = (
            results_by(records, task, "increases", key) for key in (test, "alignment", "catapults")
        )
        steps = [increases for increases in loss if increases != _NEAR_ZERO]
        # By the catapults that were counted: an increase of the rate need not make one.
        counts, losses, alignments = ([v for i in steps for v in by[i]] for by in (spikes, loss, features))
        order = _rank_correlation(counts, losses), _rank_correlation(counts, alignments)
        inside = [
            float(np.mean([_rank_correlation(*pair) for pair in zip(_by_seed(spikes, steps), other, strict=True)]))
            for other in (_by_seed(loss, steps), _by_seed(features, steps))
        ]
        ends = all(b < a for a, b in zip(loss[steps[0]], loss[steps[-1]], strict=True)) and all(
            b > a for a, b in zip(features[steps[0]], features[steps[-1]], strict=True)
        )
        passed.append(ends and order[0] <= -0.7 and order[1] >= 0.7)
        if not passed[-1]:
            failures.append(f"{task}: runs with more catapults do not have a lower {label} and a better alignment.")
        ends_of = [r["result"]["train_loss"] for r in of_task(records, task)]
        if diverged := sum(not math.isfinite(end) for end in ends_of):
            failures.append(f"{task}: {diverged} of {len(ends_of)} runs diverge.")
        texts.append(
            f"{task} (rank correlations with the number of catapults {order[0]:.2f} and {order[1]:.2f}, within a seed "
            f"{inside[0]:.2f} and {inside[1]:.2f}): "
            + "; ".join(
                f"{i} increases ({mean_sd(spikes[i], 1)} catapults) {label} {mean_sd(loss[i], 3)}, "
                f"alignment {mean_sd(features[i])}"
                for i in steps
            )
        )
    return graded(passed, ". ".join(texts), failures)


def _by_seed(found: dict[Any, list[float]], steps: Sequence[Any]) -> list[list[float]]:
    """A list over ``steps`` for each seed."""
    return [list(values) for values in zip(*(found[i] for i in steps), strict=True)]


def _rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's, 0 where one of them does not vary."""
    return float(spearmanr(a, b).statistic) if len(set(a)) > 1 and len(set(b)) > 1 else 0.0


def _judge_near_zero(setting: Setting, records: list[Record]) -> Verdict:
    passed, failures, texts = [], [], []
    for task in distinct(records):
        loss, features = (results_by(records, task, "increases", key) for key in ("test_loss", "alignment"))
        others = [increases for increases in loss if increases != _NEAR_ZERO]
        if len(others) == len(loss):
            continue
        small = float(np.mean(loss[_NEAR_ZERO])), float(np.mean(features[_NEAR_ZERO]))
        passed.append(
            all(small[0] <= float(np.mean(loss[i])) and small[1] >= float(np.mean(features[i])) for i in others)
        )
        if not passed[-1]:
            failures.append(f"{task}: near zero initialisation is not the best in both.")
        last = others[-1]
        texts.append(
            f"{task}: near zero test loss {mean_sd(loss[_NEAR_ZERO])}, alignment {mean_sd(features[_NEAR_ZERO])}; "
            f"{last} increases {mean_sd(loss[last])}, {mean_sd(features[last])}"
        )
    return graded(passed, "; ".join(texts), failures)


def _judge_full_rank(setting: Setting, records: list[Record]) -> Verdict:
    """Neither the test loss nor the alignment improves by more than 5 % with catapults after the first.

    The claim is about several catapults. The first rate, 6, lies at the critical one: some seeds have a catapult from
    the start and some do not, which is a difference of the start and not of the catapults that are added.
    """
    loss, features, spikes = (
        results_by(records, "full-rank", "increases", key) for key in ("test_loss", "alignment", "catapults")
    )
    means = {
        i: [float(np.mean(found[i])) for found in (loss, features, spikes)]
        for i in sorted(loss, key=lambda i: float(np.mean(spikes[i])))
    }
    caught = [mean for mean in means.values() if mean[2] >= 1]
    more = [mean for mean in caught if mean[2] > caught[0][2]] if caught else []
    measured = "; ".join(
        f"{i} increases ({mean_sd(spikes[i], 1)} catapults) test loss {mean_sd(loss[i], 4)}, alignment "
        f"{mean_sd(features[i], 3)}"
        for i in loss
    )
    statements = {
        "further catapults do not lower the test loss by 5 %": [m[0] >= 0.95 * caught[0][0] for m in more],
        "nor raise the alignment by 5 %": [m[1] <= 1.05 * caught[0][1] for m in more],
    }
    return on_panels({"full-rank": statements}, measured)


def _judge_validation(setting: Setting, records: list[Record]) -> Verdict:
    """Figure C.13: the validation loss falls below what it was before, after every catapult."""
    passed, texts = [], []
    for task in distinct(records):
        best = results_by(records, task, "increases", "val_loss")
        steps = [i for i in best if i != _NEAR_ZERO]
        order = float(spearmanr(steps, [float(np.mean(best[i])) for i in steps]).statistic)
        passed.append(order <= -0.7)
        texts.append(f"{task}: " + ", ".join(f"{mean_sd(best[i])} at {i}" for i in steps))
    return graded(passed, "best validation loss by number of increases: " + "; ".join(texts), [])


def _draw_schedule(records: list[Record], figure: Figure) -> None:
    names = distinct(records)
    figure.set_size_inches(9, 3.2 * len(names))
    for row, task in zip(figure.subplots(len(names), 3, squeeze=False), names, strict=True):
        test = measure(of_task(records, task))
        panels = {test: test.replace("_", " "), "alignment": "AGOP alignment"}
        for ax, (key, label) in zip(row, panels.items(), strict=False):
            found = results_by(records, task, "increases", key)
            positions = range(len(found))
            spread = [np.std(v, ddof=1) if len(v) > 1 else 0.0 for v in found.values()]
            ax.errorbar(positions, [np.mean(v) for v in found.values()], spread, marker="o", capsize=3)
            ax.set_xticks(positions, [str(i) for i in found])
            ax.set(title=f"{task}: {label}", xlabel="increases of the rate")
        last = max((r for r in of_task(records, task) if r["case"]["increases"] != _NEAR_ZERO), key=_increases)
        row[2].semilogy(last["result"]["curves"]["loss"], linewidth=1)
        row[2].set(title="training loss, all increases", xlabel="step")


def _increases(record: Record) -> int:
    return int(record["case"]["increases"])


def _draw_agop(records: list[Record], figure: Figure) -> None:
    """Top-left blocks of the AGOP, largest entry white, and the true one."""
    chosen = [r for r in of_task(records, "rank-2") if r["case"]["seed"] == 0]
    true = np.zeros((10, 10))
    true[0, 0] = true[1, 1] = 1
    blocks = [(str(r["case"]["increases"]), np.array(r["result"]["curves"]["agop_block"])) for r in chosen]
    axes = figure.subplots(1, len(blocks) + 1)
    for ax, (name, block) in zip(axes, [*blocks, ("true", true)], strict=True):
        ax.imshow((block - block.min()) / max(np.ptp(block), 1e-12), cmap="gray")
        ax.set(title=name, xticks=[], yticks=[])


def _image_scales(name: str, full: dict[str, Any], recorded: dict[str, Any], **changes: Any) -> dict[str, Setting]:
    """Of one task of images; ``changes`` are for the recorded and the quick scale."""
    return {
        "full": {"evaluate_every": 5, "seeds": 3, "tasks": {name: full}},
        "recorded": {"evaluate_every": 5, "seeds": 2, "tasks": {name: {**full, **recorded, **changes}}},
        "quick": {
            "evaluate_every": 20,
            "seeds": 1,
            "tasks": {name: {**full, **recorded, **FEW_IMAGES, **changes, "increases": [0, 3]}},
        },
    }


def _schedule_scales(
    chosen: dict[str, dict[str, Any]], changes: dict[str, dict[str, Any]], seeds: int
) -> dict[str, Setting]:
    """The three scales of some tasks; ``changes`` of them and ``seeds`` are for the recorded one."""
    full: Setting = {"d": 100, "n_eval": 5000, "evaluate_every": 5, "seeds": 3, "tasks": chosen}
    fast = {name: {"reference_steps": 150} if "reference_steps" in spec else {} for name, spec in chosen.items()}
    recorded = {name: {**spec, **fast[name], **changes.get(name, {})} for name, spec in chosen.items()}
    quick = {
        name: {**spec, **fast[name], "n": min(spec["n"], 200), "width": 128, "increases": [0, len(spec["rates"])]}
        for name, spec in chosen.items()
    }
    return {
        "full": full,
        "recorded": {**full, "n_eval": 2000, "evaluate_every": 10, "seeds": seeds, "tasks": recorded},
        "quick": {**full, "n_eval": 500, "evaluate_every": 20, "seeds": 1, "tasks": quick},
    }


# ------------------------------------------------------------------------------------------------------- small rates


_RAISED: dict[str, Any] = {"cases": _schedule_cases, "run": _run_schedule}
_FIG48: dict[str, Any] = {
    **_RAISED,
    "scales": _schedule_scales(
        FIG48_TASKS, {"rank-2": {"increases": [0, 1, 2, 3, 6]}, "rank-3": {"increases": [0, 1, 3]}}, seeds=2
    ),
}

_CATAPULTS_CLAIM = "With every further catapult of gradient descent the test {} falls and the AGOP alignment rises."
_IMAGE_SCHEDULE: dict[str, Any] = {
    **_RAISED, "claim": _CATAPULTS_CLAIM.format("error"), "judge": _judge_schedule, "draw": _draw_schedule,
}  # fmt: skip

ARTEFACTS = (
    Artefact(
        name="fig-4.8",
        title="More catapults of gradient descent, lower test loss and better AGOP alignment, rank-2 and rank-3",
        source="Figure 4.8 (a, b) and Appendix C.6",
        claim=_CATAPULTS_CLAIM.format("loss"),
        printed="",
        judge=_judge_schedule,
        draw=_draw_schedule,
        **_FIG48,
    ),
    Artefact(
        name="fig-4.8c",
        title="More catapults of gradient descent, lower test error and better AGOP alignment, SVHN-2",
        source="Figure 4.8 (c) and Appendix C.6",
        printed="rates 30, 60, 90 from steps 10, 35, 50",
        scales=_image_scales("svhn-2", SVHN, SVHN_RECORDED, steps=100, increases=[0, 1, 3]),
        **_IMAGE_SCHEDULE,
    ),
    Artefact(
        name="fig-4.8d",
        title="More catapults of gradient descent, lower test error and better AGOP alignment, CelebA",
        source="Figure 4.8 (d) and Appendix C.6",
        printed="rates 40, 70, 100 from steps 10, 35, 50",
        scales=_image_scales("celeba", CELEBA, CELEBA_RECORDED),
        **_IMAGE_SCHEDULE,
    ),
    Artefact(
        name="fig-c.13",
        title="Best validation loss by number of catapults, rank-2 and rank-3",
        source="Figure C.13 (a, b) (the setting of Figure 4.8)",
        claim="The validation loss gets lower with every further catapult.",
        printed="",
        judge=_judge_validation,
        draw=_draw_schedule,
        shares="fig-4.8",
        **_FIG48,
    ),
    Artefact(
        name="fig-c.14",
        title="Catapults against initialisation near zero, rank-2",
        source="Figure C.14 (a)",
        claim="Initialisation near zero (0.1 times the weights) has the lowest test loss and the best AGOP alignment.",
        printed="",
        judge=_judge_near_zero,
        draw=_draw_schedule,
        shares="fig-4.8",
        **{**_FIG48, "cases": lambda setting: [c for c in _schedule_cases(setting) if c["task"] == "rank-2"]},
    ),
    Artefact(
        name="fig-c.15",
        title="The AGOP's first ten rows and columns by number of catapults, rank-2",
        source="Figure C.15",
        claim="The more catapults, the closer the AGOP is to the true one.",
        printed="",
        judge=_judge_schedule,
        draw=_draw_agop,
        shares="fig-4.8",
        **{**_FIG48, "cases": lambda setting: [c for c in _schedule_cases(setting) if c["task"] == "rank-2"]},
    ),
    Artefact(
        name="fig-c.16",
        title="More catapults, lower test loss or error and better AGOP alignment: rank-4, USPS, Fashion-MNIST",
        source="Figure C.16 and Appendix C.6",
        claim="With every further catapult of gradient descent the test loss or error falls and the alignment rises.",
        printed="",
        scales=_schedule_scales(
            {"rank-4": RANK4, **REAL_TASKS},
            {"rank-4": {"steps": 200}, **{key: {"increases": [0, 1, 3], "steps": 100} for key in REAL_TASKS}},
            seeds=2,
        ),
        judge=_judge_schedule,
        draw=_draw_schedule,
        **_RAISED,
    ),
    Artefact(
        name="fig-c.17",
        title="No feature learning on a full-rank task",
        source="Figure C.17 and Appendix C.6",
        claim="For the target |x|/sqrt(d) catapults improve neither the test loss nor the AGOP alignment.",
        printed="",
        scales=_schedule_scales({"full-rank": FULL_RANK}, {}, seeds=3),
        judge=_judge_full_rank,
        draw=_draw_schedule,
        **_RAISED,
    ),
)
