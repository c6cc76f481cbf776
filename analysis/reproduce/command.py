"""``catapult-opt reproduce``: loaded by the command line only when it is asked for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from ..datasets import Data, DataError
from . import ARTEFACTS, recorded
from .artefact import Artefact
from .compare import comparison
from .results_page import markdown
from .runner import Reproduction, UnknownArtefact, find, reproduce
from .store import ResultsError

__all__ = ["run"]

_STYLES = {"holds": "green", "holds in part": "yellow", "fails": "red", "undecided": "cyan"}


def run(options: argparse.Namespace, console: Console, errors: Console) -> int:
    """Exit status: 0; 1 if a verdict is "fails"; 2 if something could not be run."""
    try:
        if options.list:
            console.print(_listed(ARTEFACTS, options.into / "results"))
            return 0
        if options.compare is not None:
            for table in comparison(*(recorded.read_one(path, ARTEFACTS) for path in options.compare)):
                console.print(table)
            return 0
        if options.results is not None:
            return _record(options.results, options.into, errors)
        if not options.names:
            raise UnknownArtefact("name an artefact, or `all`; `catapult-opt reproduce --list` names them")
        chosen = ARTEFACTS if options.names == ["all"] else [find(name, ARTEFACTS) for name in options.names]
        return _reproduce(chosen, options, console, errors)
    except (UnknownArtefact, ResultsError, DataError, OSError) as error:
        errors.print(f"catapult-opt: error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        errors.print("\nStopped. The same command goes on with the cases that are missing.")
        return 130


def _reproduce(chosen: Sequence[Artefact], options: argparse.Namespace, console: Console, errors: Console) -> int:
    scale = "quick" if options.quick else "full" if options.full else "recorded"
    out = options.out or Path("runs", "reproduce" if scale == "recorded" else f"reproduce-{scale}")
    if scale == "quick":
        errors.print("--quick: scaled down to seconds; the numbers are not the thesis'", style="yellow")
    status = 0
    for artefact in chosen:
        done = reproduce(
            artefact, out, scale=scale, seeds=options.seeds, data=Data(options.data, options.download), console=errors
        )
        console.print(_verdict(done))
        console.print(f"Wrote {out / artefact.name}", markup=False, highlight=False, soft_wrap=True)
        status = max(status, int(done.verdict.outcome == "fails"))
    return status


def _verdict(done: Reproduction) -> Table:
    verdict = done.verdict
    table = Table(title=f"{done.artefact.name}: {done.artefact.title}", title_justify="left", box=box.SIMPLE_HEAD,
                  show_header=False, pad_edge=False)  # fmt: skip
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    rows = {
        "claim": done.artefact.claim,
        "thesis": done.artefact.printed or "no number printed",
        "ours": verdict.measured,
        "verdict": f"[{_STYLES[verdict.outcome]}]{verdict.outcome}[/]",
        "because": verdict.why,
        "source": done.artefact.source,
    }
    for name, text in rows.items():
        if text:
            table.add_row(name, text if name == "verdict" else text.replace("[", r"\["))
    return table


def _listed(artefacts: Sequence[Artefact], folder: Path) -> Table:
    """With the verdicts of the recorded results, where they lie in ``folder``: in the repository."""
    verdicts = {one.artefact.name: one.verdict.outcome for one in recorded.read(folder, artefacts)}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("name", no_wrap=True, style="bold")
    for column in ("what it shows", "source", *(["recorded verdict"] if verdicts else [])):
        table.add_column(column, overflow="fold")
    for artefact in artefacts:
        cells = [artefact.title.replace("[", r"\["), artefact.source.replace("[", r"\[")]
        outcome = verdicts.get(artefact.name)
        table.add_row(artefact.name, *cells, *([f"[{_STYLES[outcome]}]{outcome}[/]"] if outcome else []))
    return table


def _record(out: str, into: Path, errors: Console) -> int:
    """Record ``out`` (nothing new if empty) and write RESULTS.md anew."""
    if not into.is_dir():
        raise ResultsError(f"{into}: no such folder; run it at the top of the repository, or name --into")
    problems = recorded.record(Path(out), into / "results", ARTEFACTS) if out else []
    for sentence in problems:
        errors.print(f"not recorded: {sentence}", style="yellow", markup=False, soft_wrap=True)
    text = markdown(recorded.read(into / "results", ARTEFACTS), ARTEFACTS)
    (into / "RESULTS.md").write_text(text, encoding="utf-8")
    errors.print(f"Wrote {into / 'RESULTS.md'}", markup=False, highlight=False, soft_wrap=True)
    return 0
