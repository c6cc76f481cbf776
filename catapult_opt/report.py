"""What a run log says: the figures of a run (:func:`summarize`) and how they are shown (:func:`render`).

Match rate (thesis, Table 4.2): of the steps t on which the training loss rose, L(t+1) > L(t), the share whose rate was
above the critical one, eta(t) > eta_crit(t). Only measured steps count, nothing is extrapolated.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from catapult_opt.runlog import RunLog, encode

__all__ = ["SORT_KEYS", "RunSummary", "layout", "render", "sort_runs", "summarize", "to_csv", "to_json"]


@dataclass(frozen=True)
class RunSummary:
    """The figures of one run; ``None`` where the log does not tell."""

    name: str
    path: str
    face: str
    batch_size: int | None
    parameters: int | None
    steps: int  # steps in the log
    measured: int  # of these, with the critical learning rate measured
    super_critical: int  # measured steps with eta - eta_crit > 1e-8, up to super_critical_until
    super_critical_until: int | None  # the step of the best validation loss; None: all steps
    catapults: int  # episodes: the loss rose, peaked and came back, with a smaller lambda_max
    collapses: int
    back_offs: int
    restores: int
    failed_measurements: int
    match_rate: float | None  # among the measured steps on which the loss rose
    match_rises: int  # how many those are
    match_loss: str | None  # "train_loss", or "batch_loss": exact only for the full batch
    lambda_start: float | None
    lambda_end: float | None
    best_metric: str | None
    best_value: float | None
    best_step: int | None
    test_metric: str | None
    test_value: float | None  # at best_step
    agop: float | None  # at best_step where logged there, else the last one
    agop_step: int | None
    probe_seconds: float  # spent measuring
    probe_share: float | None  # of the running time, up to the last measurement
    extra_bytes: int | None  # of memory kept between the steps
    oldest: int  # steps: the greatest age of a critical rate in use
    dropped: tuple[str, ...]


def summarize(log: RunLog) -> RunSummary:
    """All figures of a run."""
    happened = Counter(record["event"] for record in log.events)
    best_metric, best_step, best_value = _best_validation(log)
    until = best_step if best_metric and not _higher_is_better(best_metric) else None
    match_loss, matches = _matches(log)
    lambdas = [record["lambda_max"] for record in log.measured if math.isfinite(record["lambda_max"])]
    test_metric, test_value = _test_metric(log, best_metric, best_step)
    spent = sum(record.get("probe_seconds", 0.0) for record in log.measured)
    elapsed = sum(record.get("elapsed", 0.0) for record in log.measured)  # each since the one before
    agop_step, agop = _agop(log, best_step)
    return RunSummary(
        name=log.name,
        path=str(log.path),
        face=log.header["face"],
        batch_size=log.header["batch_size"],
        parameters=log.header["parameters"],
        steps=len(log.steps),
        measured=len(log.measured),
        super_critical=sum(r["super_critical"] for r in log.measured if until is None or r["step"] <= until),
        super_critical_until=until,
        catapults=happened["catapult_recovered"],
        collapses=happened["collapse"],
        back_offs=happened["back_off"],
        restores=happened["restore"],
        failed_measurements=happened["measurement_failed"],
        match_rate=sum(matches) / len(matches) if matches else None,
        match_rises=len(matches),
        match_loss=match_loss,
        lambda_start=lambdas[0] if lambdas else None,
        lambda_end=lambdas[-1] if lambdas else None,
        best_metric=best_metric,
        best_value=best_value,
        best_step=best_step,
        test_metric=test_metric,
        test_value=test_value,
        agop=agop,
        agop_step=agop_step,
        probe_seconds=spent,
        probe_share=spent / elapsed if elapsed > 0 else None,
        extra_bytes=log.header.get("extra_bytes"),
        oldest=max((record.get("age", 0) for record in log.steps), default=0),
        dropped=tuple(log.dropped),
    )


def _metric_names(log: RunLog, prefix: str) -> list[str]:
    """The metrics whose name starts with ``prefix``, in the order of their first record."""
    return [key for key in dict.fromkeys(k for m in log.metrics for k in m["values"]) if key.lower().startswith(prefix)]


def _higher_is_better(metric: str) -> bool:
    return any(word in metric.lower() for word in ("acc", "score", "auc"))


def _best_validation(log: RunLog) -> tuple[str | None, int | None, float | None]:
    """Metric, step and value of the best validation; a loss goes before other validation metrics."""
    names = sorted(_metric_names(log, "val"), key=lambda name: "loss" not in name.lower())
    for name in names:
        values = {step: value for step, value in log.metric(name).items() if math.isfinite(value)}
        if values:
            step = (max if _higher_is_better(name) else min)(values, key=lambda step: values[step])
            return name, step, values[step]
    return None, None, None


def _test_metric(log: RunLog, best_metric: str | None, best_step: int | None) -> tuple[str | None, float | None]:
    """The test metric that goes with the validation metric (test_loss with val_loss), at the best validation step."""
    if best_metric is None or best_step is None:
        return None, None
    counterpart = re.sub(r"^val[a-z]*", "test", best_metric.lower())
    names = sorted(_metric_names(log, "test"), key=lambda name: name.lower() != counterpart)
    return next(((name, log.metric(name)[best_step]) for name in names if best_step in log.metric(name)), (None, None))


def _agop(log: RunLog, best_step: int | None) -> tuple[int | None, float | None]:
    for name in _metric_names(log, "agop"):
        values = log.metric(name)
        step = best_step if best_step in values else max(values)
        return step, values[step]
    return None, None


def _matches(log: RunLog) -> tuple[str | None, list[bool]]:
    """For every measured step on which the loss rose: was its rate above the critical one?

    L is the full training loss where ``train_loss`` is logged before and after a step, else the loss of the steps' own
    batches.
    """
    # A metric of step t is taken after t updates, the loss of step t before its update: both become "after t updates".
    full = log.metric("train_loss")
    batch = {record["step"] - 1: record["loss"] for record in log.steps}
    for name, loss in (("train_loss", full), ("batch_loss", batch)):
        known = [record for record in log.measured if {record["step"] - 1, record["step"]} <= loss.keys()]
        if known:
            rises = [record for record in known if loss[record["step"]] > loss[record["step"] - 1]]
            return name, [record["effective_lr"] > record["eta_crit"] for record in rises]
    return None, []


# ------------------------------------------------------------------------------------------------- sorting, exporting

SORT_KEYS: Final[dict[str, str]] = {  # as typed: the field of RunSummary
    "name": "name",
    "batch": "batch_size",
    "steps": "steps",
    "super-critical": "super_critical",
    "catapults": "catapults",
    "collapses": "collapses",
    "match": "match_rate",
    "lambda": "lambda_end",
    "best": "best_value",
    "test": "test_value",
    "agop": "agop",
}


def sort_runs(runs: Iterable[tuple[RunSummary, RunLog]], sort: str | None) -> list[tuple[RunSummary, RunLog]]:
    """Runs in ascending order of a key of ``SORT_KEYS``, descending with a "-" before it; unknown values come last."""
    if sort is None:
        return list(runs)
    descending, key = sort.startswith("-"), SORT_KEYS[sort.removeprefix("-")]
    known: list[tuple[RunSummary, RunLog]] = []
    unknown: list[tuple[RunSummary, RunLog]] = []
    for run in runs:
        value = getattr(run[0], key)
        (unknown if value is None or value != value else known).append(run)

    def order(run: tuple[RunSummary, RunLog]) -> Any:
        return natural(run[0].name) if key == "name" else getattr(run[0], key)

    return sorted(known, key=order, reverse=descending) + unknown


def natural(text: str) -> list[tuple[int, str]]:
    """Sort key by which batch_5 comes before batch_10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d{1,18})", text)]


def to_json(summaries: Iterable[RunSummary]) -> str:
    """A JSON list with an object per run; NaN and infinities are strings, as in the log."""
    return json.dumps([encode(asdict(summary)) for summary in summaries], indent=2, allow_nan=False)


def to_csv(summaries: Iterable[RunSummary]) -> str:
    """A line per run under a line of names; an unknown value is an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(RunSummary)], lineterminator="\n")
    writer.writeheader()
    for summary in summaries:
        writer.writerow({**asdict(summary), "dropped": "; ".join(summary.dropped)})
    return text.getvalue()


# ------------------------------------------------------------------------------------------------------ as rich table


@dataclass(frozen=True)
class _Glyphs:
    """The characters of the report, for consoles that can show them all and for those that cannot."""

    lam: str = "λ_max"
    eta: str = "η"
    eta_crit: str = "η_crit"
    arrow: str = "→"
    dash: str = "–"  # noqa: RUF001
    dot: str = "·"
    dagger: str = "†"
    blocks: str = "▁▂▃▄▅▆▇█"
    catapult: str = "▲"
    collapse: str = "×"  # noqa: RUF001


_ASCII: Final = _Glyphs("lambda", "lr", "critical lr", "->", "-", "-", "+", "_.-=+*#@", "^", "x")


def _glyphs(console: Console) -> _Glyphs:
    try:
        "".join(asdict(_Glyphs()).values()).encode(console.encoding)
    except (UnicodeEncodeError, LookupError):
        return _ASCII
    return _Glyphs()


def render(
    summaries: Sequence[RunSummary], logs: Sequence[RunLog], console: Console, *, sort: str | None = None
) -> None:
    """Print the report: the table, its notes, and a sparkline per run.

    A terminal gets a table that fits it; a pipe or file gets plain text as wide as the table wants to be.
    """
    report = layout(summaries, logs, console, sort=sort)
    if console.is_terminal:
        console.print(report)
        return
    before, console.width = console.width, max(_natural_width(report, console), _PIPE_WIDTH)
    try:
        console.print(report)
    finally:
        console.width = before


_MIN_NAME: Final = 8  # a longer name may be folded to this width
_PIPE_WIDTH: Final = 100  # at least, where no terminal says how wide it is
_MAX_SPARK: Final = 120
_BESIDE_SPARK: Final = 28  # the label before a sparkline and the range after it, at their longest


def layout(
    summaries: Sequence[RunSummary], logs: Sequence[RunLog], console: Console, *, sort: str | None = None
) -> RenderableType:
    """The report as one rich renderable, laid out for the console."""
    runs = sort_runs(zip(summaries, logs, strict=True), sort)
    if not runs:
        return Text("no runs")
    glyphs, rows = _glyphs(console), [summary for summary, _ in runs]
    width = console.width if console.is_terminal else None
    tables = _tables(rows, glyphs, console, width)
    width = width or max(_PIPE_WIDTH, *(_natural_width(table, console) for table in tables))
    notes = Text("\n".join(["", *_notes(rows, glyphs)]), style="dim")
    return Group(*tables, notes, *[_sparklines(summary, log, glyphs, width) for summary, log in runs])


def _tables(rows: Sequence[RunSummary], glyphs: _Glyphs, console: Console, width: int | None) -> list[RenderableType]:
    """One table that fits ``width``, with its cells on two lines if need be; several where even that is too wide."""
    table = _table(_columns(rows, glyphs, compact=False), compact=False)
    if width is None or _natural_width(table, console) <= width:
        return [table]
    return _split(_columns(rows, glyphs, compact=True), console, width)


def _split(columns: list[Column], console: Console, width: int) -> list[RenderableType]:
    table = _table(columns, compact=True)
    names = max(len(main) for main, _ in columns[0].cells)
    if len(columns) <= 2 or _natural_width(table, console) - max(0, names - _MIN_NAME) <= width:
        return [table]
    half = (len(columns) + 1) // 2
    return [*_split(columns[:half], console, width), Text(), *_split([columns[0], *columns[half:]], console, width)]


def _natural_width(renderable: RenderableType, console: Console) -> int:
    if isinstance(renderable, Group):
        return max(_natural_width(part, console) for part in renderable.renderables)
    return console.measure(renderable, options=console.options.update(width=10_000)).maximum


Cell = tuple[str, str]  # the figure, and what belongs to it: beside it, or under it where the table must be narrow


@dataclass(frozen=True)
class Column:
    """A column of the table; a column without a single figure is left out."""

    header: str
    cells: list[Cell]
    styles: list[str]


def _table(columns: Sequence[Column], *, compact: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0 if compact else 1))
    for position, column in enumerate(columns):
        left = position == 0  # the run's name, the only column that may fold
        table.add_column(column.header, justify="left" if left else "right", no_wrap=not left, overflow="fold")
    for row in zip(*[zip(column.cells, column.styles, strict=True) for column in columns], strict=True):
        table.add_row(*[_cell(cell, style, compact) for cell, style in row])
    return table


def _cell(cell: Cell, style: str, compact: bool) -> Text:
    main, rest = cell
    return Text.assemble((main, style), "\n" if compact else " ", (rest, "dim")) if rest else Text(main, style)


def _columns(rows: Sequence[RunSummary], glyphs: _Glyphs, *, compact: bool) -> list[Column]:
    columns: list[Column] = []

    def add(header: str, cells: Iterable[Cell | str], styles: Sequence[str] = ()) -> None:
        pairs = [cell if isinstance(cell, tuple) else (cell, "") for cell in cells]
        if any(main for main, _ in pairs):
            header = header if compact else header.replace("-\n", "").replace("\n", " ")
            columns.append(Column(header, pairs, list(styles) or [""] * len(pairs)))

    add("run", [clean(row.name, glyphs) or "?" for row in rows], ["bold"] * len(rows))
    add("batch", [_count(row.batch_size) for row in rows])
    if any(row.measured != row.steps for row in rows):
        steps = "steps\n(meas.)" if compact else "steps (measured)"
        add(steps, [(str(row.steps), f"({row.measured})") for row in rows])
    else:
        add("steps", [str(row.steps) for row in rows])
    add("super-\ncrit." if compact else "super-critical", [_count(row.super_critical, row.measured) for row in rows])
    add("cata-\npults", [str(row.catapults) for row in rows], ["green" if row.catapults else "" for row in rows])
    if not compact or any(row.collapses for row in rows):
        add("col-\nlapses", [str(row.collapses) for row in rows], ["red" if row.collapses else "" for row in rows])
    add("match\nrate", [_match_cell(row, compact) for row in rows])
    add(glyphs.lam, [_lambda_cell(row, glyphs) for row in rows])
    best = _common([row.best_metric for row in rows], "val", glyphs)
    add(f"best\n{best}", [_best_cell(row) for row in rows], _best_styles(rows))
    test = _common([row.test_metric for row in rows], "test", glyphs)
    add(test.replace("_", "\n", 1) if compact else test, [_number(row.test_value) for row in rows])
    add("AGOP", [_number(row.agop) + ("" if _agop_at_best(row) else glyphs.dagger) for row in rows])
    return columns


def _number(value: float | None) -> str:
    """Three significant digits, with an exponent as short as can be: 1.20e-5."""
    if value is None:
        return ""
    return re.sub(r"e([+-])0*(?=\d)", lambda match: "e" + match[1].strip("+"), f"{value:#.3g}").removesuffix(".")


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _count(value: int | None, known: object = True) -> str:
    return str(value) if value is not None and known else ""


def _match_cell(row: RunSummary, compact: bool) -> Cell:
    if row.match_rate is None:
        return "", ""
    return f"{row.match_rate:.1%}" + "*" * (
        row.match_loss == "batch_loss"
    ), f"{'/' if compact else 'of '}{row.match_rises}"


def _lambda_cell(row: RunSummary, glyphs: _Glyphs) -> Cell:
    return (_number(row.lambda_start), f"{glyphs.arrow} {_number(row.lambda_end)}") if row.lambda_start else ("", "")


def _best_cell(row: RunSummary) -> Cell:
    return (_number(row.best_value), f"@ {row.best_step}") if row.best_metric else ("", "")


def _best_styles(rows: Sequence[RunSummary]) -> list[str]:
    """Bold green for the best run, where there are several and they share a metric."""
    values = [row.best_value for row in rows if row.best_value is not None]
    metrics = {row.best_metric for row in rows} - {None}
    if len(values) < 2 or len(metrics) != 1:
        return [""] * len(rows)
    best = (max if _higher_is_better(str(*metrics)) else min)(values)
    return ["bold green" if row.best_value == best else "" for row in rows]


def _agop_at_best(row: RunSummary) -> bool:
    return row.agop is None or row.agop_step == row.best_step


def _common(names: Iterable[str | None], otherwise: str, glyphs: _Glyphs) -> str:
    known = {name for name in names if name is not None}
    return clean(known.pop(), glyphs) if len(known) == 1 else otherwise


def clean(text: str, glyphs: _Glyphs | None = None) -> str:
    """``text`` without control characters, which a foreign log could send to the terminal."""
    text = "".join(char if char.isprintable() else "?" for char in text)
    return text.encode("ascii", "replace").decode() if glyphs is _ASCII else text


def _notes(rows: Sequence[RunSummary], glyphs: _Glyphs) -> Iterator[str]:
    """What the figures mean, as far as it is not plain from the header."""
    above = f"{glyphs.eta} > {glyphs.eta_crit}"
    if any(row.measured for row in rows):
        until = [row.super_critical_until is not None for row in rows]
        scope = "" if not any(until) else ", up to the best validation loss" + ("" if all(until) else " where known")
        yield f"super-critical: measured steps with {above}{scope}"
    if any(row.match_rate is not None for row in rows):
        yield f"match rate: of the loss rises at measured steps, the share with {above}"
    if any(row.match_loss == "batch_loss" and row.match_rate is not None for row in rows):
        yield "* by the loss of each step's own batch: exact only for the full batch"
    if not all(_agop_at_best(row) for row in rows):
        yield f"{glyphs.dagger} at the last record, for want of one at the best validation step"
    marks = [f"{glyphs.catapult} the peak of a catapult"] if any(row.catapults for row in rows) else []
    marks += [f"{glyphs.collapse} a collapse"] if any(row.collapses for row in rows) else []
    if marks:
        yield ", ".join(marks) + f"; loss and {glyphs.lam} on log scales"


# --------------------------------------------------------------------------------------------------------- sparklines


def _sparklines(summary: RunSummary, log: RunLog, glyphs: _Glyphs, width: int) -> RenderableType:
    """Loss and lambda_max over the steps, on log scales, and below them where the catapults peaked."""
    title = Text.assemble(("\n" + clean(log.name, glyphs), "bold"), ("  " + _details(summary, glyphs), "dim"))
    if not log.steps:
        return Group(title, Text("  no steps yet", "dim"))
    axis = _Axis(log.steps[0]["step"], log.steps[-1]["step"], min(width, _MAX_SPARK) - _BESIDE_SPARK)
    loss = [(record["step"], record["loss"]) for record in log.steps]
    lam = [(record["step"], record["lambda_max"]) for record in log.measured]
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=6, justify="right", style="dim", no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True, style="dim")
    grid.add_row("loss", Text(axis.blocks(loss, glyphs, spikes=True), "cyan"), _range(loss, glyphs))
    if lam:
        grid.add_row(glyphs.lam, Text(axis.blocks(lam, glyphs, spikes=False), "magenta"), _range(lam, glyphs))
    if marks := axis.marks(log, glyphs):
        grid.add_row("", marks, _plural(summary.catapults, "catapult"))
    return Group(title, grid)


def _details(summary: RunSummary, glyphs: _Glyphs) -> str:
    parts = [clean(summary.face, glyphs)]
    parts += [f"batch {summary.batch_size}"] if summary.batch_size is not None else []
    parts += [f"{summary.parameters:,} parameters"] if summary.parameters is not None else []
    parts += [f"{summary.steps:,} steps"]
    if summary.probe_share is not None:
        parts += [f"measuring {summary.probe_seconds:.2g} s, {summary.probe_share:.0%} of the time"]
    parts += [f"{summary.extra_bytes / 1e6:.2g} MB extra"] if summary.extra_bytes else []
    parts += [f"rates at most {_plural(summary.oldest, 'step')} old"] if summary.oldest else []
    parts += [f"{_plural(summary.failed_measurements, 'measurement')} failed"] if summary.failed_measurements else []
    return f" {glyphs.dot} ".join(part for part in parts if part)


Points = list[tuple[int, float]]  # step, value


def _positive(points: Points) -> list[float]:
    return [value for _, value in points if 0 < value < math.inf]


def _range(points: Points, glyphs: _Glyphs) -> str:
    values = _positive(points)
    return f"{_number(min(values))} {glyphs.dash} {_number(max(values))}" if values else ""


@dataclass(frozen=True)
class _Axis:
    """Steps ``first`` to ``last`` in at most ``room`` characters."""

    first: int
    last: int
    room: int

    @property
    def width(self) -> int:
        return max(1, min(self.room, self.last - self.first + 1))

    def bin(self, step: int) -> int:
        """The character that shows ``step``."""
        at = (step - self.first) * self.width // max(1, self.last - self.first + 1)
        return min(max(at, 0), self.width - 1)

    def blocks(self, points: Points, glyphs: _Glyphs, *, spikes: bool) -> str:
        """A character per bin: its highest value, so that no spike is lost, or else its last; "!" where not finite.

        A bin without a value shows the one before it.
        """
        values = _positive(points)
        low, high = (math.log(min(values)), math.log(max(values))) if values else (0.0, 0.0)
        bins: list[float | None] = [None] * self.width
        for step, value in points:
            value = math.inf if math.isnan(value) else value
            before = bins[at := self.bin(step)]
            bins[at] = max(before, value) if spikes and before is not None else value
        line = ""
        for shown in bins:
            line += (line[-1:] or " ") if shown is None else _block(shown, low, high, glyphs)
        return line

    def marks(self, log: RunLog, glyphs: _Glyphs) -> Text | None:
        """Where catapults peaked and where the network collapsed."""
        line = Text(" " * self.width)
        for step in catapult_peaks(log):
            line = self._with(line, step, glyphs.catapult, "green")
        for record in log.events:
            if record["event"] == "collapse":
                line = self._with(line, record["step"], glyphs.collapse, "red")
        return line if line.plain.strip() else None

    def _with(self, line: Text, step: int, glyph: str, style: str) -> Text:
        at = self.bin(step)
        return Text.assemble(line[:at], (glyph, style), line[at + 1 :])


def _block(value: float, low: float, high: float, glyphs: _Glyphs) -> str:
    if value == math.inf:
        return "!"
    height = (math.log(value) - low) / (high - low) if value > 0 and high > low else 0.0
    return glyphs.blocks[min(int(height * len(glyphs.blocks)), len(glyphs.blocks) - 1)]


def catapult_peaks(log: RunLog) -> list[int]:
    """The step at which each counted catapult peaked (or, where the log does not say, recovered)."""
    peaks, peak = [], None
    for record in log.events:
        if record["event"] in ("catapult_started", "catapult_peaked"):
            peak = record["step"]
        elif record["event"] == "catapult_recovered":
            peaks.append(record["step"] if peak is None else peak)
            peak = None
    return peaks
