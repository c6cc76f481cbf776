"""SGD at batch size 1: Figure 4.5."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from ..networks import mlp
from ..ntk import ntk
from ..tasks import Split
from .artefact import Artefact, Case, Data, Record, Result, Setting, Verdict, mean_sd
from .tracing import WIGGLE, share
from .training import batches, mse

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ARTEFACTS"]


def _run_one(setting: Setting, case: Case, data: Data) -> Result:
    """Batch size 1 on the unit sphere, first layer trained, one example doubled; the rate is above critical for it."""
    n, d = setting["n"], setting["d"]
    generator = torch.Generator().manual_seed(case["seed"])
    x = torch.randn(n, d, generator=generator)
    x /= x.norm(dim=1, keepdim=True)
    y = torch.ones(n, 1)
    x[0] *= 2
    y[0] *= 2
    model = mlp(d, setting["width"], 2, generator=generator)
    first, last = model.parameters()
    last.requires_grad_(False)
    each = ntk(model, x).diag()
    special, others = float(1 / each[0]), float(1 / each[1:].max())
    lr = special * (others / special) ** setting["between"]
    curves: dict[str, list[float]] = {"loss": [mse(model, Split(x, y))], "rate": [], "growth": []}
    for batch, _ in zip(batches(n, 1, generator), range(setting["steps"]), strict=False):
        output = model(x[batch])
        (gradient,) = torch.autograd.grad(output, first)
        residual = output.detach() - y[batch]
        with torch.no_grad():
            first.sub_(2 * lr * residual * gradient)
            after = model(x[batch]) - y[batch]
        curves["rate"].append(float(1 / gradient.square().sum()))
        curves["growth"].append(float((after / residual).square()))
        curves["loss"].append(mse(model, Split(x, y)))
    above = [lr > rate for rate in curves["rate"]]
    batch_rises = [growth > 1 for growth in curves["growth"]]
    spikes = [b > WIGGLE * a for a, b in pairwise(curves["loss"])]
    return {
        "special": special,
        "others": others,
        "lr": lr,
        "above": sum(above),
        "batch_rises": sum(batch_rises),
        "agree": share([a == b for a, b in zip(above, batch_rises, strict=True)]),
        "spikes": sum(spikes),
        "spikes_above": sum(a and s for a, s in zip(above, spikes, strict=True)),
        "curves": {**curves, "above": [float(a) for a in above]},
    }


def _judge_one(setting: Setting, records: list[Record]) -> Verdict:
    """Exact if the batch's loss rises exactly at steps above its critical rate, and the whole loss jumps only there.

    The whole training loss is bound to rise a little at other steps too, where one example's step moves the others.
    """
    results = [record["result"] for record in records]
    exact = [r["agree"] == 1 and r["above"] > 0 and r["spikes_above"] == r["spikes"] for r in results]
    measured = (
        f"the batch's loss rises at {sum(r['batch_rises'] for r in results)} steps, {sum(r['above'] for r in results)} "
        f"are above critical, the two agree at {mean_sd([100 * r['agree'] for r in results], 2)} % of all steps; of "
        f"{sum(r['spikes'] for r in results)} rises of the whole loss by 10 % "
        f"{sum(r['spikes_above'] for r in results)} are above critical"
    )
    if all(exact):
        return Verdict("holds", measured)
    near = all(r["agree"] >= 0.99 and r["above"] > 0 for r in results)
    return Verdict("holds in part" if near else "fails", measured, "The match is not exact on every seed.")


def _draw_one(records: list[Record], figure: Figure) -> None:
    curves, lr = records[0]["result"]["curves"], records[0]["result"]["lr"]
    loss, rates = figure.subplots(2, 1, sharex=True)
    loss.semilogy(curves["loss"], linewidth=1)
    for t, above in enumerate(curves["above"]):
        if above:
            loss.axvline(t, color="tab:orange", alpha=0.5, linewidth=1)
    loss.set_ylabel("training loss")
    rates.semilogy(curves["rate"], ".", markersize=3, label=r"$\eta_{crit}$ of the batch")
    rates.axhline(lr, color="black", linewidth=1, label=r"$\eta$")
    rates.set_xlabel("step")
    rates.legend(frameon=False)


ARTEFACTS = (
    Artefact(
        name="fig-4.5",
        title="Batch size 1: the loss rises exactly when the example's critical rate is below the rate",
        source="Figure 4.5 and Appendix C.6",
        claim="With one example whose critical rate is below the rate, the loss of SGD at batch size 1 has spikes "
        "exactly at the steps that take this example.",
        printed="",
        scales={
            "full": {"n": 100, "d": 100, "width": 4096, "steps": 600, "between": 0.5, "seeds": 3},
            "recorded": {"n": 100, "d": 100, "width": 4096, "steps": 600, "between": 0.5, "seeds": 3},
            "quick": {"n": 100, "d": 100, "width": 512, "steps": 60, "between": 0.5, "seeds": 1},
        },
        cases=lambda setting: [{"seed": seed} for seed in range(setting["seeds"])],
        run=_run_one,
        judge=_judge_one,
        draw=_draw_one,
    ),
)
