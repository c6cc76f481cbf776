"""The results that the repository keeps."""

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

from .artefact import Artefact, Cause, Record, Setting, Verdict
from .runner import judged, without_curves
from .store import Results, ResultsError

__all__ = ["Recorded", "as_text", "read", "read_one", "record"]


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
        try:
            return judged(self.artefact, self.setting, self.records)
        except KeyError as missing:
            raise ResultsError(f"{self.artefact.name}: recorded without {missing}; run and record it again") from None

    @property
    def cause(self) -> Cause:
        """Why the verdict is not "holds": what the artefact declares, else its size, if that is not the thesis'."""
        if self.verdict.outcome == "holds":
            return ""
        full = self.artefact.scales["full"]
        keys = {*full, *self.setting} - {"seeds"}
        whole = all(as_text(self.setting.get(key)) == as_text(full.get(key)) for key in keys)
        return self.artefact.cause or ("does not reproduce" if whole else "size")


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
        found.append(read_one(path, artefacts))
    return found


def read_one(path: Path, artefacts: Sequence[Artefact]) -> Recorded:
    """One file of recorded results.

    Raises:
        ResultsError: it cannot be read, or is of no artefact that there is.
    """
    content = _load(path)
    artefact = next((a for a in artefacts if a.name == content.get("artefact")), None)
    try:
        if artefact is None:
            raise KeyError(f"no artefact is called {content.get('artefact')!r}")
        kept = (content[key] for key in ("scale", "setting", "records", "seconds", "made_with"))
        return Recorded(artefact, *kept)
    except KeyError as error:
        raise ResultsError(f"{path}: is not a file of recorded results ({error.args[0]})") from None


def as_text(value: Any) -> str:
    """A setting's value in one line."""
    return "none" if value is None else json.dumps(encode(value)).replace('"', "")


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
    except FileNotFoundError:
        raise ResultsError(f"{path}: no such file") from None
    except (ValueError, AttributeError) as error:
        raise ResultsError(f"{path}: is damaged ({error}); run the artefact again") from None
    return content
