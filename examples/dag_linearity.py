"""Any directed acyclic graph as a network: draw it, train it, and watch it become linear as it gets wider.

Three architectures from `catapult_opt.analysis.dag` are trained by a plain torch optimizer at growing widths: a fully
connected network, a DenseNet that has lost half its edges, and a network squeezed through a layer of two neurons. By
chapter 2 of the thesis the first two become linear in their weights (their tangent kernel stands still during training
and the Hessian of their output vanishes); the third does not.

    python examples/dag_linearity.py              # 6 widths x 3 seeds, within a minute on 2 cores
    python examples/dag_linearity.py --quick      # seconds: 4 widths x 1 seed

Leaves in --out a table linearity.csv, and where matplotlib is installed graphs.png and linearity.png.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from catapult_opt.analysis.dag import (
    DAG,
    DAGNetwork,
    KernelChange,
    Linearization,
    densenet,
    drop_edges,
    fcn,
    hessian_norm,
    log_log_slope,
)

INPUTS, SAMPLES = 20, 10
ARCHITECTURES: dict[str, Callable[[int, int, int], DAG]] = {  # inputs, width, seed -> graph
    "FCN": lambda d, m, seed: fcn([d, m, m, 1]),
    "half DenseNet": lambda d, m, seed: drop_edges(densenet([d, m, m, 1], dense_input=False), 0.5, seed),
    "narrow layer": lambda d, m, seed: fcn([d, m, 2, m, 1]),
}
MEASURES = {"kernel_change": "kernel change", "hessian": "Hessian norm", "deviation": "|f - f_lin|"}


@dataclass(frozen=True)
class Run:
    """One trained network."""

    architecture: str
    width: int  # neurons in a wide layer
    seed: int
    weights: int
    steps: int
    kernel_change: float  # largest |K_t - K_0| / |K_0|
    hessian: float  # spectral norm of the output's Hessian at the first weights, for one sample
    deviation: float  # largest |f - f_lin| over the samples after training


def train(architecture: str, width: int, seed: int) -> Run:
    """Gradient descent on (1/2) sum (f - y)^2 to a hundredth of the first loss, by torch.optim.SGD."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(SAMPLES, INPUTS, generator=generator), torch.randn(SAMPLES, 1, generator=generator)
    net = DAGNetwork(ARCHITECTURES[architecture](INPUTS, width, seed), torch.tanh, generator=generator)
    hessian = hessian_norm(net, x[0], tol=0.01).value
    change, linear = KernelChange(net, x), Linearization(net, x)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5 / float(torch.linalg.eigvalsh(change.initial)[-1]))
    first, steps = None, 0
    while True:
        optimizer.zero_grad()
        loss = (net(x) - y).square().sum() / 2
        first = first or loss.item()
        if loss.item() <= 0.01 * first or steps == 3000:
            break
        loss.backward()
        optimizer.step()
        steps += 1
        if steps <= 20 or steps % 20 == 0:
            change.update()
    change.update()
    deviation = float(linear.deviation().max())
    return Run(architecture, width, seed, net.num_weights, steps, change.maximum, hessian, deviation)


def measured(runs: list[Run]) -> Table:
    """Means over the seeds."""
    out = Table(
        title="Measures of linearity, mean over the seeds", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for name in ("architecture", "width", "steps", *MEASURES.values()):
        out.add_column(name, justify="left" if name == "architecture" else "right", no_wrap=True)
    for architecture in ARCHITECTURES:
        mine = [run for run in runs if run.architecture == architecture]
        for width in sorted({run.width for run in mine}):
            at = [run for run in mine if run.width == width]
            means = [f"{sum(getattr(run, key) for run in at) / len(at):.3f}" for key in MEASURES]
            steps = sum(run.steps for run in at) / len(at)
            out.add_row(architecture, str(width), f"{steps:.0f}", *means)
        out.add_section()
    return out


def exponents(runs: list[Run]) -> Table:
    """The a of measure ~ width^a, with its 95 % confidence interval."""
    out = Table(
        title="Exponents of the width, with 95 % intervals", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for name in ("architecture", *MEASURES.values()):
        out.add_column(name, no_wrap=True)
    for architecture in ARCHITECTURES:
        mine = [run for run in runs if run.architecture == architecture]
        slopes = [log_log_slope([r.width for r in mine], [getattr(r, key) for r in mine]) for key in MEASURES]
        out.add_row(architecture, *(f"{s.value:.2f} ({s.low:.1f}, {s.high:.1f})" for s in slopes))
    return out


def draw(runs: list[Run], folder: Path) -> list[Path]:
    """Small graphs of each architecture, and the measures against the width; nothing without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    from catapult_opt.analysis.dag import draw_layers

    graphs = Figure(figsize=(15, 4.5), layout="constrained")
    for ax, (name, graph) in zip(graphs.subplots(1, len(ARCHITECTURES)), ARCHITECTURES.items(), strict=True):
        dag = graph(3, 6, 0)
        draw_layers(dag, ax).set_title(f"{name}: {dag.num_edges} edges, width {dag.width}")
    curves = Figure(figsize=(12, 4), layout="constrained")
    for ax, (key, label) in zip(curves.subplots(1, len(MEASURES)), MEASURES.items(), strict=True):
        for name in ARCHITECTURES:
            mine = [run for run in runs if run.architecture == name]
            ax.scatter([run.width for run in mine], [getattr(run, key) for run in mine], s=12, label=name)
        ax.set_xscale("log", base=2)
        ax.set(yscale="log", xlabel="width", title=label)
    ax.legend(frameon=False)
    paths = [folder / "graphs.png", folder / "linearity.png"]
    for figure, path in zip((graphs, curves), paths, strict=True):
        figure.savefig(path, dpi=130)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 widths and 1 seed, in seconds")
    parser.add_argument("--seeds", type=_positive, help="runs per architecture and width (3; 1 with --quick)")
    parser.add_argument("--out", type=Path, default=Path("runs/dag_linearity"), help="folder to write to (%(default)s)")
    options = parser.parse_args()
    widths = [16, 32, 64, 128] if options.quick else [16, 32, 64, 128, 256, 512]
    seeds = options.seeds or (1 if options.quick else 3)
    options.out.mkdir(parents=True, exist_ok=True)

    console = Console()
    plans = [(name, width, seed) for name in ARCHITECTURES for width in widths for seed in range(seeds)]
    runs = [train(*plan) for plan in track(plans, "training", console=Console(stderr=True), transient=True)]
    with (options.out / "linearity.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(runs[0])))
        writer.writeheader()
        writer.writerows(asdict(run) for run in runs)
    console.print(measured(runs))
    console.print(exponents(runs))
    pictures = [path.name for path in draw(runs, options.out)]
    written = ", ".join(["linearity.csv", *pictures])
    console.print(f"Wrote {written} to {options.out}", markup=False, highlight=False, soft_wrap=True)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


if __name__ == "__main__":
    main()
