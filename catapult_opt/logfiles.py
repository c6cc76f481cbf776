"""Finding and reading the run logs that the command line was given: one bad file hides no other."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .runlog_format import FORMAT, RunLogError
from .runlog_reader import RunLog, open_regular, read_log
from .summary import natural


@dataclass
class Found:
    """What came of reading logs.

    Attributes:
        logs: those that could be read.
        errors: what could not be read, and why, one line each.
        warnings: what is missing from the logs that could be read, one line each.
        unread: logs left out because there were enough.
    """

    logs: list[RunLog] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    unread: int = 0


def read_all(paths: Sequence[Path], most: int | None = None) -> Found:
    """Read the logs meant by ``paths``, the first ``most`` of those that can be read."""
    files, errors = find(paths)
    found = Found(errors=errors)
    for number, file in enumerate(files):
        if len(found.logs) == most:
            found.unread = len(files) - number
            break
        try:
            log = read_log(file)
        except RunLogError as error:
            found.errors.append(str(error))
            continue
        found.logs.append(log)
        found.warnings += [f"{file}: dropped {sentence}" for sentence in first_few(log.dropped)]
    return found


def find(paths: Iterable[Path]) -> tuple[list[Path], list[str]]:
    """The run logs meant by ``paths``, each once and in order, and what is wrong with the paths."""
    found: dict[str, Path] = {}
    problems: list[str] = []
    for path in paths:
        if os.path.isdir(path):
            before = len(problems)
            files = sorted(_search(path, problems), key=lambda file: natural(str(file)))
            if not files and len(problems) == before:
                problems.append(f"{path}: no run logs (*.jsonl) in this folder")
        else:
            files = [path]
        for file in files:
            found.setdefault(os.path.realpath(file), file)
    return list(found.values()), problems


def _search(folder: Path, problems: list[str]) -> Iterator[Path]:
    def closed(error: OSError) -> None:
        problems.append(f"{error.filename}: cannot be read ({error.strerror})")

    for root, _, names in os.walk(folder, onerror=closed):
        yield from (path for name in names if name.endswith(".jsonl") and _looks_like_a_log(path := Path(root, name)))


def _looks_like_a_log(path: Path) -> bool:
    """Whether a file found in a folder is meant to be a run log; a folder may hold other .jsonl files too."""
    try:
        with open_regular(path) as file:
            start = file.read(4096)
    except (OSError, RunLogError):
        return True  # let the reader say why
    return not start or FORMAT.encode() in start


def first_few(sentences: Sequence[str], count: int = 3) -> list[str]:
    """The first few sentences, and how many there are beyond them."""
    rest = len(sentences) - count
    return [*sentences[:count]] + ([f"{rest} more"] if rest > 0 else [])
