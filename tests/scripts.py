"""Run a script as a user runs it, but in this process, which has imported already what takes a new one seconds."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import sys
import warnings
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any
from unittest import mock

import pytest
import torch


def run_here(script: Path, *args: object) -> CompletedProcess[str]:
    """`python script *args`: what it prints and its exit status. Warnings go to its stderr, as in a process."""
    command, status = [str(script), *map(str, args)], None
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _as_if_alone(script, command):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            status = end.code
    assert status is None or isinstance(status, int)
    return CompletedProcess(command, status or 0, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _as_if_alone(script: Path, command: list[str]) -> Any:
    """Its own arguments and path; the environment, the random state and the warnings are as before afterwards."""
    with (
        pytest.MonkeyPatch.context() as patch,
        mock.patch.dict(os.environ),
        torch.random.fork_rng(devices=[]),
        warnings.catch_warnings(),
    ):
        patch.setattr(sys, "argv", command)
        patch.syspath_prepend(script.parent)
        warnings.resetwarnings()
        warnings.simplefilter("default")
        for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning):
            warnings.simplefilter("ignore", category)  # as the interpreter does
        patch.setattr(warnings, "showwarning", _to_stderr)
        yield


def _to_stderr(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))
