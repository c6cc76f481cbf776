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
    "Data",
    "Outcome",
    "Record",
    "Result",
    "Setting",
    "Verdict",
    "graded",
    "mean_sd",
    "verdict_on",
]

Setting = Mapping[str, Any]  # plain JSON values; "seeds" is the number of repetitions
Case = dict[str, Any]  # plain JSON values, with "seed"
Result = dict[str, Any]  # plain JSON values; what stands under "curves" is for the panel only
Record = dict[str, Any]  # {"case": Case, "result": Result, "seconds": float}
Outcome = Literal["holds", "holds in part", "fails"]

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
