"""What measuring the critical learning rate costs and how exact it is: `python benchmarks/curvature.py`.

One run, one table: for an MLP, a CNN, a WideResNet with BatchNorm, a ViT and a GPT

* a curvature product against a plain SGD step;
* one estimate of lambda_max to 1 %, from a random vector and from that of a measurement ten steps before, against the
  packages of benchmarks/peers.py (those not installed are skipped) and float64 Lanczos (benchmarks/truth.py);
* training with CatapultSGD's defaults against torch.optim.SGD, and the error of the rates that it acted on;
* memory, as multiples of the parameters'.

Times are CPU seconds of one thread (other programs on the machine count for little), the two sides of every ratio are
interleaved in the same process, and medians are taken. `--json PATH` keeps every number, `--quick` is a smoke run.
A package counts as the fastest only where its median error is within the 1 % asked of it.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler would write into the progress bars

import torch
from models import FAMILIES, Batch, Family
from peers import PEERS, Peer, prepared
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from truth import ggn_lambda_max, hessian_lambda_max

from catapult_opt import CatapultMonitor, CatapultSGD, critical_lr
from catapult_opt.capture import Capture
from catapult_opt.curvature.engines import StepSize
from catapult_opt.curvature.operators import GGN
from catapult_opt.link import LossCall
from catapult_opt.measure import measure
from catapult_opt.replay import preserved
from catapult_opt.vectors import Vector, random_unit

ACCURACY = 0.01  # asked of one estimate
# The project's targets.
OVERHEAD = 0.05  # share of the time that measuring may take
ETA_ERROR = 0.05  # median error of eta_crit in a training with defaults
SPEED_UP = 3.0  # over the fastest package,
FAMILIES_AHEAD = 4  # on so many families
COPIES = 1.0  # extra memory, in copies of the parameters; one more for the average


@dataclass(frozen=True)
class Effort:
    """How much to run."""

    warm_up: int = 30  # SGD steps before anything is measured
    products: int = 15  # curvature products timed
    estimates: int = 5  # batches on which lambda_max is estimated by everybody
    gap: int = 10  # SGD steps between them
    chunks: int = 60  # of training, for each side
    chunk: int = 10  # steps
    truths: int = 8  # measurements of the training that are compared with float64 Lanczos


QUICK = Effort(warm_up=2, products=2, estimates=1, gap=1, chunks=2, chunk=15, truths=1)
_QUICK_BATCH = 2


def relative_error(value: float, truth: float) -> float:
    """Of a curvature, or the other way round of its critical rate. No curvature at all found as such is no error."""
    if truth == 0.0:
        return 0.0 if value == 0.0 else math.inf
    return value / truth - 1


@dataclass
class Estimates:
    """One side's estimates of lambda_max, a number per batch."""

    seconds: list[float] = field(default_factory=list)
    products: list[int] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)  # relative, against float64

    @property
    def error(self) -> float:
        """Median size."""
        return statistics.median(map(abs, self.errors))

    def add(self, seconds: float, value: float, products: int, truth: float) -> None:
        self.seconds.append(seconds)
        self.products.append(products)
        self.errors.append(relative_error(value, truth))


@dataclass
class Result:
    """Everything measured on one family; seconds are CPU seconds."""

    family: str
    parameters: int
    step_seconds: list[float] = field(default_factory=list)  # plain SGD, next to the products
    product_seconds: list[float] = field(default_factory=list)
    estimates: dict[str, Estimates] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)  # packages that failed, and how
    plain_seconds: list[float] = field(default_factory=list)  # SGD steps next to CatapultSGD's
    unmeasured_seconds: list[float] = field(default_factory=list)
    measured_seconds: list[float] = field(default_factory=list)
    first_seconds: float = 0.0  # the first step, which also finds out how to measure
    training_products: list[int] = field(default_factory=list)
    training_errors: list[float] = field(default_factory=list)
    held: dict[str, float] = field(default_factory=dict)  # extra memory between steps, in copies of the parameters
    peak: dict[str, float] = field(default_factory=dict)  # extra memory at the peak of a step

    @property
    def ours(self) -> Estimates:
        return self.estimates["ours, cold"]

    def overhead(self) -> float:
        """Extra time of the steps after the first, by kind of step so that a disturbed one does not count.

        Measured steps differ in their products, so their mean is taken.
        """
        plain = statistics.median(self.plain_seconds)
        n, m = len(self.unmeasured_seconds), len(self.measured_seconds)
        total = sum(self.measured_seconds) + (n * statistics.median(self.unmeasured_seconds) if n else 0.0)
        return total / ((n + m) * plain) - 1

    def unmeasured(self) -> float:
        """A step that is not measured, in plain steps."""
        return statistics.median(self.unmeasured_seconds or [math.nan]) / statistics.median(self.plain_seconds)

    def price(self) -> float:
        """A measurement in plain steps."""
        plain = statistics.median(self.plain_seconds)
        return (statistics.mean(self.measured_seconds) - plain) / plain if self.measured_seconds else math.nan

    def interval(self) -> float:
        """Steps from one measurement to the next at which measuring takes the share OVERHEAD."""
        return self.price() / OVERHEAD


class Stopwatch:
    """CPU seconds of a call."""

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[float, Any]:
        start = time.process_time()
        result = function(*args, **kwargs)
        return time.process_time() - start, result


timed = Stopwatch()


class Trainer:
    """A model in training, from a fixed seed."""

    def __init__(self, family: Family, optimizer: Callable[[nn.Module, nn.Module], torch.optim.Optimizer]) -> None:
        torch.manual_seed(0)
        self.model, self.criterion = family.build(), family.criterion()
        self.optimizer = optimizer(self.model, self.criterion)

    def step(self, batch: Batch) -> None:
        x, y = batch
        self.optimizer.zero_grad()
        self.criterion(self.model(x), y).backward()
        self.optimizer.step()

    @property
    def params(self) -> list[Tensor]:
        return [p for p in self.model.parameters() if p.requires_grad]


def plain(family: Family) -> Trainer:
    return Trainer(family, lambda model, _: torch.optim.SGD(model.parameters(), lr=family.lr))


def catapult(family: Family) -> Trainer:
    return Trainer(family, lambda model, criterion: CatapultSGD(model.parameters(), model=model, criterion=criterion))


def captured(trainer: Trainer, batch: Batch) -> list[LossCall]:
    """What a training step on this batch leaves to a measurement (without its update)."""
    x, y = batch
    capture = Capture(trainer.model, trainer.criterion, lambda: trainer.params)
    capture.arm()
    trainer.criterion(trainer.model(x), y).backward()
    calls = capture.take()
    capture.detach()
    return calls


def time_products(family: Family, effort: Effort, result: Result) -> None:
    """A product on one copy of the model, a plain step on another, alternating."""
    trainer, other = plain(family), plain(family)
    batches = family.batches(1)
    for batch in itertools.islice(batches, effort.warm_up):
        trainer.step(batch)
    calls = captured(trainer, next(batches))
    with preserved(trainer.model, trainer.criterion, trainer.params):
        operator = GGN(trainer.model, trainer.params, calls, StepSize())
        v = random_unit(trainer.params)
        for _ in range(2):  # the first ones fit the finite-difference step
            v = _unit(operator.matvec(v))
        for batch in itertools.islice(batches, effort.products):
            result.step_seconds.append(timed(other.step, batch)[0])
            seconds, v = timed(operator.matvec, v)
            result.product_seconds.append(seconds)
            v = _unit(v)


def _unit(v: Vector) -> Vector:
    length = torch.nn.utils.get_total_norm(v)
    return [x / length for x in v]


def compare_estimates(
    family: Family, effort: Effort, result: Result, peers: list[Peer], tick: Callable[[], None]
) -> None:
    """Everybody's lambda_max to 1 % on the same batches and weights, along a training."""
    trainer, batches = plain(family), family.batches(2)
    vector, step = random_unit(trainer.params), StepSize()
    for batch in itertools.islice(batches, effort.warm_up):
        trainer.step(batch)
    for k in range(effort.estimates + 1):
        for batch in itertools.islice(batches, effort.gap):
            trainer.step(batch)
        batch = next(batches)
        calls = captured(trainer, batch)
        setting = (trainer.model, trainer.criterion, *batch)
        kept = {"start": vector, "step": step, "tol": ACCURACY, "max_matvecs": 50}
        seconds, (found, vector) = timed(measure, trainer.model, trainer.criterion, trainer.params, calls, **kept)
        if k == 0:
            continue  # that was the vector to start from
        truth = {"ggn": ggn_lambda_max(*setting)}
        _note(result, "ours, warm", seconds, found.lambda_max, found.matvecs, truth["ggn"])
        for label, engine in (("ours, cold", "finite-difference"), ("ours, cold, exact products", "auto")):
            seconds, found = timed(critical_lr, *setting, engine=engine, tol=ACCURACY)
            _note(result, label, seconds, found.lambda_max, found.matvecs, truth["ggn"])
        if any(peer.matrix == "hessian" for peer in peers):
            evaluated = copy.deepcopy(trainer.model).eval()
            truth["hessian"] = hessian_lambda_max(evaluated, *setting[1:])
        for peer in peers:
            _ask(result, peer, setting, truth)
        tick()


def _ask(result: Result, peer: Peer, setting: tuple[Any, ...], truth: dict[str, float]) -> None:
    model, *rest = setting
    # Made outside of the timing. PyHessian sets eval mode, and needs the running statistics for it.
    model = prepared(model) if peer.matrix == "ggn" else copy.deepcopy(model)
    try:
        seconds, (value, products) = timed(peer, model, *rest)
    except Exception as error:  # a package that cannot do this model is a finding, not the end of the benchmark
        result.refused[peer.name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        return
    _note(result, peer.name, seconds, value, products, truth[peer.matrix])


def _note(result: Result, side: str, seconds: float, value: float, products: int, truth: float) -> None:
    result.estimates.setdefault(side, Estimates()).add(seconds, value, products, truth)


def compare_training(family: Family, effort: Effort, result: Result, tick: Callable[[], None]) -> None:
    """SGD and CatapultSGD with its defaults on the same batches, in turns of a chunk of steps each."""
    ours, theirs = catapult(family), plain(family)
    batches = family.batches(3)
    kept = Sample(effort.truths)
    # What the first steps set up (buffers, the choice of the engine) is not part of the running cost.
    first = next(batches)
    theirs.step(first)
    result.first_seconds = _catapult_step(ours, first, result, None)
    for k in range(effort.chunks):
        chunk = list(itertools.islice(batches, effort.chunk))
        for side in (0, 1) if k % 2 == 0 else (1, 0):
            for batch in chunk:
                if side == 0:
                    _weights(theirs)  # to no use but that of the same caches as on the other side
                    result.plain_seconds.append(timed(theirs.step, batch)[0])
                else:
                    _catapult_step(ours, batch, result, kept)
        tick()
    for weights, batch, found in kept.items:
        model = copy.deepcopy(ours.model)
        model.load_state_dict(weights)
        result.training_errors.append(relative_error(found, ggn_lambda_max(model, ours.criterion, *batch)))
        tick()


def _weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in trainer.model.state_dict().items()}


def _catapult_step(ours: Trainer, batch: Batch, result: Result, kept: Sample | None) -> float:
    assert isinstance(ours.optimizer, CatapultSGD)
    weights, before = _weights(ours), ours.optimizer.last
    seconds, _ = timed(ours.step, batch)
    found = ours.optimizer.last
    if kept is None:
        return seconds
    if found is before or found is None:
        result.unmeasured_seconds.append(seconds)
        return seconds
    result.measured_seconds.append(seconds)
    result.training_products.append(found.matvecs)
    kept.add((weights, batch, found.lambda_max))
    return seconds


class Sample:
    """At most `size` items, evenly spread over a stream of unknown length."""

    def __init__(self, size: int) -> None:
        self.items: list[Any] = []
        self._size, self._every, self._seen = size, 1, 0

    def add(self, item: Any) -> None:
        if self._seen % self._every == 0:
            self.items.append(item)
        self._seen += 1
        if len(self.items) > self._size:
            self.items, self._every = self.items[::2], self._every * 2


def compare_memory(family: Family, result: Result) -> None:
    """Allocated bytes by torch's profiler: SGD, SGD watched by a monitor (no average), CatapultSGD (with average)."""

    def watched(family: Family) -> Trainer:
        trainer = plain(family)
        monitor = CatapultMonitor(trainer.optimizer, model=trainer.model, criterion=trainer.criterion)
        trainer.monitor = monitor  # type: ignore[attr-defined]  # keeps it alive
        return trainer

    base_held, base_peak = _allocated(family, plain)
    for side, build in (("without average", watched), ("with average", catapult)):
        held, peak = _allocated(family, build)
        size = 4.0 * result.parameters
        result.held[side], result.peak[side] = (held - base_held) / size, (peak - base_peak) / size


def _allocated(family: Family, build: Callable[[Family], Trainer]) -> tuple[int, int]:
    """Bytes held after a few steps and at the peak of one, both measured: the first estimate starts from nothing."""
    with _memory_trace() as first:
        trainer = build(family)
        batches = family.batches(4)
        for batch in itertools.islice(batches, 2):
            trainer.step(batch)
    held = first.totals[-1]
    with _memory_trace() as second:
        for batch in itertools.islice(batches, 2):
            trainer.step(batch)
    peak = held + max(second.totals)
    return held, max(peak, max(first.totals))


class _memory_trace:
    """Running totals of the bytes allocated inside, relative to its start."""

    totals: list[int]

    def __enter__(self) -> _memory_trace:
        activities = [torch.profiler.ProfilerActivity.CPU]
        self._profile = torch.profiler.profile(activities=activities, profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._profile.__exit__(*exception)
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "trace.json")
            self._profile.export_chrome_trace(path)
            events = json.loads(Path(path).read_text())["traceEvents"]
        changes = [e["args"]["Bytes"] for e in sorted(_memory_events(events), key=lambda e: e["ts"])]
        self.totals = list(itertools.accumulate(changes))


def _memory_events(events: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    return (e for e in events if e.get("name") == "[memory]")


def run(family: Family, effort: Effort, peers: list[Peer], progress: Progress) -> Result:
    total = 2 + effort.estimates + effort.chunks + effort.truths
    task = progress.add_task(family.name, total=total)
    with torch.random.fork_rng():
        result = Result(family.name, sum(p.numel() for p in family.build().parameters()))

    def tick() -> None:
        progress.advance(task)

    time_products(family, effort, result)
    tick()
    compare_memory(family, result)
    tick()
    compare_training(family, effort, result, tick)
    compare_estimates(family, effort, result, peers, tick)
    progress.update(task, completed=total)
    return result


def fastest(result: Result) -> tuple[str, float] | None:
    """The package that took the least time of those within the accuracy, and its time over ours (cold)."""
    others = {n: e for n, e in result.estimates.items() if not n.startswith("ours") and e.error <= ACCURACY}
    if not others:
        return None
    name = min(others, key=lambda n: statistics.median(others[n].seconds))
    return name, ratio(others[name].seconds, result.ours.seconds)


def ratio(a: list[float], b: list[float]) -> float:
    """Median of the ratios of what was measured side by side."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def table(results: list[Result], peers: list[Peer]) -> Table:
    """Metrics down, families across."""
    out = Table(
        title="Curvature: cost in plain SGD steps, errors against float64 Lanczos (medians)", title_justify="left"
    )
    out.add_column("")
    for result in results:
        out.add_column(result.family, justify="right")
    for title, cell in _rows(peers):
        if cell is None:
            out.add_section()
            out.add_row(f"[bold]{title}[/]")
        else:
            out.add_row(title, *(cell(r) for r in results))
    return out


Cell = Callable[[Result], str] | None


def _rows(peers: list[Peer]) -> Iterator[tuple[str, Cell]]:
    yield "parameters", lambda r: f"{r.parameters:,}"
    yield "plain SGD step, ms", lambda r: f"{1e3 * statistics.median(r.step_seconds):.1f}"
    yield "curvature product", lambda r: f"{ratio(r.product_seconds, r.step_seconds):.2f}"
    yield "One estimate to 1 %: steps (products, error)", None
    for side in ("ours, cold", "ours, warm", "ours, cold, exact products", *(peer.name for peer in peers)):
        yield side, lambda r, side=side: _estimate(r, side)
    if peers:
        yield "fastest package within 1 % / ours, cold", lambda r: f"{f[1]:.1f}x" if (f := fastest(r)) else "-"
    yield "Training with defaults", None
    yield "overhead", lambda r: f"{r.overhead():+.1%}"
    yield "a step not measured", lambda r: f"{r.unmeasured():.3f}"
    yield "steps measured", lambda r: f"{_measured(r)} of {_measured(r) + len(r.unmeasured_seconds)}"
    yield "products a measurement", lambda r: f"{statistics.mean(r.training_products):.1f}" if _measured(r) else "-"
    yield "a measurement, in steps", lambda r: f"{r.price():.1f}"
    yield f"interval for {OVERHEAD:.0%}", lambda r: f"{r.interval():.0f}"
    yield "median error of eta_crit", lambda r: _error(r.training_errors)
    yield "largest error of eta_crit", lambda r: f"{max(map(abs, r.training_errors), default=float('nan')):.1%}"
    yield "Extra memory, in copies of the parameters", None
    for side in ("without average", "with average"):
        yield f"held, {side}", lambda r, side=side: f"{r.held[side]:.2f}"
        yield f"peak, {side}", lambda r, side=side: f"{r.peak[side]:.2f}"


def verdicts(results: list[Result], peers: list[Peer]) -> Iterator[str]:
    """The project's targets, met or missed."""

    def line(name: str, ok: list[bool], needed: int | None = None) -> str:
        met = sum(ok) >= (len(ok) if needed is None else needed)
        return f"{'met   ' if met else 'missed'} {name}: on {sum(ok)} of {len(ok)}"

    yield line(
        f"median error of eta_crit at most {ETA_ERROR:.0%}",
        [bool(r.training_errors) and statistics.median(map(abs, r.training_errors)) <= ETA_ERROR for r in results],
    )
    yield line(f"overhead of the defaults at most {OVERHEAD:.0%}", [r.overhead() <= OVERHEAD for r in results])
    if peers:
        ahead = [r.ours.error <= ACCURACY and (f := fastest(r)) is not None and f[1] >= SPEED_UP for r in results]
        name = f"one estimate to {ACCURACY:.0%} at least {SPEED_UP:.0f} times faster than the fastest package"
        yield line(f"{name} (asked: {FAMILIES_AHEAD})", ahead, min(FAMILIES_AHEAD, len(results)))
    for kind, at in (("held", "held between steps"), ("peak", "at the peak of a step")):
        ok = [
            getattr(r, kind)["without average"] <= COPIES + 0.01 and getattr(r, kind)["with average"] <= COPIES + 1.01
            for r in results
        ]
        yield line(f"extra memory {at} at most a copy of the parameters, with average two", ok)


def _measured(result: Result) -> int:
    return len(result.measured_seconds)


def _estimate(result: Result, side: str) -> str:
    e = result.estimates.get(side)
    if e is None:
        return "fails" if side in result.refused else "-"
    step = statistics.median(result.step_seconds)
    return f"{statistics.median(e.seconds) / step:.1f} ({statistics.median(e.products):.0f}, {_error(e.errors)})"


def _error(errors: list[float]) -> str:
    return f"{statistics.median(map(abs, errors)):.2%}" if errors else "-"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smoke run: every path, no figure worth quoting")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every number")
    names = [f.name for f in FAMILIES]
    parser.add_argument("--families", nargs="+", default=names, choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--no-peers", action="store_true", help="leave the other packages out")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    # Not a terminal: wide enough for one line a row.
    console, notes = Console(width=None if sys.stdout.isatty() else 132), Console(stderr=True)
    peers = [] if options.no_peers else _available(notes)
    effort = QUICK if options.quick else Effort()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=notes) as progress:
        chosen = [_small(f) if options.quick else f for f in FAMILIES if f.name in options.families]
        results = [run(f, effort, peers, progress) for f in chosen]
    console.print(table(results, peers))
    for verdict in verdicts(results, peers):
        console.print(verdict, markup=False)
    for result in results:
        for name, reason in result.refused.items():
            console.print(f"{result.family}: {name} failed: {reason}", markup=False)
    console.print(f"torch {torch.__version__}, one thread, load average {os.getloadavg()[0]:.1f}; CPU seconds.")
    if options.json:
        content = {
            "torch": torch.__version__,
            "quick": options.quick,
            "results": [dataclasses.asdict(r) for r in results],
        }
        options.json.write_text(json.dumps(content, indent=1))
    return 0


def _small(family: Family) -> Family:
    def batches(seed: int) -> Iterator[Batch]:
        return ((x[:_QUICK_BATCH], y[:_QUICK_BATCH]) for x, y in family.batches(seed))

    return dataclasses.replace(family, batches=batches)


def _available(notes: Console) -> list[Peer]:
    found = []
    for peer in PEERS:
        problem = peer.missing()
        if problem is None:
            found.append(peer)
        else:
            notes.print(problem, markup=False)
    return found


if __name__ == "__main__":
    sys.exit(main())
