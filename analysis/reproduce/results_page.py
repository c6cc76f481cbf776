"""RESULTS.md, written from the recorded results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .artefact import Artefact
from .recorded import Recorded, as_text
from .runner import command

__all__ = ["markdown"]

_CHAPTERS = {
    "Chapter 2 and Appendix A, transition to linearity": ("2", "a"),
    "Chapter 3 and Appendix B, quadratic models": ("3", "b"),
    "Chapter 4 and Appendix C, catapults and features": ("4", "c", "rates"),
}
_HEADINGS = {
    "holds": "stand",
    "holds in part": "stand in part",
    "fails": "do not come out",
    "undecided": "could not be decided here",
}
_CAUSES = (
    "Why a verdict is not *holds*: **setting**: the thesis does not print what it would take, or prints numbers that "
    "exclude each other; **size**: the run here is smaller than the thesis'; **verdict**: the rule asks more than the "
    "claim; **does not reproduce**: run in the thesis' setting and size, and it did not come out."
)


def markdown(recorded: Sequence[Recorded], artefacts: Sequence[Artefact]) -> str:
    """A summary by chapter, a line for each artefact, and then the details of each."""
    done = {one.artefact.name for one in recorded}
    missing = [artefact.name for artefact in artefacts if artefact.name not in done]
    parts = [
        "# Results",
        "Every artefact of the thesis that was run here. Written by `catapult-opt reproduce --results` from the files "
        "in `results/`; not edited by hand. Ours are mean \u00b1 standard deviation over seeds, on CPU.",
        *(_summary(title, [one for one in recorded if _chapter(one) in keys]) for title, keys in _CHAPTERS.items()),
        *(["Declared, but without recorded results: " + ", ".join(missing) + "."] if missing else []),
        _CAUSES,
        "| artefact | what it shows | verdict | why not |\n| --- | --- | --- | --- |\n"
        + "\n".join(map(_row, recorded)),
        *map(_details, recorded),
    ]
    return "\n\n".join(parts) + "\n"


def _chapter(one: Recorded) -> str:
    return one.artefact.name.partition("-")[2].split(".")[0]


def _summary(title: str, recorded: Sequence[Recorded]) -> str:
    lines = [f"**{title}.**"]
    for outcome, words in _HEADINGS.items():
        found = [one for one in recorded if one.verdict.outcome == outcome]
        names = ", ".join(_link(one) + (f" ({one.cause})" if one.cause else "") for one in found)
        lines += [f"{len(found)} {words}: {names}."] if found else []
    return "\n".join(lines)


def _link(one: Recorded) -> str:
    return f"[{one.artefact.name}](#{one.artefact.name.replace('.', '')})"


def _row(one: Recorded) -> str:
    cells = [_link(one), one.artefact.title, f"**{one.verdict.outcome}**", one.cause]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _differences(name: str, ours: Any, full: Any) -> Iterator[str]:
    """What departs from the thesis, each as deep in the setting as it lies."""
    if as_text(ours) == as_text(full):
        return
    if isinstance(ours, Mapping) and isinstance(full, Mapping):
        for key in dict.fromkeys([*ours, *full]):
            yield from _differences(f"{name} {key}".strip(), ours.get(key), full.get(key))
    elif isinstance(ours, list) and all(isinstance(one, Mapping) and "label" in one for one in [*ours, *full]):
        known = {one["label"]: one for one in full}
        for one in ours:
            yield from _differences(one["label"], one, known.get(one["label"]))
    else:
        yield f"{name} {as_text(ours)} (thesis: {as_text(full)})"


def _details(one: Recorded) -> str:
    artefact, verdict, full = one.artefact, one.verdict, one.artefact.scales["full"]
    differs = [*_differences("", one.setting, full)]
    made = one.made_with
    rows = {
        "Claim": artefact.claim,
        "Thesis": artefact.printed or "no number printed",
        "Ours": verdict.measured,
        "Verdict": f"**{verdict.outcome}**" + (f" ({one.cause})" if one.cause else "") + f". {verdict.why}".rstrip(". ")
        + ".",
        "Setting": ("; ".join(differs) if differs else "the thesis'") + ".",
        "Run": f"`{command(artefact, one.scale, one.setting['seeds'])}`, {one.seconds:.0f} s on one CPU thread, torch "
        f"{made.get('torch')}, catapult_opt {made.get('catapult_opt')}{'; ' + made['note'] if 'note' in made else ''}.",
    }  # fmt: skip
    items = "\n".join(f"- {key}: {text}" for key, text in rows.items())
    return f"## {artefact.name}\n\n{artefact.title} ({artefact.source}).\n\n{items}"
