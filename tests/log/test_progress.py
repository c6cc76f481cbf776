"""Promise: where there is no terminal, a line tells at intervals how far it has come."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from catapult_opt.progress import BarsOrLines


def run(file: io.StringIO, seconds: float, *, terminal: bool = False) -> None:
    console = Console(file=file, force_terminal=terminal, width=60)
    with BarsOrLines(seconds=seconds, console=console) as progress:
        first, second = progress.add_task("batch [5]", total=4), progress.add_task("batch 10", start=False, total=4)
        progress.advance(first)
        until = time.monotonic() + 10
        while terminal is False and "25 %" not in file.getvalue() and time.monotonic() < until and seconds < 1:
            time.sleep(0.01)
        progress.update(first, completed=4)
        progress.start_task(second)


def test_lines_in_a_pipe() -> None:
    file = io.StringIO()
    run(file, 0.02)
    first = file.getvalue().splitlines()[0]
    assert first == "0 of 2 done; batch [5] 25 % after 0:00"  # no markup, one line however long


@pytest.mark.parametrize("terminal", [True, False])
def test_no_line_in_a_terminal_or_before_its_time(terminal: bool) -> None:
    file = io.StringIO()
    run(file, 0.02 if terminal else 60.0, terminal=terminal)
    assert "of 2 done" not in file.getvalue()
