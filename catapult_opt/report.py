"""How the figures of runs are shown: a table, its notes, and a sparkline per run (:func:`render`).

The figures themselves, sorting and exports are in `summary`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from .runlog import RunLog
from .sparklines import Glyphs, catapult_peaks, glyphs_for, number, sparklines
from .summary import SORT_KEYS, RunSummary, higher_is_better, natural, sort_runs, summarize, to_csv, to_json

__all__ = [
    "SORT_KEYS",
    "RunSummary",
    "catapult_peaks",
    "layout",
    "natural",
    "render",
    "sort_runs",
    "summarize",
    "to_csv",
    "to_json",
]


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


def layout(
    summaries: Sequence[RunSummary], logs: Sequence[RunLog], console: Console, *, sort: str | None = None
) -> RenderableType:
    """The report as one rich renderable, laid out for the console."""
    runs = sort_runs(zip(summaries, logs, strict=True), sort)
    if not runs:
        return Text("no runs")
    glyphs, rows = glyphs_for(console), [summary for summary, _ in runs]
    width = console.width if console.is_terminal else None
    tables = _tables(rows, glyphs, console, width)
    width = width or max(_PIPE_WIDTH, *(_natural_width(table, console) for table in tables))
    notes = Text("\n".join(["", *_notes(rows, glyphs)]), style="dim")
    return Group(*tables, notes, *[sparklines(summary, log, glyphs, width) for summary, log in runs])


def _tables(rows: Sequence[RunSummary], glyphs: Glyphs, console: Console, width: int | None) -> list[RenderableType]:
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
        table.add_column(Text(column.header), justify="left" if left else "right", no_wrap=not left, overflow="fold")
    for row in zip(*[zip(column.cells, column.styles, strict=True) for column in columns], strict=True):
        table.add_row(*[_cell(cell, style, compact) for cell, style in row])
    return table


def _cell(cell: Cell, style: str, compact: bool) -> Text:
    main, rest = cell
    return Text.assemble((main, style), "\n" if compact else " ", (rest, "dim")) if rest else Text(main, style)


def _columns(rows: Sequence[RunSummary], glyphs: Glyphs, *, compact: bool) -> list[Column]:
    columns: list[Column] = []

    def add(header: str, cells: Iterable[Cell | str], styles: Sequence[str] = ()) -> None:
        pairs = [cell if isinstance(cell, tuple) else (cell, "") for cell in cells]
        if any(main for main, _ in pairs):
            header = header if compact else header.replace("-\n", "").replace("\n", " ")
            columns.append(Column(header, pairs, list(styles) or [""] * len(pairs)))

    add("run", [glyphs.name(row.name) for row in rows], ["bold"] * len(rows))
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
    add(test.replace("_", "\n", 1) if compact else test, [number(row.test_value) for row in rows])
    add("AGOP", [number(row.agop) + ("" if _agop_at_best(row) else glyphs.dagger) for row in rows])
    return columns


def _count(value: int | None, known: object = True) -> str:
    return _shortened(str(value), 15) if value is not None and known else ""


def _match_cell(row: RunSummary, compact: bool) -> Cell:
    if row.match_rate is None:
        return "", ""
    return f"{row.match_rate:.1%}" + "*" * (
        row.match_loss == "batch_loss"
    ), f"{'/' if compact else 'of '}{row.match_rises}"


def _lambda_cell(row: RunSummary, glyphs: Glyphs) -> Cell:
    return (number(row.lambda_start), f"{glyphs.arrow} {number(row.lambda_end)}") if row.lambda_start else ("", "")


def _best_cell(row: RunSummary) -> Cell:
    return (number(row.best_value), f"@ {row.best_step}") if row.best_metric else ("", "")


def _best_styles(rows: Sequence[RunSummary]) -> list[str]:
    """Bold green for the best run, where there are several and they share a metric."""
    values = [row.best_value for row in rows if row.best_value is not None]
    metrics = {row.best_metric for row in rows} - {None}
    if len(values) < 2 or len(metrics) != 1:
        return [""] * len(rows)
    best = (max if higher_is_better(str(*metrics)) else min)(values)
    return ["bold green" if row.best_value == best else "" for row in rows]


def _agop_at_best(row: RunSummary) -> bool:
    return row.agop is None or row.agop_step == row.best_step


def _common(names: Iterable[str | None], otherwise: str, glyphs: Glyphs) -> str:
    known = {name for name in names if name is not None}
    return _shortened(glyphs.name(known.pop()), 40) if len(known) == 1 else otherwise


def _shortened(text: str, room: int) -> str:
    """The text, cut where it would leave no room in the table for the names of the runs."""
    return text if len(text) <= room else text[: room - 3] + "..."


def _notes(rows: Sequence[RunSummary], glyphs: Glyphs) -> Iterator[str]:
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
