"""What an artefact of the thesis (a figure or a table) is: settings, independent cases, a verdict, a panel."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..datasets import Data

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "SCALES",
    "Artefact",
    "Case",
    "Cause",
    "Data",
    "Outcome",
    "Record",
    "Result",
    "Setting",
    "Statements",
    "Verdict",
    "graded",
    "mean_sd",
    "on_panels",
    "verdict_on",
]

Setting = Mapping[str, Any]  # plain JSON values; "seeds" is the number of repetitions
Case = dict[str, Any]  # plain JSON values, with "seed"
Result = dict[str, Any]  # plain JSON values; what stands under "curves" is for the panel only
Record = dict[str, Any]  # {"case": Case, "result": Result, "seconds": float}
Outcome = Literal["holds", "holds in part", "fails", "undecided"]
Cause = Literal["", "setting", "size", "verdict", "does not reproduce"]

SCALES = ("quick", "recorded", "full")


@dataclass(frozen=True)
class Verdict:
    """Whether the thesis' statement came out."""

    outcome: Outcome
    measured: str  # ours: mean and spread over the seeds
    why: str = ""  # what is missing, or how the setting departs from the thesis'


@dataclass(frozen=True)
class Artefact:
    """A figure or table of the thesis as one declaration; `runner.reproduce` does the rest.

    ``cases`` splits a setting into independent pieces of work, ``run`` does one of them. A case's result depends on the
    setting, the case and the data sets alone (the runner seeds torch's global generator with ``case["seed"]`` before
    it), so that neither the order of the cases nor an interruption matters. ``setting["seeds"]`` says how many
    repetitions ``cases`` makes and nothing else may depend on it: seeds can be added to results that are there.

    Long lists belong under ``result["curves"]``: they are kept beside the panel, but ``judge`` does not get them and
    they are not in the recorded results, from which it can therefore be judged again.

    Raises:
        ValueError: the name is not in the form typed on the command line, or a scale is missing.
    """

    name: str  # as typed on the command line: "fig-2.2", "table-4.2", "fig-c.10"
    title: str
    source: str  # "Figure 2.2 and Appendix A.1"
    claim: str  # what the thesis states, in one sentence
    printed: str  # the numbers that the thesis prints, "" if none
    scales: Mapping[str, Setting]  # "full": the thesis'; "recorded": what fits two CPU cores; "quick": seconds
    cases: Callable[[Setting], list[Case]]
    run: Callable[[Setting, Case, Data], Result]
    judge: Callable[[Setting, list[Record]], Verdict]
    draw: Callable[[list[Record], Figure], None]
    cause: Cause = ""  # why a verdict is not "holds", where it is known; else the size, or it does not reproduce
    shares: str = ""  # an artefact with the same scales and run: both keep their results in its folder

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z]+-[0-9a-z]+(\.[0-9]+)*[a-z]?", self.name):
            raise ValueError(f"name must look like fig-2.2, table-4.2, fig-c.10 or fig-4.8c, got {self.name!r}")
        if set(self.scales) != set(SCALES):
            raise ValueError(f"{self.name}: scales must be {', '.join(SCALES)}, got {', '.join(self.scales)}")
        for scale, setting in self.scales.items():
            if not isinstance(setting.get("seeds"), int) or setting["seeds"] < 1:
                raise ValueError(f"{self.name}: the {scale} setting needs seeds of at least 1")


def mean_sd(values: Iterable[float], digits: int = 2) -> str:
    """Mean and standard deviation over the seeds, as a verdict states them; of the finite values, where some are not.

    >>> mean_sd([1.0, 3.0]), mean_sd([2.0]), mean_sd([1.0, math.inf])
    ('2.00 ± 1.41', '2.00', '1.00 (1 of 2 not finite)')
    """
    every = list(values)
    finite = [value for value in every if math.isfinite(value)]
    missing = "" if len(finite) == len(every) else f" ({len(every) - len(finite)} of {len(every)} not finite)"
    if not finite:
        return "none" + missing
    spread = f" ± {np.std(finite, ddof=1):.{digits}f}" if len(finite) > 1 else ""
    return f"{np.mean(finite):.{digits}f}{spread}{missing}"


def graded(passed: Sequence[bool], measured: str, failures: Sequence[str], note: str = "") -> Verdict:
    """holds if all passed, in part if at least half, else fails."""
    why = " ".join([*dict.fromkeys(failures), note]).strip()
    if all(passed):
        return Verdict("holds", measured, why)
    return Verdict("holds in part" if sum(passed) * 2 >= len(passed) else "fails", measured, why)


def verdict_on(shown: Mapping[str, bool], measured: str) -> Verdict:
    """holds if every statement is shown, in part if any, else fails."""
    missing = [f"not: {what}" for what, yes in shown.items() if not yes]
    outcome: Outcome = "holds" if not missing else "fails" if len(missing) == len(shown) else "holds in part"
    return Verdict(outcome, measured, "; ".join(missing))


Statements = Mapping[str, Sequence[bool | None]]  # a statement: whether it is true of every run; None: undecided there


def on_panels(panels: Mapping[str, Statements], measured: str, note: str = "") -> Verdict:
    """Every panel by its own runs, then the figure, so that one network does not decide another.

    A panel holds if every statement is true of all the runs that decide it, in part if of at least half of them, and
    fails otherwise; it is undecided if a statement is decided by no run and the others are true. The figure holds if
    all panels do, fails if all that are decided do, and is undecided if none is decided.
    """
    outcomes: list[Outcome] = []
    why = []
    for label, statements in panels.items():
        shares: dict[str, float] = {}
        for text, found in statements.items():
            decided = [flag for flag in found if flag is not None]
            shares[text] = sum(decided) / len(decided) if decided else math.nan
            if decided and not all(decided):
                why.append(f"{label}: not in {len(decided) - sum(decided)} of {len(decided)} runs: {text}.")
            elif not decided:
                why.append(f"{label}: undecided: {text}.")
        known = [value for value in shares.values() if not math.isnan(value)]
        if any(value < 0.5 for value in known):
            outcomes.append("fails")
        elif any(value < 1 for value in known):
            outcomes.append("holds in part")
        else:
            outcomes.append("holds" if len(known) == len(shares) else "undecided")
    decided_ones = {outcome for outcome in outcomes if outcome != "undecided"}
    figure: Outcome = "holds in part"
    if not decided_ones:
        figure = "undecided"
    elif len(set(outcomes)) == 1 or decided_ones == {"fails"}:
        figure = decided_ones.pop()
    by_panel = ", ".join(f"{label} {outcome}" for label, outcome in zip(panels, outcomes, strict=True))
    parts = [*([f"By panel: {by_panel}."] if len(panels) > 1 else []), *why, note]
    return Verdict(figure, measured, " ".join(parts).strip())
