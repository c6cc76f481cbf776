"""Two files of recorded results of one artefact beside each other: ``reproduce --compare A.json B.json``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from numbers import Real
from typing import Any

from rich import box
from rich.table import Table

from .artefact import mean_sd
from .recorded import Recorded, as_text
from .store import ResultsError

__all__ = ["comparison"]


def comparison(a: Recorded, b: Recorded) -> Iterator[Table]:
    """What differs: verdicts and settings, then the means of all results over the seeds, case by case.

    Raises:
        ResultsError: they are of different artefacts.
    """
    if a.artefact is not b.artefact:
        raise ResultsError(f"cannot compare {a.artefact.name} with {b.artefact.name}: name two files of one artefact")
    overview = _table(f"{a.artefact.name}: {a.artefact.title}", "")
    overview.add_row("verdict", a.verdict.outcome, b.verdict.outcome)
    for key in sorted({*a.setting, *b.setting}):
        values = [as_text(one.setting.get(key)) for one in (a, b)]
        if values[0] != values[1]:
            overview.add_row(_plain(key), *map(_plain, values))
    yield overview
    numbers = _table("means over the seeds, where they differ", "case and result")
    left, right = _numbers(a), _numbers(b)
    for key in dict.fromkeys([*left, *right]):
        means = [mean_sd(side[key], 3) if key in side else "not there" for side in (left, right)]
        if means[0] != means[1]:
            numbers.add_row(_plain(key), *means)
    yield numbers


def _numbers(one: Recorded) -> dict[str, list[float]]:
    """Every number of the results by its case without the seed, a value a seed."""
    found: dict[str, list[float]] = {}
    for record in one.records:
        case = " ".join(_word(value) for key, value in record["case"].items() if key != "seed")
        for key, value in record["result"].items():
            if isinstance(value, Real):
                found.setdefault(f"{case} {key}".strip(), []).append(float(value))
    return found


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _table(title: str, first: str) -> Table:
    table = Table(title=_plain(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in (first, "A", "B"):
        table.add_column(name, overflow="fold")
    return table


def _plain(text: str) -> str:
    return text.replace("[", r"\\[")
