"""The batch size at large and small rates: Figures 4.10 and C.23."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from catapult_opt import critical_lr

from .artefact import Artefact, Case, Data, Record, Result, Setting, Verdict, graded, mean_sd
from .feature_tasks import distinct, of_task, task_and_model
from .training import batches, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ARTEFACTS"]


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
    for task in distinct(records):
        chosen = of_task(records, task)
        found = {
            size: [r["result"]["val_loss"] for r in chosen if r["case"]["batch_size"] == size]
            for size in distinct(chosen, "batch_size")
        }
        means = [float(np.mean(values)) for values in found.values()]
        passed.append(max(means) <= 1.1 * min(means))
        texts.append(f"{task}: " + ", ".join(f"{mean_sd(v)} at batch {size}" for size, v in found.items()))
    failures = [] if all(passed) else ["The best validation losses are more than 10 % apart."]
    return graded(passed, "best validation loss " + "; ".join(texts), failures)


def _draw_slow(records: list[Record], figure: Figure) -> None:
    names = distinct(records)
    for ax, task in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for record in of_task(records, task):
            if record["case"]["seed"] == 0:
                curves = record["result"]["curves"]
                ax.plot(curves["val_step"], curves["val_loss"], label=f"batch {record['case']['batch_size']}")
        ax.set(title=task, xlabel="step", ylabel="validation loss", yscale="log")
        ax.legend(frameon=False)


def _spread(records: Sequence[Record], task: str, below: float, key: str) -> tuple[float, dict[int, list[float]]]:
    """Largest less smallest mean over the batch sizes, and the values."""
    chosen = [r for r in of_task(records, task) if r["case"]["below_critical"] == below]
    found = {
        size: [r["result"][key] for r in chosen if r["case"]["batch_size"] == size]
        for size in distinct(chosen, "batch_size")
    }
    means = [float(np.mean(values)) for values in found.values()]
    return max(means) - min(means), found


def _judge_rate(setting: Setting, records: list[Record]) -> Verdict:
    passed, failures, texts = [], [], []
    for task in distinct(records):
        spreads, better = {}, []
        for below in sorted(distinct(records, "below_critical")):
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
    names = distinct(records)
    for ax, task in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for below in distinct(records, "below_critical"):
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

ARTEFACTS = (
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
