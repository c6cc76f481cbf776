"""Best test loss and accuracy against the learning rate, of f, f_lin and f_quad: Figures 3.2, 3.4 and B.5 to B.13."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, repeat
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from catapult_opt import critical_lr

from ..networks import ntk_mlp
from ..nqm import LinearModel, QuadraticModel
from ..tasks import Split
from .artefact import Artefact, Case, Data, Record, Result, Setting, Verdict, mean_sd
from .quadratic_networks import in_span, two_layer_cnn
from .training import batches

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ARTEFACTS"]

# A panel: data set, network, activation, "gd" or "sgd".
Panel = tuple[str, str, str, str]

_FIG_3_2: tuple[Panel, ...] = (("cifar-2", "fc2", "relu", "gd"),)
_FIG_3_4: tuple[Panel, ...] = (
    ("mnist", "fc2", "relu", "gd"), ("ag_news", "fc2", "relu", "gd"), ("cifar-2", "fc2", "relu", "sgd"),
    ("svhn-2", "cnn", "relu", "gd"), ("fsdd", "fc2", "relu", "gd"), ("cifar-2", "cnn", "relu", "gd"),
)  # fmt: skip
_DATA: dict[str, tuple[str, tuple[int, ...] | None]] = {  # the name that `Data` knows, classes
    "cifar-2": ("cifar10", (0, 2)), "svhn-2": ("svhn", (0, 2)), "mnist": ("mnist", None), "fsdd": ("fsdd", None),
    "fsdd-2": ("fsdd", (1, 3)), "ag_news": ("ag_news", None),
}  # fmt: skip
_N_TRAIN = {"cifar-2": 256, "svhn-2": 256, "mnist": 128, "fsdd": 256, "fsdd-2": 256, "ag_news": 128}  # Appendix B.14
_N_TRAIN_DEEP = 100
_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "swish": nn.SiLU}
_MODELS: dict[str, Callable[[nn.Module], nn.Module]] = {  # from f at w0
    "f": copy.deepcopy, "f_lin": LinearModel, "f_quad": QuadraticModel,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------- networks and data


def _splits(setting: Setting, panel: Sequence[str], seed: int, data: Data) -> list[Split]:
    name, net, *_ = panel
    source, classes = _DATA[name]
    n = min(_N_TRAIN_DEEP if net == "fc3" else _N_TRAIN[name], setting["n_train_cnn" if net == "cnn" else "n_train"])
    found = data.load(source, classes=classes)  # may have fewer than are wanted for testing: all that are left then
    train, test = found.draw(n, min(setting["n_test"], len(found) - n), seed=seed)
    mean = 0.0 if train.inputs.ndim == 2 else float(train.inputs.mean())  # texts are sparse: their zeros stay zeros
    scale = float((train.inputs - mean).square().mean().sqrt())
    parts = [Split((part.inputs - mean) / scale, part.targets) for part in (train, test)]
    if net != "cnn":
        return in_span(*parts)
    return [Split(F.adaptive_avg_pool2d(part.inputs, setting["side"]), part.targets) for part in parts]


def _network(setting: Setting, panel: Sequence[str], train: Split, seed: int) -> nn.Module:
    _, net, activation, _ = panel
    generator = torch.Generator().manual_seed(10_000 + seed)
    act, d_out = _ACTIVATIONS[activation], train.targets.shape[1]
    if net == "cnn":
        return two_layer_cnn(train.inputs.shape[1], setting["side"], setting["channels"], d_out, act, generator)
    depth = 3 if net == "fc3" else 2
    return ntk_mlp(train.inputs.shape[1], setting["width"], depth, d_out, activation=act, generator=generator)


# ----------------------------------------------------------------------------------------------------------- training


def _cases(panels: Sequence[Panel]) -> Callable[[Setting], list[Case]]:
    return lambda setting: [
        {"panel": list(panel), "seed": seed} for panel in panels for seed in range(setting["seeds"])
    ]


def _run(setting: Setting, case: Case, data: Data) -> Result:
    panel, seed = case["panel"], case["seed"]
    train, test = _splits(setting, panel, seed, data)
    net = _network(setting, panel, train, seed)
    eta_crit = critical_lr(net, nn.MSELoss(), train.inputs, train.targets).eta_crit
    result: Result = {"eta_crit": eta_crit, "ratios": setting["ratios"]}
    for name, make in _MODELS.items():
        runs = []
        for ratio in setting["ratios"]:
            order = torch.Generator().manual_seed(20_000 + seed)
            model = make(net)
            runs.append(_train(model, train, test, setting, ratio, eta_crit, panel[3] == "sgd", order))
            runs[-1].update(_movement(model, net, train, eta_crit, runs[-1]["diverged"]))
        result[name] = {key: [run[key] for run in runs] for key in runs[0]}
    return result


def _train(
    model: nn.Module, train: Split, test: Split, setting: Setting, ratio: float, eta_crit: float, sgd: bool,
    order: torch.Generator,
) -> Result:  # fmt: skip
    """(S)GD at a constant rate, for the same time rate x steps at each; accuracy is taken at the best test loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=ratio * eta_crit)
    criterion, steps = nn.MSELoss(), math.ceil(setting["time"] / ratio)
    everything: Iterator[slice | Tensor] = repeat(slice(None))
    chosen = batches(len(train), min(setting["batch_size"], len(train)), order) if sgd else everything
    best_loss, accuracy, peak, diverged, first = math.inf, math.nan, 0.0, False, math.nan
    for step, batch in enumerate(islice(chosen, steps)):
        optimizer.zero_grad()
        loss = criterion(model(train.inputs[batch]), train.targets[batch])
        loss.backward()
        optimizer.step()
        value = loss.item()
        first = value if step == 0 else first
        peak = max(peak, value)
        if not value <= setting["fatal"] * first:
            diverged = True
            break
        if (step + 1) % setting["evaluate_every"] == 0 or step == steps - 1:
            found, right = _evaluate(model, test)
            if found < best_loss:
                best_loss, accuracy = found, right
            if value < setting["fitted"]:
                break
    return {
        "best_loss": best_loss, "accuracy": accuracy, "peak": peak / first, "train_loss": value, "steps": step + 1,
        "diverged": diverged,
    }  # fmt: skip


@torch.no_grad()
def _evaluate(model: nn.Module, test: Split) -> tuple[float, float]:
    outputs = model(test.inputs)
    if outputs.shape[1] == 1:
        right = (outputs > 0) == (test.targets > 0)
    else:
        right = outputs.argmax(1) == test.targets.argmax(1)
    return float(F.mse_loss(outputs, test.targets)), float(right.float().mean())


def _movement(model: nn.Module, net: nn.Module, train: Split, eta_crit: float, diverged: bool) -> Result:
    """lambda_max at the end over that at the start, and |w - w0|."""
    if diverged:
        return {"lambda_ratio": math.nan, "distance": math.nan}
    at = critical_lr(model, nn.MSELoss(), train.inputs, train.targets).eta_crit
    moved = [(p - q).detach().norm() for p, q in zip(model.parameters(), net.parameters(), strict=True)]
    return {"lambda_ratio": eta_crit / at, "distance": float(torch.stack(moved).norm())}


# ------------------------------------------------------------------------------------------------------------ verdicts

# "Nearly identical", of means over the runs: best test losses within 5 %, accuracies within 2 points.
_AGREE = {False: 0.05, True: 0.02}


def _panel_name(panel: Sequence[str]) -> str:
    name, net, activation, method = panel
    layers = {"fc2": "2-layer FC", "fc3": "3-layer FC", "cnn": "2-layer CNN"}[net]
    return f"{name}, {layers}, {activation}, {method.upper()}"


def _by_panel(records: list[Record]) -> dict[tuple[str, ...], list[Record]]:
    found: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        found.setdefault(tuple(record["case"]["panel"]), []).append(record)
    return found


def table(records: list[Record], model: str, key: str) -> Any:
    """Values (seeds, rates) of one panel."""
    return np.array([record["result"][model][key] for record in records], float)


def _accuracy(records: list[Record], model: str) -> Any:
    """Accuracy, and 0 where a run diverged before it was tested."""
    return np.nan_to_num(table(records, model, "accuracy"), nan=0.0)


def _findings(setting: Setting, records: list[Record], use_accuracy: bool) -> tuple[dict[str, bool], str]:
    """What of the claim one panel shows, and its numbers."""
    ratios = np.asarray(setting["ratios"])
    below, above = ratios < 1, ratios > 1
    loss = {model: table(records, model, "best_loss") for model in _MODELS}
    mean = {model: (_accuracy(records, model) if use_accuracy else loss[model]).mean(0)[below] for model in _MODELS}
    scale = 1.0 if use_accuracy else mean["f"]
    apart = max(float((np.abs(mean[model] - mean["f"]) / scale).max()) for model in ("f_lin", "f_quad"))
    shows = {"agree below": apart <= _AGREE[use_accuracy]}
    gains = []
    for model in ("f", "f_quad", "f_lin"):
        # smaller is better, for both
        score = 1 - _accuracy(records, model) if use_accuracy else loss[model]
        low, high = score[:, below].min(1), score[:, above].min(1)
        better = bool(high.mean() < low.mean())
        if not use_accuracy:  # "consistently smaller", says the thesis: in every run
            better &= bool((high < low).all())
        if model == "f_lin":
            # What has grown so far in a linear model does not come back, whether or not the run had time for more.
            shows["f_lin diverges above"] = bool((table(records, model, "peak")[:, above] > 100).all()) and not better
        else:
            shows[f"{model} better above"] = better
        gains.append(f"{model} {mean_sd(low, 3)} -> {mean_sd(high, 3)}")
    kind, unit = ("best test error", "points") if use_accuracy else ("best test loss", "%")
    return shows, f"{kind} below -> above eta_crit: {', '.join(gains)}; apart below {100 * apart:.1f} {unit}"


def _judge(use_accuracy: bool) -> Callable[[Setting, list[Record]], Verdict]:
    def judge(setting: Setting, records: list[Record]) -> Verdict:
        found = {panel: _findings(setting, rows, use_accuracy) for panel, rows in _by_panel(records).items()}
        measured = ". ".join(f"{_panel_name(panel)}: {text}" for panel, (_, text) in found.items())
        missing = [
            f"{_panel_name(panel)}: not '{what}'"
            for panel, (shows, _) in found.items()
            for what, shown in shows.items()
            if not shown
        ]
        gains = [shows["f better above"] and shows["f_quad better above"] for shows, _ in found.values()]
        outcome = "holds" if not missing else "holds in part" if any(gains) else "fails"
        return Verdict(outcome, measured, "; ".join(missing))  # type: ignore[arg-type]

    return judge


def _judge_3_2(setting: Setting, records: list[Record]) -> Verdict:
    """(b) as the other figures; (a) the kernel and the path of f."""
    b = _judge(False)(setting, records)
    ratios = np.asarray(setting["ratios"])
    kernel, distance, peak = (table(records, "f", key) for key in ("lambda_ratio", "distance", "peak"))
    below, above = ratios < 1, (ratios > 1) & np.isfinite(kernel).all(0)
    shown = {
        "kernel nearly constant below (within 10 %)": bool((np.abs(kernel[:, below] - 1) < 0.1).all()),
        "loss never above its start below": bool((peak[:, below] <= 1.001).all()),
        "loss rises, kernel falls above": bool(
            above.any() and (peak[:, above] > 1.5).all() and (kernel[:, above] < 0.95).all()
        ),
        "longer way above": bool(above.any() and distance[:, above].mean(0).min() > distance[:, below].mean(0).max()),
    }
    text = "; ".join(
        f"{r:g}: lambda x {mean_sd(kernel[:, i])}, loss x {mean_sd(peak[:, i], 1)}, |w-w0| {mean_sd(distance[:, i], 1)}"
        if np.isfinite(kernel[:, i]).all()
        else f"{r:g}: diverges in {np.isnan(kernel[:, i]).sum()} of {len(kernel)}"
        for i, r in enumerate(ratios)
    )
    missing = [f"(a) not '{what}'" for what, yes in shown.items() if not yes]
    why = "; ".join(filter(None, ["; ".join(missing), b.why]))
    outcome = b.outcome if not missing else "fails" if len(missing) == len(shown) else "holds in part"
    if b.outcome == "fails" and not missing:
        outcome = "holds in part"
    return Verdict(outcome, f"(a) f at rate / eta_crit of {text}. (b) {b.measured}", why)


def _limits(found: list[Record], key: str) -> tuple[float, float]:
    """Of the vertical axis: all that is below the critical rate, and what converges above it. f_lin leaves it."""
    below = np.asarray(found[0]["result"]["ratios"]) < 1
    usual = np.concatenate([table(found, model, key)[:, below].ravel() for model in _MODELS])
    every = np.concatenate([usual, *(table(found, model, key).ravel() for model in ("f", "f_quad"))])
    every = every[np.isfinite(every) & (every < 1.5 * usual.max())]
    margin = 0.1 * (every.max() - every.min()) + 1e-6
    return float(every.min() - margin), float(every.max() + margin)


def _draw(key: str) -> Callable[[list[Record], Figure], None]:
    label = {"best_loss": "best test loss", "accuracy": "best test accuracy"}[key]

    def draw(records: list[Record], figure: Figure) -> None:
        panels = _by_panel(records)
        columns = min(3, len(panels))
        rows = -(-len(panels) // columns)
        figure.set_size_inches(4.5 * columns, 3.6 * rows)
        axes = figure.subplots(rows, columns, squeeze=False)
        for ax, (panel, found) in zip(axes.flat, panels.items(), strict=False):
            ratios = found[0]["result"]["ratios"]
            for model, marker in zip(_MODELS, "os^", strict=True):
                values = table(found, model, key)
                values[~np.isfinite(values)] = np.nan
                shown = np.isfinite(values).all(0)
                spread = values.std(0, ddof=1) if len(values) > 1 else np.zeros(len(ratios))
                spread[~(values.mean(0) < _limits(found, key)[1])] = 0
                x = np.asarray(ratios)[shown]
                ax.errorbar(x, values.mean(0)[shown], spread[shown], marker=marker, capsize=3, label=model)
            ax.axvline(1, color="black", linewidth=1, linestyle=":")
            ax.set(title=_panel_name(panel), xlabel="learning rate / critical rate", ylabel=label)
            ax.title.set_fontsize(9)
            ax.set_ylim(*_limits(found, key))
        axes[0, 0].legend(frameon=False)

    return draw


# ----------------------------------------------------------------------------------------------------------- artefacts

_FULL: dict[str, Any] = {
    "ratios": [0.25, 0.5, 0.75, 0.9, 1.1, 1.25, 1.5, 1.75, 1.9, 2.5, 4.0], "width": 5000, "channels": 1000, "side": 32,
    "n_train": 256, "n_train_cnn": 256, "n_test": 2000, "time": 1000, "batch_size": 32, "evaluate_every": 10,
    "fatal": 1e8, "fitted": 1e-5, "seeds": 5,
}  # fmt: skip
_SMALL = {
    "ratios": [0.6, 0.9, 1.2, 1.5, 1.8, 2.5], "width": 256, "channels": 16, "side": 8, "n_train": 128,
    "n_train_cnn": 64, "n_test": 500, "time": 60,
}  # fmt: skip
_SCALES = {
    "full": _FULL,
    "recorded": {**_FULL, **_SMALL},
    "quick": {
        **_FULL, **_SMALL, "ratios": [0.8, 1.5, 2.5], "width": 64, "channels": 4, "side": 8, "n_train": 40,
        "n_train_cnn": 40, "n_test": 100, "time": 40, "seeds": 1,
    },
}  # fmt: skip
_CLAIM = (
    "Below the critical rate f, f_lin and f_quad have nearly identical best test {what}; above it f_lin diverges, and "
    "f and f_quad reach a better one than at any rate below."
)


def _artefact(
    name: str, title: str, source: str, panels: Sequence[Panel], *, accuracy: bool = False, shares: str = ""
) -> Artefact:
    return Artefact(
        name=name,
        title=title,
        source=f"{source}, Section 3.4 and Appendix B.14",
        claim=_CLAIM.format(what="accuracy" if accuracy else "loss"),
        printed="",
        scales=_SCALES,
        cases=_cases(panels),
        run=_run,
        judge=_judge(accuracy),
        draw=_draw("accuracy" if accuracy else "best_loss"),
        shares=shares,
    )


def _of_fig_3_4(name: str, title: str, source: str, panels: Sequence[Panel]) -> Artefact:
    return _artefact(name, title, source, panels, accuracy=True, shares="fig-3.4")


def _deep(name: str, title: str, source: str, *data: str) -> Artefact:
    return _artefact(name, title, source, [(d, "fc3", "relu", "gd") for d in data], accuracy=True)


def _smooth(name: str, title: str, source: str, data: str, net: str) -> Artefact:
    return _artefact(name, title, source, [(data, net, activation, "gd") for activation in ("swish", "tanh")])


ARTEFACTS = (
    Artefact(
        name="fig-3.2",
        title="Kernel, path and test loss below and above the critical rate",
        source="Figure 3.2 (a, b) and Appendix B.14",
        claim="Below the critical rate the kernel of a wide network stays nearly constant and the loss falls "
        "monotonically; above it the loss rises first, the kernel's norm falls and the path is longer. "
        + _CLAIM.format(what="loss"),
        printed="",
        scales={**_SCALES, "recorded": {**_SCALES["recorded"], "width": 1024}},  # the kernel's constancy needs width
        cases=_cases(_FIG_3_2),
        run=_run,
        judge=_judge_3_2,
        draw=_draw("best_loss"),
    ),
    _artefact("fig-3.4", "Best test loss against the rate, six settings", "Figure 3.4", _FIG_3_4),
    _of_fig_3_4("fig-b.5", "Best test accuracy: MNIST, AG News", "Figure B.5", _FIG_3_4[:2]),
    _of_fig_3_4("fig-b.6", "Best test accuracy: CIFAR-2 by SGD, SVHN-2 CNN", "Figure B.6", _FIG_3_4[2:4]),
    _of_fig_3_4("fig-b.7", "Best test accuracy: FSDD, CIFAR-2 CNN", "Figure B.7", _FIG_3_4[4:]),
    _deep("fig-b.8", "Best test accuracy, 3 layers: CIFAR-2, SVHN-2", "Figure B.8", "cifar-2", "svhn-2"),
    _deep("fig-b.9", "Best test accuracy, 3 layers: FSDD-2, AG News", "Figure B.9", "fsdd-2", "ag_news"),
    _smooth("fig-b.10", "Swish and Tanh: AG News, 2-layer FC", "Figure B.10", "ag_news", "fc2"),
    _smooth("fig-b.11", "Swish and Tanh: FSDD, 2-layer FC", "Figure B.11", "fsdd", "fc2"),
    _smooth("fig-b.12", "Swish and Tanh: CIFAR-2, 2-layer CNN", "Figure B.12", "cifar-2", "cnn"),
    _smooth("fig-b.13", "Swish and Tanh: SVHN-2, 2-layer CNN", "Figure B.13", "svhn-2", "cnn"),
)
