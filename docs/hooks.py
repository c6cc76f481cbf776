"""What the pages take from the code when they are built: the package's modules, the help texts of the command line."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
from pathlib import Path
from typing import Any

from catapult_opt.cli import main

_ROOT = Path(__file__).parent.parent
_SOURCES = _ROOT / "build" / "docs"  # where mkdocs.yml has the API read from


def on_startup(**_: Any) -> None:
    """Lay the package out as it is installed: the folder analysis/ is shipped as catapult_opt.analysis."""
    shutil.rmtree(_SOURCES, ignore_errors=True)
    for folder, place in (("catapult_opt", "catapult_opt"), ("analysis", "catapult_opt/analysis")):
        shutil.copytree(_ROOT / folder, _SOURCES / place, ignore=shutil.ignore_patterns("results", "__pycache__"))


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the help text in place of lines such as `<!-- help: report -->` and `<!-- help -->`."""
    return re.sub(r"<!-- help(?:: *([\w-]+))? -->", lambda found: _help(found[1]), markdown)


def _help(command: str | None) -> str:
    os.environ["COLUMNS"] = "100"
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main([*([command] if command else []), "--help"])
    return f"```text\n{text.getvalue().rstrip()}\n```"
