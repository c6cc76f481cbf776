"""Catapults, optimizers and feature learning: Figures 4.8, 4.10, 4.11, C.13 to C.17 and C.23, Table C.1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import nn

from catapult_opt import critical_lr

from .. import tasks
from ..networks import ntk_mlp, scale_weights_
from ..tasks import RegressionTask
from .artefact import Artefact, Case, Data, Record, Result, Setting, Verdict, mean_sd
from .catapults import graded
from .real import image_network, real_task
from .tracing import episodes
from .training import TARGET_LOSS, batches, measure, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ARTEFACTS", "FIG48_TASKS", "task_and_model"]

_NEAR_ZERO = "near zero"


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


def _pick(records: Sequence[Record], task: str) -> list[Record]:
    return [record for record in records if record["case"]["task"] == task]


def _names(records: Sequence[Record], key: str = "task") -> list[Any]:
    return list(dict.fromkeys(record["case"][key] for record in records))


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
    return {**found, "catapults": len(episodes(losses, 0.2))}


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
        if t % 10 == 0 and episodes(losses[self.start :], 0.2):
            train = self.task.train
            self.limit = 0.9 * critical_lr(self.model, nn.MSELoss(), train.inputs, train.targets).eta_crit
        return self.limit


def _by(records: Sequence[Record], task: str, factor: str, key: str) -> dict[Any, list[float]]:
    """A task's results ``key``, over its seeds, for every value of a factor of the cases."""
    chosen = _pick(records, task)
    return {value: [r["result"][key] for r in chosen if r["case"][factor] == value] for value in _names(chosen, factor)}


def _judge_schedule(setting: Setting, records: list[Record]) -> Verdict:
    """By the test loss of regression and the test error of classification."""
    passed, failures, texts = [], [], []
    for task in _names(records):
        test = measure(_pick(records, task))
        label = test.replace("_", " ")
        loss, features, spikes = (_by(records, task, "increases", key) for key in (test, "alignment", "catapults"))
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
        ends_of = [r["result"]["train_loss"] for r in _pick(records, task)]
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
    for task in _names(records):
        loss, features = (_by(records, task, "increases", key) for key in ("test_loss", "alignment"))
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
    """Holds if no number of increases improves the test loss or the alignment by more than 5 % of its first value."""
    loss, features, spikes = (
        _by(records, "full-rank", "increases", key) for key in ("test_loss", "alignment", "catapults")
    )
    first, *more = loss
    better = [
        float(np.mean(loss[i])) < 0.95 * float(np.mean(loss[first]))
        or float(np.mean(features[i])) > 1.05 * float(np.mean(features[first]))
        for i in more
    ]
    happened = any(float(np.mean(spikes[i])) >= 1 for i in more)
    measured = "; ".join(
        f"{i} increases ({mean_sd(spikes[i], 1)} catapults) test loss {mean_sd(loss[i], 4)}, alignment "
        f"{mean_sd(features[i], 3)}"
        for i in loss
    )
    if not happened:
        return Verdict("fails", measured, "The increases of the rate make no catapult.")
    if not any(better):
        return Verdict("holds", measured)
    return Verdict("fails" if all(better) else "holds in part", measured, "Some catapults improve it by more than 5 %.")


def _judge_validation(setting: Setting, records: list[Record]) -> Verdict:
    """Figure C.13: the validation loss falls below what it was before, after every catapult."""
    passed, texts = [], []
    for task in _names(records):
        best = _by(records, task, "increases", "val_loss")
        steps = [i for i in best if i != _NEAR_ZERO]
        order = float(spearmanr(steps, [float(np.mean(best[i])) for i in steps]).statistic)
        passed.append(order <= -0.7)
        texts.append(f"{task}: " + ", ".join(f"{mean_sd(best[i])} at {i}" for i in steps))
    return graded(passed, "best validation loss by number of increases: " + "; ".join(texts), [])


def _draw_schedule(records: list[Record], figure: Figure) -> None:
    names = _names(records)
    figure.set_size_inches(9, 3.2 * len(names))
    for row, task in zip(figure.subplots(len(names), 3, squeeze=False), names, strict=True):
        test = measure(_pick(records, task))
        panels = {test: test.replace("_", " "), "alignment": "AGOP alignment"}
        for ax, (key, label) in zip(row, panels.items(), strict=False):
            found = _by(records, task, "increases", key)
            positions = range(len(found))
            spread = [np.std(v, ddof=1) if len(v) > 1 else 0.0 for v in found.values()]
            ax.errorbar(positions, [np.mean(v) for v in found.values()], spread, marker="o", capsize=3)
            ax.set_xticks(positions, [str(i) for i in found])
            ax.set(title=f"{task}: {label}", xlabel="increases of the rate")
        last = max((r for r in _pick(records, task) if r["case"]["increases"] != _NEAR_ZERO), key=_increases)
        row[2].semilogy(last["result"]["curves"]["loss"], linewidth=1)
        row[2].set(title="training loss, all increases", xlabel="step")


def _increases(record: Record) -> int:
    return int(record["case"]["increases"])


def _draw_agop(records: list[Record], figure: Figure) -> None:
    """Top-left blocks of the AGOP, largest entry white, and the true one."""
    chosen = [r for r in _pick(records, "rank-2") if r["case"]["seed"] == 0]
    true = np.zeros((10, 10))
    true[0, 0] = true[1, 1] = 1
    blocks = [(str(r["case"]["increases"]), np.array(r["result"]["curves"]["agop_block"])) for r in chosen]
    axes = figure.subplots(1, len(blocks) + 1)
    for ax, (name, block) in zip(axes, [*blocks, ("true", true)], strict=True):
        ax.imshow((block - block.min()) / max(np.ptp(block), 1e-12), cmap="gray")
        ax.set(title=name, xticks=[], yticks=[])


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
_REAL: dict[str, Any] = {
    "n": 1000, "n_eval": 400, "width": 256, "depth": 4, "lr": 2.0, "increases": [0, 1, 2, 3], "decay": True,
}  # fmt: skip
_REAL_TASKS: dict[str, dict[str, Any]] = {
    "usps-2": {
        **_REAL, "image_size": 16, "reference_steps": 300, "rates": [15, 30, 40], "at": [10, 30, 45], "steps": 200,
    },
    "fashion-2": {
        **_REAL, "n": 700, "image_size": 14, "reference_steps": 300, "rates": [10, 40, 55], "at": [6, 20, 30],
        "steps": 200,
    },
}  # fmt: skip
# Panels (c) and (d) of Figures 4.8 and 4.11. The first rates are those of Table C.1.
_SVHN: dict[str, Any] = {
    "n": 1000, "n_eval": 5000, "image_size": 32, "reference_steps": 3000, "network": "cnn", "width": 256, "depth": 5,
    "lr": 5.0, "rates": [30, 60, 90], "at": [10, 35, 50], "steps": 200, "increases": [0, 1, 2, 3], "decay": True,
}  # fmt: skip
_CELEBA: dict[str, Any] = {
    **_SVHN, "image_size": 96, "network": "fcn", "depth": 4, "lr": 10.0, "rates": [40, 70, 100],
}  # fmt: skip
# SVHN: what the small file of its test part has of the two classes.
_SVHN_RECORDED: dict[str, Any] = {"n": 300, "n_eval": 500, "image_size": 8, "reference_steps": 200, "width": 32}
_CELEBA_RECORDED: dict[str, Any] = {"n_eval": 2000, "image_size": 32, "reference_steps": 600}
_RANK4: dict[str, Any] = {
    "n": 1000, "width": 256, "depth": 4, "lr": 1.0, "rates": [15, 40, 60], "at": [50, 75, 110], "steps": 400,
    "increases": [0, 1, 2, 3], "decay": True,
}  # fmt: skip
# The rate is raised until step 280, long after the training loss falls below 1e-3: there is no stop at that.
_FULL_RANK: dict[str, Any] = {
    "n": 128, "width": 1024, "depth": 2, "lr": 6.0, "rates": [7, 12, 40, 80], "at": [30, 120, 180, 280], "steps": 400,
    "increases": [0, 1, 2, 3, 4], "target_loss": 0.0,
}  # fmt: skip


# Of tasks of images, at the quick scale.
_FEW_IMAGES: dict[str, Any] = {"n": 60, "n_eval": 40, "width": 16, "reference_steps": 20}


def _image_scales(name: str, full: dict[str, Any], recorded: dict[str, Any], **changes: Any) -> dict[str, Setting]:
    """Of one task of images; ``changes`` are for the recorded and the quick scale."""
    return {
        "full": {"evaluate_every": 5, "seeds": 3, "tasks": {name: full}},
        "recorded": {"evaluate_every": 5, "seeds": 2, "tasks": {name: {**full, **recorded, **changes}}},
        "quick": {
            "evaluate_every": 20,
            "seeds": 1,
            "tasks": {name: {**full, **recorded, **_FEW_IMAGES, **changes, "increases": [0, 3]}},
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


# --------------------------------------------------------------------------------------------------------- optimizers

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
    for task in _names(records):
        test = measure(_pick(records, task))
        loss, features = _by(records, task, "optimizer", test), _by(records, task, "optimizer", "alignment")
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
    for task in _names(records):
        loss = _by(records, task, "optimizer", "train_loss")
        for name, values in loss.items():
            passed.append(bool(np.isfinite(values).all()) and max(values) < 0.1)
            if not passed[-1]:
                failures.append(f"{task}, {name}: training loss {max(values):.2g} after all steps.")
        texts.append(f"{task}: " + ", ".join(f"{name} {mean_sd(values, 4)}" for name, values in loss.items()))
    return graded(passed, "training loss at the end: " + "; ".join(texts), failures)


def _draw_optimizers(records: list[Record], figure: Figure) -> None:
    names = _names(records)
    for ax, task in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        test = measure(_pick(records, task))
        loss, features = _by(records, task, "optimizer", test), _by(records, task, "optimizer", "alignment")
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
            "tasks": {name: {**spec, **recorded, **_FEW_IMAGES}},
        },
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------- small rates


def _rate_cases(setting: Setting) -> list[Case]:
    return [
        {"task": task, "below_critical": below, "batch_size": size, "seed": seed}
        for task in setting["tasks"]
        for below in setting["below_critical"]
        for seed in range(setting["seeds"])
        for size in setting["batch_sizes"]
    ]


def _run_rate(setting: Setting, case: Case, data: Data) -> Result:
    task, model = task_and_model(setting, case["task"], case["seed"], data)
    eta_crit = critical_lr(model, nn.MSELoss(), task.train.inputs, task.train.targets).eta_crit
    optimizer = torch.optim.SGD(model.parameters(), lr=eta_crit / case["below_critical"])
    source = batches(len(task.train), case["batch_size"], torch.Generator().manual_seed(20_000 + case["seed"]))
    steps = round(setting["steps"] * case["below_critical"] / min(setting["below_critical"]))
    evaluate_every = max(1, steps // setting["evaluations"])
    found = train(model, task, optimizer, source, steps=steps, evaluate_every=evaluate_every)
    return {**found, "lr": eta_crit / case["below_critical"]}


def _slow_cases(setting: Setting) -> list[Case]:
    return [
        {"task": task, "batch_size": size, "seed": seed}
        for task in setting["tasks"]
        for seed in range(setting["seeds"])
        for size in setting["batch_sizes"]
    ]


def _run_slow(setting: Setting, case: Case, data: Data) -> Result:
    task, model = task_and_model(setting, case["task"], case["seed"], data)
    optimizer = torch.optim.SGD(model.parameters(), lr=setting["lr"])
    source = batches(len(task.train), case["batch_size"], torch.Generator().manual_seed(20_000 + case["seed"]))
    evaluate_every = max(1, setting["steps"] // setting["evaluations"])
    return train(model, task, optimizer, source, steps=setting["steps"], evaluate_every=evaluate_every)


def _judge_slow(setting: Setting, records: list[Record]) -> Verdict:
    """Holds if the means over the batch sizes lie within 10 % of each other."""
    passed, texts = [], []
    for task in _names(records):
        chosen = _pick(records, task)
        found = {
            size: [r["result"]["val_loss"] for r in chosen if r["case"]["batch_size"] == size]
            for size in _names(chosen, "batch_size")
        }
        means = [float(np.mean(values)) for values in found.values()]
        passed.append(max(means) <= 1.1 * min(means))
        texts.append(f"{task}: " + ", ".join(f"{mean_sd(v)} at batch {size}" for size, v in found.items()))
    failures = [] if all(passed) else ["The best validation losses are more than 10 % apart."]
    return graded(passed, "best validation loss " + "; ".join(texts), failures)


def _draw_slow(records: list[Record], figure: Figure) -> None:
    names = _names(records)
    for ax, task in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for record in _pick(records, task):
            if record["case"]["seed"] == 0:
                curves = record["result"]["curves"]
                ax.plot(curves["val_step"], curves["val_loss"], label=f"batch {record['case']['batch_size']}")
        ax.set(title=task, xlabel="step", ylabel="validation loss", yscale="log")
        ax.legend(frameon=False)


def _spread(records: Sequence[Record], task: str, below: float, key: str) -> tuple[float, dict[int, list[float]]]:
    """Largest less smallest mean over the batch sizes, and the values."""
    chosen = [r for r in _pick(records, task) if r["case"]["below_critical"] == below]
    found = {
        size: [r["result"][key] for r in chosen if r["case"]["batch_size"] == size]
        for size in _names(chosen, "batch_size")
    }
    means = [float(np.mean(values)) for values in found.values()]
    return max(means) - min(means), found


def _judge_rate(setting: Setting, records: list[Record]) -> Verdict:
    passed, failures, texts = [], [], []
    for task in _names(records):
        spreads, better = {}, []
        for below in sorted(_names(records, "below_critical")):
            spreads[below], found = _spread(records, task, below, "test_loss")
            means = [float(np.mean(found[size])) for size in sorted(found)]
            better.append(means == sorted(means) and means[0] < means[-1])
            values = ", ".join(f"{mean_sd(v)} at batch {size}" for size, v in found.items())
            texts.append(f"{task} at critical/{below:g}: test loss {values}")
        large, *_, small = spreads.values()
        passed.append(better[0] and small <= 0.25 * large)
        if not better[0]:
            failures.append(f"{task}: at the large rate smaller batches are not better throughout.")
        if small > 0.25 * large:
            failures.append(f"{task}: the spread at the small rate is {small:.2f}, at the large one {large:.2f}.")
    return graded(passed, "; ".join(texts), failures)


def _draw_rate(records: list[Record], figure: Figure) -> None:
    names = _names(records)
    for ax, task in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for below in _names(records, "below_critical"):
            _, found = _spread(records, task, below, "test_loss")
            spread = [np.std(v, ddof=1) if len(v) > 1 else 0.0 for v in found.values()]
            means = [np.mean(v) for v in found.values()]
            ax.errorbar(range(len(found)), means, spread, marker="o", capsize=3, label=rf"$\eta_{{crit}}/{below:g}$")
            ax.set_xticks(range(len(found)), [str(size) for size in found])
        ax.set(title=task, xlabel="batch size", ylabel="test loss")
        ax.legend(frameon=False)


_RATE_FULL: Setting = {
    "d": 100, "n_eval": 5000, "batch_sizes": [5, 10, 50, 100, 2000], "below_critical": [2, 40], "steps": 10_000,
    "evaluations": 100, "seeds": 3,
    "tasks": {
        "rank-2": {"n": 2000, "width": 1024, "depth": 2},
        "rank-3": {"n": 2000, "width": 256, "depth": 4},
    },
}  # fmt: skip
_RATE_SCALES: dict[str, Setting] = {
    "full": _RATE_FULL,
    "recorded": {
        **_RATE_FULL, "d": 40, "n_eval": 1000, "batch_sizes": [5, 50, 500], "steps": 400, "evaluations": 40, "seeds": 2,
        "tasks": {"rank-2": {"n": 500, "width": 256, "depth": 2}},
    },
    "quick": {
        **_RATE_FULL, "d": 20, "n_eval": 500, "batch_sizes": [5, 200], "steps": 50, "evaluations": 20, "seeds": 1,
        "tasks": {"rank-2": {"n": 200, "width": 64, "depth": 2}},
    },
}  # fmt: skip

# Figure C.23: the rate 0.1 itself.
_SLOW_FULL: Setting = {**{key: v for key, v in _RATE_FULL.items() if key != "below_critical"}, "lr": 0.1}
_SLOW_SCALES: dict[str, Setting] = {
    "full": {**_SLOW_FULL, "steps": 200_000},
    **{
        scale: {**{key: v for key, v in _RATE_SCALES[scale].items() if key != "below_critical"}, "lr": 0.1, "steps": n}
        for scale, n in (("recorded", 10_000), ("quick", 1000))
    },
}

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
_OPTIMIZERS_CLAIM = "Over optimizers, a better AGOP alignment goes with a lower test {}."
_IMAGE_OPTIMIZERS: dict[str, Any] = {
    "claim": _OPTIMIZERS_CLAIM.format("error"), "cases": _optimizer_cases, "run": _run_optimizer,
    "judge": _judge_correlation, "draw": _draw_optimizers,
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
        scales=_image_scales("svhn-2", _SVHN, _SVHN_RECORDED, steps=100, increases=[0, 1, 3]),
        **_IMAGE_SCHEDULE,
    ),
    Artefact(
        name="fig-4.8d",
        title="More catapults of gradient descent, lower test error and better AGOP alignment, CelebA",
        source="Figure 4.8 (d) and Appendix C.6",
        printed="rates 40, 70, 100 from steps 10, 35, 50",
        scales=_image_scales("celeba", _CELEBA, _CELEBA_RECORDED),
        **_IMAGE_SCHEDULE,
    ),
    Artefact(
        name="fig-4.10",
        title="Batch size matters at a large rate, not at a small one",
        source="Figure 4.10",
        claim="At half the critical rate smaller batches have a lower test loss; at a fortieth of it the batch size "
        "has little effect.",
        printed="rates critical/2 and critical/40",
        scales=_RATE_SCALES,
        cases=_rate_cases,
        run=_run_rate,
        judge=_judge_rate,
        draw=_draw_rate,
    ),
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
        scales=_image_optimizer_scales("svhn-2", _SVHN, _SVHN_RECORDED),
        **_IMAGE_OPTIMIZERS,
    ),
    Artefact(
        name="fig-4.11d",
        title="Test error against AGOP alignment over seven optimizers, CelebA",
        source="Figure 4.11 (d), Table C.1 and Appendix C.6",
        printed="the rates of Table C.1",
        scales=_image_optimizer_scales("celeba", _CELEBA, _CELEBA_RECORDED),
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
            {"rank-4": _RANK4, **_REAL_TASKS},
            {"rank-4": {"steps": 200}, **{key: {"increases": [0, 1, 3], "steps": 100} for key in _REAL_TASKS}},
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
        scales=_schedule_scales({"full-rank": _FULL_RANK}, {}, seeds=3),
        judge=_judge_full_rank,
        draw=_draw_schedule,
        **_RAISED,
    ),
    Artefact(
        name="fig-c.23",
        title="At the rate 0.1 the batch size does not matter",
        source="Figure C.23",
        claim="With the small rate 0.1 all batch sizes reach about the same validation loss.",
        printed="rate 0.1",
        scales=_SLOW_SCALES,
        cases=_slow_cases,
        run=_run_slow,
        judge=_judge_slow,
        draw=_draw_slow,
    ),
)
