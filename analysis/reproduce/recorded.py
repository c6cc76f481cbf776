"""The results that the repository keeps, and RESULTS.md written from them."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from catapult_opt import __version__
from catapult_opt.runlog import decode, encode

from .artefact import Artefact, Record, Setting, Verdict
from .runner import command, judged, without_curves
from .store import Results, ResultsError

__all__ = ["Recorded", "markdown", "read", "record"]


@dataclass(frozen=True)
class Recorded:
    """One artefact's recorded results, without curves."""

    artefact: Artefact
    scale: str
    setting: Setting
    records: list[Record]
    seconds: float  # of all cases together
    made_with: dict[str, Any]

    @property
    def verdict(self) -> Verdict:
        return judged(self.artefact, self.setting, self.records)


def record(out: Path, folder: Path, artefacts: Sequence[Artefact]) -> list[str]:
    """Copy what was run in ``out`` into ``folder/NAME.json``; a sentence on each artefact that was not taken.

    Taken is an artefact whose verdict was written and whose cases are all there, in the recorded or full scale.

    Raises:
        ResultsError: results in ``out`` are damaged or of another setting than their verdict says.
    """
    problems = []
    folder.mkdir(parents=True, exist_ok=True)
    for artefact in artefacts:
        verdict = out / artefact.name / "verdict.json"
        if not verdict.exists():
            continue
        content = _load(verdict)
        scale, setting = content["scale"], content["setting"]
        results = Results(out / (artefact.shares or artefact.name) / "results.jsonl", artefact, setting)
        cases = artefact.cases(setting)
        records = [without_curves(found) for case in cases if (found := results.get(case)) is not None]
        if scale == "quick":
            problems.append(f"{artefact.name}: was run with --quick, whose numbers are not recorded")
        elif len(records) < len(cases):
            problems.append(f"{artefact.name}: {len(records)} of {len(cases)} cases are done; run it to the end first")
        else:
            _save(folder / f"{artefact.name}.json", artefact, scale, setting, records)
    return problems


def read(folder: Path, artefacts: Sequence[Artefact]) -> list[Recorded]:
    """All recorded results in ``folder``, in the order of the artefacts.

    Raises:
        ResultsError: a file is damaged.
    """
    found = []
    for artefact in artefacts:
        path = folder / f"{artefact.name}.json"
        if not path.exists():
            continue
        content = _load(path)
        found.append(
            Recorded(
                artefact, content["scale"], content["setting"], content["records"], content["seconds"],
                content["made_with"],
            )
        )  # fmt: skip
    return found


def markdown(recorded: Sequence[Recorded], artefacts: Sequence[Artefact]) -> str:
    """RESULTS.md: a row per recorded artefact, how each setting departs from the thesis', and what was not run."""
    counts = dict.fromkeys(("holds", "holds in part", "fails"), 0)
    rows, notes = [], []
    for one in recorded:
        verdict = one.verdict
        counts[verdict.outcome] += 1
        name = one.artefact.name
        cells = [
            f"[{name}](#{name.replace('.', '')})", one.artefact.claim, one.artefact.printed or "none printed",
            verdict.measured, f"**{verdict.outcome}**", f"`{command(one.artefact, one.scale, one.setting['seeds'])}`",
        ]  # fmt: skip
        rows.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
        notes.append(_note(one, verdict))
    done = {one.artefact.name for one in recorded}
    missing = [artefact.name for artefact in artefacts if artefact.name not in done]
    parts = [
        "# Results",
        "Every artefact of the thesis that was run here, with what the thesis states and what came out. Written by "
        "`catapult-opt reproduce --results` from the files in `results/`; not edited by hand.",
        ", ".join(f"{count} {outcome}" for outcome, count in counts.items()) + f", of {len(recorded)} run.",
        "Ours are mean ± standard deviation over seeds, on CPU. Settings smaller than the thesis' say so below; "
        "`--full` runs the thesis' own.",
        "| artefact | claim | thesis | ours | verdict | command |\n| --- | --- | --- | --- | --- | --- |\n"
        + "\n".join(rows),
        *notes,
    ]
    if missing:
        parts.append("## Not run\n\nDeclared, but without recorded results: " + ", ".join(missing) + ".")
    return "\n\n".join(parts) + "\n"


def _note(one: Recorded, verdict: Verdict) -> str:
    full = one.artefact.scales["full"]
    differs = [
        f"{key} {_short(one.setting.get(key))} (thesis: {_short(full.get(key))})"
        for key in sorted({*one.setting, *full})
        if _short(one.setting.get(key)) != _short(full.get(key))
    ]
    lines = [
        f"## {one.artefact.name}",
        f"{one.artefact.title} ({one.artefact.source}).",
        "Setting: " + ("; ".join(differs) if differs else "the thesis'") + ".",
    ]
    if verdict.why:
        lines.append(verdict.why)
    made = one.made_with
    lines.append(
        f"{one.seconds:.0f} s on one CPU thread, torch {made.get('torch')}, catapult_opt {made.get('catapult_opt')}."
    )
    return "\n\n".join(lines)


def _save(path: Path, artefact: Artefact, scale: str, setting: Setting, records: list[Record]) -> None:
    content = {
        "artefact": artefact.name,
        "scale": scale,
        "setting": setting,
        "seconds": round(sum(one["seconds"] for one in records), 1),
        "made_with": {"catapult_opt": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "records": records,
    }
    path.write_text(json.dumps(encode(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _load(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = decode(json.loads(path.read_text(encoding="utf-8")))
        if not isinstance(content.get("setting"), dict):
            raise ValueError("no setting in it")
    except (ValueError, AttributeError) as error:
        raise ResultsError(f"{path}: is damaged ({error}); run the artefact again") from None
    return content


def _short(value: Any) -> str:
    return "none" if value is None else json.dumps(encode(value)).replace('"', "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
