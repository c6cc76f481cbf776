"""Text from logs made harmless: for a terminal, a picture, a spreadsheet. A log may be anybody's."""

from __future__ import annotations

import contextlib
import sys
from typing import Final

_LONGEST: Final = 200  # characters of a name that are shown
_FORMULAS: Final = (*"=+-@", "\uff1d", "\uff0b", "\uff0d", "\uff20")  # some spreadsheets take the wide forms as well


def clean(text: str) -> str:
    """``text`` without control characters, line ends and marks that turn the direction of writing: each becomes "?".

    Example:
        >>> clean("run\\x1b[31m\\n")
        'run?[31m?'
    """
    return "".join(char if char.isprintable() else "?" for char in text)


def name(text: str) -> str:
    """A name as it is shown: clean, not empty, and no longer than a line or two."""
    shown = clean(text[: _LONGEST + 1])
    return (shown if len(shown) <= _LONGEST else shown[:_LONGEST] + "...") or "?"


def cell(text: str) -> str:
    """A text as a cell of a spreadsheet, where one that begins with = + - or @ would be a formula.

    Example:
        >>> cell("=1+1"), cell("batch_5")
        ("'=1+1", 'batch_5')
    """
    shown = clean(text)
    return "'" + shown if shown.lstrip().startswith(_FORMULAS) else shown


def tell(kind: str, message: str) -> None:
    """Print an error or a warning of the command line on standard error, if there is one."""
    with contextlib.suppress(OSError):  # full or closed: there is nowhere left to tell it
        print(f"catapult-opt: {kind}: {clean(message)}", file=sys.stderr, flush=True)
