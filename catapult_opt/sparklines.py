"""A run in three lines of characters: its loss and its lambda_max over the steps, and where its catapults peaked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from . import plain
from .runlog import RunLog
from .runlog_columns import Floats, Integers, Records
from .runlog_reader import columns_of
from .summary import RunSummary

__all__ = ["Glyphs", "catapult_peaks", "glyphs_for", "number", "plural", "sparklines"]

_MAX_WIDTH: Final = 120
_BESIDE: Final = 28  # the label before a sparkline and the range after it, at their longest


@dataclass(frozen=True)
class Glyphs:
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

    def name(self, text: str) -> str:
        """A name from a log as it is shown with these characters."""
        text = plain.name(text)
        return text.encode("ascii", "replace").decode() if self is _ASCII else text


_ASCII: Final = Glyphs("lambda", "lr", "critical lr", "->", "-", "-", "+", "_.-=+*#@", "^", "x")


def glyphs_for(console: Console) -> Glyphs:
    """The characters that the console's encoding can spell."""
    try:
        "".join(asdict(Glyphs()).values()).encode(console.encoding)
    except (UnicodeEncodeError, LookupError):
        return _ASCII
    return Glyphs()


def number(value: float | None) -> str:
    """Three significant digits, with an exponent as short as can be: 1.20e-5; "" for None."""
    if value is None:
        return ""
    mantissa, e, exponent = f"{value:#.3g}".partition("e")
    return mantissa + e + exponent[:1].strip("+") + exponent[1:].lstrip("0") if e else mantissa.removesuffix(".")


def plural(count: int, noun: str) -> str:
    """The noun with its number: 1 step, 2 steps."""
    return f"{count} {noun}{'s' * (count != 1)}"


def sparklines(summary: RunSummary, log: RunLog, glyphs: Glyphs, width: int) -> RenderableType:
    """Loss and lambda_max over the steps, on log scales, and below them where the catapults peaked."""
    title = Text.assemble(("\n" + glyphs.name(log.name), "bold"), ("  " + _details(summary, glyphs), "dim"))
    if not log.steps:
        return Group(title, Text("  no steps yet", "dim"))
    steps = columns_of(log.steps)
    measured = steps.having("eta_crit")
    at, loss, lam = steps.integers("step", 0), steps.numbers("loss"), measured.numbers("lambda_max")
    axis = _Axis(int(at[0]), int(at[-1]), min(width, _MAX_WIDTH) - _BESIDE)
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=6, justify="right", style="dim", no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True, style="dim")
    grid.add_row("loss", Text(axis.blocks(at, loss, glyphs, spikes=True), "cyan"), _range(loss, glyphs))
    if len(lam):
        line = axis.blocks(measured.integers("step", 0), lam, glyphs, spikes=False)
        grid.add_row(glyphs.lam, Text(line, "magenta"), _range(lam, glyphs))
    if marks := axis.marks(log, glyphs):
        grid.add_row("", marks, plural(summary.catapults, "catapult"))
    return Group(title, grid)


def _details(summary: RunSummary, glyphs: Glyphs) -> str:
    parts = [glyphs.name(summary.face)] if summary.face else []
    parts += [f"batch {summary.batch_size}"] if summary.batch_size is not None else []
    parts += [f"{summary.parameters:,} parameters"] if summary.parameters is not None else []
    parts += [f"{summary.steps:,} steps"]
    if summary.probe_share is not None:
        parts += [f"measuring {summary.probe_seconds:.2g} s, {summary.probe_share:.0%} of the time"]
    parts += [f"{summary.extra_bytes / 1e6:.2g} MB extra"] if summary.extra_bytes else []
    parts += [f"rates at most {plural(summary.oldest, 'step')} old"] if summary.oldest else []
    parts += [f"{plural(summary.failed_measurements, 'measurement')} failed"] if summary.failed_measurements else []
    return f" {glyphs.dot} ".join(parts)


def _positive(values: Floats) -> Floats:
    return values[(values > 0) & (values < math.inf)]


def _range(values: Floats, glyphs: Glyphs) -> str:
    positive = _positive(values)
    if not len(positive):
        return ""
    return f"{number(float(positive.min()))} {glyphs.dash} {number(float(positive.max()))}"


@dataclass(frozen=True)
class _Axis:
    """Steps ``first`` to ``last`` in at most ``room`` characters."""

    first: int
    last: int
    room: int

    @property
    def width(self) -> int:
        return max(1, min(self.room, self.last - self.first + 1))

    def bins(self, steps: Integers) -> npt.NDArray[np.int64]:
        """For each step the character that shows it."""
        span = max(1, self.last - self.first + 1)
        shift = max(0, span.bit_length() - 50)  # so that the product fits 64 bits
        at = (np.maximum(steps - self.first, 0) >> shift) * self.width // max(1, span >> shift)
        clipped: npt.NDArray[np.int64] = np.clip(at, 0, self.width - 1)
        return clipped

    def blocks(self, steps: Integers, values: Floats, glyphs: Glyphs, *, spikes: bool) -> str:
        """A character per bin: its highest value, so that no spike is lost, or else its last; "!" where not finite.

        A bin without a value shows the one before it.
        """
        positive = _positive(values)
        low, high = (math.log(positive.min()), math.log(positive.max())) if len(positive) else (0.0, 0.0)
        at, values = self.bins(steps), np.where(np.isnan(values), math.inf, values)
        shown = np.full(self.width, -math.inf)
        if spikes:
            np.maximum.at(shown, at, values)
        else:
            shown[at] = values  # the last one stays
        known = np.zeros(self.width, np.bool_)
        known[at] = True
        line = ""
        for value, is_known in zip(shown.tolist(), known.tolist(), strict=True):
            line += _block(value, low, high, glyphs) if is_known else (line[-1:] or " ")
        return line

    def marks(self, log: RunLog, glyphs: Glyphs) -> Text | None:
        """Where catapults peaked and where the network collapsed."""
        marks = dict.fromkeys(self.bins(np.array(catapult_peaks(log), np.int64)).tolist(), (glyphs.catapult, "green"))
        collapses = np.array(steps_of(log, "collapse"), np.int64)
        marks |= dict.fromkeys(self.bins(collapses).tolist(), (glyphs.collapse, "red"))
        return Text.assemble(*[marks.get(i, (" ", "")) for i in range(self.width)]) if marks else None


def _block(value: float, low: float, high: float, glyphs: Glyphs) -> str:
    if value == math.inf:
        return "!"
    height = (math.log(value) - low) / (high - low) if value > 0 and high > low else 0.0
    return glyphs.blocks[min(int(height * len(glyphs.blocks)), len(glyphs.blocks) - 1)]


def steps_of(log: RunLog, event: str) -> list[int]:
    """The steps of all events of a name."""
    return [step for step, name in _events(log) if name == event]


def catapult_peaks(log: RunLog) -> list[int]:
    """The step at which each counted catapult peaked (or, where the log does not say, recovered)."""
    peaks, peak = [], None
    for step, event in _events(log):
        if event in ("catapult_started", "catapult_peaked"):
            peak = step
        elif event == "catapult_recovered":
            peaks.append(step if peak is None else peak)
            peak = None
    return peaks


def _events(log: RunLog) -> Sequence[tuple[int, str]]:
    events: Records = columns_of(log.events)
    return list(zip(events.values("step"), events.values("event"), strict=True))
