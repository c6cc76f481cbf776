"""Do quadratic models learn features when they catapult? The question that Section 3.5 leaves open, taken one step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from catapult_opt import CatapultSGD, critical_lr

from .. import tasks
from ..agop import agop, alignment
from ..networks import ntk_mlp
from ..nqm import LinearModel, QuadraticModel
from .artefact import Artefact, Case, Data, Record, Result, Setting, Verdict, mean_sd
from .training import mse

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ARTEFACTS"]

_MODELS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "f": copy.deepcopy, "f_lin": LinearModel, "f_quad": QuadraticModel,
}  # fmt: skip
# How each is trained: a constant rate over the critical one, or CatapultSGD, which catapults again and again.
_WAYS = ("below", "above", "catapults")


def _cases(setting: Setting) -> list[Case]:
    return [
        {"task": task, "model": model, "way": way, "seed": seed}
        for task in setting["tasks"]
        for model in _MODELS
        for way in _WAYS
        if not (model == "f_lin" and way != "below")  # it diverges above
        for seed in range(setting["seeds"])
    ]


def _run(setting: Setting, case: Case, data: Data) -> Result:
    n, d, seed = setting["n_train"], setting["d"], case["seed"]
    task = tasks.rank(int(case["task"].removeprefix("rank-")), n, setting["n_eval"], setting["n_eval"], d=d, seed=seed)
    net = ntk_mlp(d, setting["width"], depth=2, generator=torch.Generator().manual_seed(10_000 + seed))
    model, criterion = _MODELS[case["model"]](net), nn.MSELoss()
    eta_crit = critical_lr(net, criterion, task.train.inputs, task.train.targets).eta_crit
    optimizer: torch.optim.Optimizer
    if case["way"] == "catapults":
        optimizer = CatapultSGD(model.parameters(), model=model, criterion=criterion)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=setting[case["way"]] * eta_crit)
    result: Result = {
        "before": alignment(agop(model, task.train.inputs), task.egop),
        "test_before": mse(model, task.test),
    }
    best: Result = {"val": math.inf, "after": math.nan, "test": math.nan, "step": -1}
    losses: list[float] = []
    for step in range(1, setting["steps"] + 1):
        optimizer.zero_grad()
        loss = criterion(model(task.train.inputs), task.train.targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if not losses[-1] < 1e8 * losses[0]:
            break
        if step % setting["evaluate_every"] == 0 and (val := mse(model, task.val)) < best["val"]:
            best = {
                "val": val, "test": mse(model, task.test), "step": step,
                "after": alignment(agop(model, task.train.inputs), task.egop),
            }  # fmt: skip
    end = (
        critical_lr(model, criterion, task.train.inputs, task.train.targets).eta_crit if losses[-1] < 1e3 else math.nan
    )
    return {
        **result, **best, "train_loss": losses[-1], "peak": max(losses) / losses[0], "kernel": eta_crit / end,
        "curves": {"loss": losses},
    }  # fmt: skip


def _values(records: list[Record], task: str, model: str, way: str, key: str) -> list[float]:
    """Over the seeds."""
    wanted = (task, model, way)
    return [r["result"][key] for r in records if (r["case"]["task"], r["case"]["model"], r["case"]["way"]) == wanted]


def _judge(setting: Setting, records: list[Record]) -> Verdict:
    """Holds where a catapulted f_quad is better aligned, on every seed, than at the start, below the edge and f_lin."""
    shown: dict[str, bool] = {}
    text = []
    for task in setting["tasks"]:
        before = _values(records, task, "f_quad", "above", "before")
        lazy = _values(records, task, "f_lin", "below", "after")
        below = _values(records, task, "f_quad", "below", "after")
        for way in ("above", "catapults"):
            after = _values(records, task, "f_quad", way, "after")
            pairs = zip(after, before, lazy, below, strict=True)
            name = "one catapult" if way == "above" else "CatapultSGD"
            shown[f"{task}, {name}"] = all(a > max(others) for a, *others in pairs)
        cells = []
        for model, way in dict.fromkeys((r["case"]["model"], r["case"]["way"]) for r in records):
            a, test, kernel = (_values(records, task, model, way, key) for key in ("after", "test", "kernel"))
            cells.append(f"{model} {way} {mean_sd(a)} (test loss {mean_sd(test)}, lambda x {mean_sd(kernel)})")
        text.append(f"{task}: alignment before {mean_sd(before)}; after: " + ", ".join(cells))
    missing = [f"not: {what}" for what, yes in shown.items() if not yes]
    outcome = "holds" if not missing else "fails" if len(missing) == len(shown) else "holds in part"
    return Verdict(outcome, ". ".join(text), "; ".join(missing))  # type: ignore[arg-type]


def _draw(records: list[Record], figure: Figure) -> None:
    names = list(dict.fromkeys(r["case"]["task"] for r in records))
    ways = list(dict.fromkeys((r["case"]["model"], r["case"]["way"]) for r in records))
    figure.set_size_inches(5 * len(names), 7)
    for column, task in zip(figure.subplots(2, len(names), squeeze=False).T, names, strict=True):
        for ax, key, label in ((column[0], "after", "AGOP alignment"), (column[1], "test", "test loss")):
            values: list[Any] = [_values(records, task, *way, key) for way in ways]
            spread = [np.std(v, ddof=1) if len(v) > 1 else 0.0 for v in values]
            colors = [{"f": "#30638e", "f_lin": "#888888", "f_quad": "#d1495b"}[model] for model, _ in ways]
            ax.bar(range(len(ways)), [np.mean(v) for v in values], yerr=spread, color=colors, capsize=3)
            start = "before" if key == "after" else "test_before"
            ax.axhline(np.mean(_values(records, task, *ways[0], start)), color="black", linestyle=":")
            ax.set_xticks(range(len(ways)), [f"{model}\n{way}" for model, way in ways], fontsize=7)
            ax.set(title=task, ylabel=label)


_FULL: dict[str, Any] = {
    "tasks": ["rank-2", "rank-3", "rank-4"], "d": 100, "width": 1024, "n_train": 2000, "n_eval": 5000, "below": 0.8,
    "above": 1.6, "steps": 500, "evaluate_every": 10, "seeds": 3,
}  # fmt: skip
_RECORDED = {
    **_FULL,
    "tasks": ["rank-2", "rank-4"],
    "d": 30,
    "width": 512,
    "n_train": 400,
    "n_eval": 1000,
    "steps": 200,
}

ARTEFACTS = (
    Artefact(
        name="question-3.5",
        title="Do catapulted quadratic models learn features?",
        source="Section 3.5, last paragraph (an open question; the answer is ours)",
        claim="Open in the thesis: whether quadratic models can learn representations. Tested here: catapults leave "
        "f_quad with an AGOP better aligned with the true one than at the start, than below the critical rate, and "
        "than f_lin's.",
        printed="",
        scales={
            "full": _FULL,
            "recorded": _RECORDED,
            "quick": {
                **_RECORDED,
                "tasks": ["rank-2"],
                "d": 15,
                "width": 128,
                "n_train": 150,
                "steps": 100,
                "seeds": 1,
            },
        },
        cases=_cases,
        run=_run,
        judge=_judge,
        draw=_draw,
    ),
)
