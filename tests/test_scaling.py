"""Promise: the counts in docs/scaling.md are what benchmarks/scaling.py prints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_tables_of_the_document() -> None:
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / "scaling.py")]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True).stdout
    rows = [line.strip() for line in shown.splitlines() if line.startswith("|")]
    document = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8").splitlines()
    assert len(rows) > 20
    assert [row for row in document if row.startswith("|")] == rows
