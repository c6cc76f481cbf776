"""Run artefacts: the missing cases only, then the verdict and the panel."""

from __future__ import annotations

import difflib
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from catapult_opt.runlog import encode

from .artefact import Artefact, Case, Data, Record, Setting, Verdict
from .store import Results

__all__ = [
    "Reproduction",
    "UnknownArtefact",
    "command",
    "find",
    "judged",
    "reproduce",
    "setting_of",
    "without_curves",
]


class UnknownArtefact(LookupError):
    """No artefact of that name; says which was perhaps meant."""


@dataclass(frozen=True)
class Reproduction:
    """What came out of one artefact."""

    artefact: Artefact
    scale: str
    setting: Setting
    records: list[Record]  # in the order of the cases
    verdict: Verdict
    picture: Path | None  # None without matplotlib


def find(name: str, artefacts: Sequence[Artefact]) -> Artefact:
    """The artefact called ``name``; "Figure 4.9" and "Fig 4.9" are understood as fig-4.9.

    Raises:
        UnknownArtefact: there is none.
    """
    known = {artefact.name: artefact for artefact in artefacts}
    typed = re.sub(r"[\s_.-]*(?=\d|[a-c]\.)", "-", re.sub(r"^fig(ure)?\.?", "fig", name.strip().lower()), count=1)
    if typed in known:
        return known[typed]
    close = difflib.get_close_matches(typed, known, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(close)}?" if close else ";"
    raise UnknownArtefact(f"no artefact is called {name!r}{hint} `catapult-opt reproduce --list` names them all")


def setting_of(artefact: Artefact, scale: str, seeds: int | None = None) -> Setting:
    """The setting of a scale, with another number of seeds if given."""
    setting = dict(artefact.scales[scale])
    return setting if seeds is None else {**setting, "seeds": seeds}


def command(artefact: Artefact, scale: str, seeds: int | None = None) -> str:
    """What to type for this run."""
    flags = ["" if scale == "recorded" else f" --{scale}"]
    if seeds is not None and seeds != artefact.scales[scale]["seeds"]:
        flags.append(f" --seeds {seeds}")
    return f"catapult-opt reproduce {artefact.name}{''.join(flags)}"


def reproduce(
    artefact: Artefact,
    out: Path,
    *,
    scale: str = "recorded",
    seeds: int | None = None,
    data: Data | None = None,
    console: Console | None = None,
) -> Reproduction:
    """Run the cases that ``out`` does not hold yet, judge, draw, and leave all of it in ``out/NAME``.

    Writes ``results.jsonl`` (a line per case, as soon as it is done), ``verdict.json`` and ``NAME.png``. An artefact
    that shares another's results reads and adds to ``results.jsonl`` there.

    Args:
        artefact: what to run.
        out: folder of all artefacts in this scale.
        scale: "quick", "recorded" or "full".
        seeds: repetitions, in place of the scale's own number.
        data: where data sets are.
        console: where progress goes; standard error without one.

    Raises:
        ResultsError: ``out`` holds results of another setting.
        analysis.datasets.DataError: a data set is missing or damaged. The cases done so far are kept.
    """
    console = console or Console(stderr=True)
    setting = setting_of(artefact, scale, seeds)
    results = Results(out / (artefact.shares or artefact.name) / "results.jsonl", artefact, setting)
    for sentence in results.dropped:
        console.print(f"{results.path}: {sentence}, its case is run again", style="yellow", markup=False)
    cases = artefact.cases(setting)
    missing = [case for case in cases if results.get(case) is None]
    _run(artefact, setting, missing, len(cases), results, data or Data(), console)
    records = [record for case in cases if (record := results.get(case)) is not None]
    verdict = judged(artefact, setting, records)
    folder = out / artefact.name
    _write_verdict(folder / "verdict.json", artefact, scale, setting, verdict)
    picture = _draw(artefact, records, folder / f"{artefact.name}.png", console)
    return Reproduction(artefact, scale, setting, records, verdict, picture)


def judged(artefact: Artefact, setting: Setting, records: list[Record]) -> Verdict:
    """The verdict on records, whose curves do not take part: recorded results, which lack them, are judged alike."""
    return artefact.judge(setting, [without_curves(record) for record in records])


def without_curves(record: Record) -> Record:
    result = {key: value for key, value in record["result"].items() if key != "curves"}
    return {**record, "result": result}


def _run(
    artefact: Artefact,
    setting: Setting,
    missing: list[Case],
    total: int,
    results: Results,
    data: Data,
    console: Console,
) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(artefact.name, total=total, completed=total - len(missing))
        for case in missing:
            progress.update(bar, description=f"{artefact.name}  {_described(case)}")
            start = time.perf_counter()
            torch.manual_seed(int(case.get("seed", 0)))  # the order of the cases must not matter
            result = artefact.run(setting, case, data)
            results.add({"case": case, "result": result, "seconds": round(time.perf_counter() - start, 2)})
            progress.advance(bar)
        progress.update(bar, description=artefact.name)


def _described(case: Mapping[str, Any]) -> str:
    return " ".join(f"{key} {value}" for key, value in case.items())


def _write_verdict(path: Path, artefact: Artefact, scale: str, setting: Setting, verdict: Verdict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "artefact": artefact.name,
        "claim": artefact.claim,
        "printed": artefact.printed,
        "scale": scale,
        "setting": setting,
        "outcome": verdict.outcome,
        "measured": verdict.measured,
        "why": verdict.why,
        "command": command(artefact, scale, setting["seeds"]),
    }
    path.write_text(json.dumps(encode(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def _draw(artefact: Artefact, records: list[Record], path: Path, console: Console) -> Path | None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        console.print("No picture: it needs matplotlib, pip install 'catapult_opt[plot]'", style="yellow", markup=False)
        return None
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    artefact.draw(records, figure)
    figure.savefig(path, dpi=130)
    return path
