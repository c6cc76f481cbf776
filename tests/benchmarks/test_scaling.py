"""Promise: the counts in docs/scaling.md are what benchmarks/scaling.py prints, and what is worked out from them.

Not the simulation, which every change of the policy's constants moves.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_tables_of_the_document() -> None:
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / "scaling.py")]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True).stdout
    document = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert len(rows(shown)) > 20 and rows(document) == rows(shown)


def rows(text: str) -> list[str]:
    lines = [line.strip() for line in text.splitlines() if line.startswith("|")]
    return lines[: next(i for i, line in enumerate(lines) if line.startswith("| loss "))]
