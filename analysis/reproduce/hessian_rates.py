"""The critical rate of the Hessian and of the tangent kernel during SGD: Figure C.1."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from ..ntk import critical_rate, critical_rates, ntk
from .artefact import Artefact, Case, Data, Record, Result, Setting, Verdict, graded, mean_sd
from .problems import cases, labels, problem_of, values
from .sgd import CIFAR, CNN, FCN, SHALLOW, percent, scales
from .tracing import examples, network
from .training import batches

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ARTEFACTS"]


def _run_hessian(setting: Setting, case: Case, data: Data) -> Result:
    problem = problem_of(setting, case)
    (train,) = examples(problem, setting["n"], case["seed"], data)
    model = network(problem, train, case["seed"])
    lr = problem["multiple"] * critical_rate(ntk(model, train.inputs), len(train))
    criterion, optimizer = nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(20_000 + case["seed"])
    pairs = []
    for step, batch in enumerate(batches(len(train), setting["batch_size"], generator)):
        x, y = train.inputs[batch], train.targets[batch]
        loss = criterion(model(x), y)
        if step >= problem["steps"] or not bool(loss.isfinite()):
            break
        if step % setting["measure_every"] == 0:
            pairs.append(critical_rates(model, x, y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    hessian, kernel = np.array(pairs).T
    logs = np.log(hessian), np.log(kernel)
    return {
        "median_error": float(np.median(np.abs(kernel / hessian - 1))),
        "correlation": float(np.corrcoef(*logs)[0, 1]),
        "measurements": len(pairs),
        "curves": {"hessian": hessian.tolist(), "kernel": kernel.tolist()},
    }


def _judge_hessian(setting: Setting, records: list[Record]) -> Verdict:
    passed, failures, texts = [], [], []
    for label in labels(records):
        error, correlation = values(records, label, "median_error"), values(records, label, "correlation")
        passed += [e <= 0.1 and c >= 0.9 for e, c in zip(error, correlation, strict=True)]
        if not all(passed[-len(error) :]):
            failures.append(f"{label}: over 10 % apart in the median, or correlation of the logarithms below 0.9.")
        texts.append(
            f"{label}: {percent(error)} % apart in the median, correlation of the logarithms "
            f"{mean_sd(correlation, 3)} over {sum(values(records, label, 'measurements'))} steps"
        )
    return graded(passed, "; ".join(texts), failures)


def _draw_hessian(records: list[Record], figure: Figure) -> None:
    for ax, label in zip(figure.subplots(1, len(labels(records)), squeeze=False)[0], labels(records), strict=True):
        for curves in values(records, label, "curves"):
            ax.loglog(curves["hessian"], curves["kernel"], ".", markersize=4)
        low, high = ax.get_xlim()
        ax.plot([low, high], [low, high], "k", linewidth=0.8)
        ax.set(title=label, xlabel=r"$2/\lambda_{max}(H)$", ylabel=r"$b/\lambda_{max}(K)$")


ARTEFACTS = (
    Artefact(
        name="fig-c.1",
        title="Critical rate from the Hessian against the one from the tangent kernel, SGD",
        source="Figure C.1 and Appendix C.1",
        claim="During SGD with catapults the critical rate b/|K| of the tangent kernel is close to 2/lambda_max of the "
        "Hessian.",
        printed="",
        scales=scales([p for p in CIFAR if p["label"] in (SHALLOW[1], FCN, CNN)], measure_every=5),
        cases=cases,
        run=_run_hessian,
        judge=_judge_hessian,
        draw=_draw_hessian,
    ),
)
