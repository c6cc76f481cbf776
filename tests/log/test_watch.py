"""Promise: ``report --watch`` goes on whatever becomes of the logs, with or without a terminal, until it is ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from catapult_opt import commands
from catapult_opt.cli import main
from catapult_opt.runlog import RunLogWriter

ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE", "NO_COLOR")}


def write(path: Path, steps: int) -> None:
    path.unlink(missing_ok=True)
    with RunLogWriter(path) as writer:
        writer.start({})
        for t in range(1, steps + 1):
            writer.step({"step": t, "loss": 1 / t, "effective_lr": 0.1})


Look = Callable[[], list[tuple[str, int]]]


@pytest.fixture
def look(tmp_path: Path) -> Look:
    """One look at the folder as the watch takes it: what cannot be read, and the runs with their number of steps."""
    cache = commands._Cache()

    def once() -> list[tuple[str, int]]:
        errors, runs = cache.read_all([tmp_path])
        return [(error, -1) for error in errors] + [(summary.name, summary.steps) for summary, _ in runs]

    return once


def test_logs_may_come_go_grow_and_shrink(look: Look, tmp_path: Path) -> None:
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    assert look() == [(f"{tmp_path}: no run logs (*.jsonl) in this folder", -1)]
    write(a, 3)
    assert look() == [("a", 3)]
    write(b, 2)
    with open(a, "ab") as file:
        file.write(b'{"kind":"step","step":4,"loss":1.0,"effective_lr":1.0}\n{"kind":"st')
    assert look() == [("a", 4), ("b", 2)]
    os.truncate(a, a.stat().st_size // 2)
    assert look()[0][0] == "a" and look()[0][1] < 3
    a.unlink()
    assert look() == [("b", 2)]
    os.truncate(b, 0)
    assert look() == [(f"{b}: is empty", -1)]
    b.unlink()
    if hasattr(os, "mkfifo"):
        os.mkfifo(b)
        assert look() == [(f"{b}: is a pipe, not a run log", -1)]


def test_a_log_that_has_not_changed_is_not_read_again(
    look: Look, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    original = commands.read_log
    monkeypatch.setattr(commands, "read_log", lambda path: read.append(path.name) or original(path))
    write(tmp_path / "a.jsonl", 3)
    write(tmp_path / "b.jsonl", 3)
    assert look() == look() == [("a", 3), ("b", 3)]
    with open(tmp_path / "b.jsonl", "ab") as file:
        file.write(b'{"kind":"step","step":4,"loss":1.0,"effective_lr":1.0}\n')
    assert look() == [("a", 3), ("b", 4)]
    assert read == ["a.jsonl", "b.jsonl", "b.jsonl"]


def _as_from_a_shell() -> None:
    """Tests that run in the background may have these signals ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def watching(folder: Path, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "catapult_opt", "report", str(folder), "--watch", "0.1"]
    return subprocess.Popen(
        command,
        text=True,
        env=ENVIRONMENT,
        preexec_fn=_as_from_a_shell,
        **options,  # type: ignore[call-overload]
    )


@pytest.mark.skipif(os.name == "nt", reason="signals of Unix")
@pytest.mark.parametrize(("name", "status"), [("SIGINT", 0), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_without_a_terminal_each_change_is_printed_at_once(name: str, status: int, tmp_path: Path) -> None:
    """`report --watch > file` and in a pipe: nothing at all was printed before the end."""
    write(tmp_path / "a.jsonl", 3)
    process = watching(tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    guard = threading.Timer(60, process.kill)
    guard.start()
    assert process.stdout is not None and process.stderr is not None
    seen = ""
    for steps in (3, 4):
        while f"{steps} steps" not in seen:
            seen += process.stdout.readline()
        write(tmp_path / "a.jsonl", steps + 1)
    process.send_signal(getattr(signal, name))
    rest = process.communicate()[0]
    guard.cancel()
    assert (process.returncode, process.stderr.closed) == (status, True)
    assert seen.count("3 steps") == 1  # it is not printed again while it stays the same
    assert "\x1b" not in seen + rest


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 0), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_the_terminal_gets_its_cursor_back(name: str, status: int, tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")
    write(tmp_path / "a.jsonl", 3)
    parent, child = pty.openpty()
    process = watching(tmp_path, stdin=child, stdout=child, stderr=child)
    os.close(child)
    guard = threading.Timer(60, process.kill)
    guard.start()
    output, sent = b"", False
    while chunk := _chunk(parent):
        output += chunk
        if not sent and b"3 steps" in output:
            process.send_signal(getattr(signal, name))
            sent = True
    guard.cancel()
    os.close(parent)
    assert process.wait() == status
    assert b"Traceback" not in output
    assert output.rindex(b"\x1b[?25h") > output.rindex(b"\x1b[?25l")  # shown after it was hidden


def _chunk(parent: int) -> bytes:
    try:
        return os.read(parent, 65536)
    except OSError:  # Linux, once the other end is closed
        return b""


def test_reading_large_logs_takes_half_the_time_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look that takes 3 seconds is followed by 3 seconds of rest, not by the 2 that were asked for."""
    now, slept = [0.0], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            raise KeyboardInterrupt

    def show() -> None:
        now[0] += (3.0, 0.5)[len(slept)]

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        commands._every(2.0, show)
    assert slept == [3.0, 2.0]


def test_what_the_watch_shows_is_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a.jsonl", 3)
    commands._Text([tmp_path], None, commands.Screen(), commands._Cache()).show()
    watched = capsys.readouterr().out.split("\n", 1)[1].rstrip("\n")
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.rstrip("\n") == watched


@pytest.mark.skipif(os.name == "nt", reason="signals of Unix")
def test_handlers_of_signals_are_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def end(*_: object) -> None:
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
        raise KeyboardInterrupt

    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    monkeypatch.setattr(commands, "_every", end)
    assert main(["report", str(tmp_path), "--watch"]) == 0
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before
