"""Shows the doctests of docstrings as code, wherever in a docstring they stand."""

from __future__ import annotations

import re
from typing import Any

import griffe

# From a prompt to the next empty line.
_DOCTEST = re.compile(r"^([ \t]*)>>> .*(?:\n(?!\s*$).*)*", re.MULTILINE)


class Fenced(griffe.Extension):
    """Puts fences around them."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _DOCTEST.sub(r"\1```pycon\n\g<0>\n\1```", obj.docstring.value)
