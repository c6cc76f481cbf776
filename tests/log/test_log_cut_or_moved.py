"""Promise: whatever becomes of a log while it is written, the training goes on, one warning tells of it, and the report
says what is missing. A signal that ends the training leaves whole lines.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from catapult_opt import read_log
from catapult_opt.report import summarize
from catapult_opt.runlog import RunLogWarning, RunLogWriter

pytestmark = pytest.mark.skipif(os.name == "nt", reason="an open file cannot be moved on Windows")


def begun(path: Path, steps: int = 5) -> RunLogWriter:
    writer = RunLogWriter(path)
    writer.start({"name": "demo", "settings": {}})
    for t in range(1, steps + 1):
        writer.step({"step": t, "loss": 1 / t, "effective_lr": 0.1})
    return writer


def go_on(writer: RunLogWriter, match: str) -> None:
    """Steps 6 to 8, with one warning in all."""
    with pytest.warns(RunLogWarning, match=match):
        writer.step({"step": 6, "loss": 1 / 6, "effective_lr": 0.1})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        writer.step({"step": 7, "loss": 1 / 7, "effective_lr": 0.1})
        writer.step({"step": 8, "loss": 1 / 8, "effective_lr": 0.1})
        writer.close()


@pytest.mark.parametrize("kept", ["nothing", "half of the header", "the header", "two records", "two and a half"])
def test_log_cut_off_is_begun_anew_or_continued_and_says_what_is_lost(kept: str, tmp_path: Path) -> None:
    """As `logrotate` with copytruncate does, or a shell's `> run.jsonl`."""
    writer = begun(tmp_path / "run.jsonl")
    lines = writer.path.read_bytes().splitlines(keepends=True)
    left = {"nothing": 0, "half of the header": len(lines[0]) // 2, "the header": len(lines[0])}
    two = sum(map(len, lines[:3]))
    left |= {"two records": two, "two and a half": two + len(lines[3]) // 2}
    os.truncate(writer.path, left[kept])
    go_on(writer, r"run\.jsonl was cut off while it was written: \d+ bytes are lost")
    log = read_log(writer.path)
    assert log.column("step") == [1, 2, 6, 7, 8][0 if "two" in kept else 2 :]
    assert log.name == "demo"
    *cut, missing = summarize(log).dropped
    assert missing.startswith("records up to step 5")
    assert len(cut) == (kept == "two and a half")  # the record of which a part is left


def test_a_loss_is_told_after_the_run_was_resumed_before_it(tmp_path: Path) -> None:
    writer = begun(tmp_path / "run.jsonl")
    os.truncate(writer.path, 0)
    go_on(writer, "was cut off")
    with RunLogWriter(writer.path) as again:
        again.start({}, resumed_at=3)
        again.step({"step": 4, "loss": 0.25, "effective_lr": 0.1})
    log = read_log(writer.path)
    assert log.column("step") == [4]
    assert any(sentence.startswith("records up to step 5") for sentence in log.dropped)


def test_log_renamed_goes_on_in_the_same_file(tmp_path: Path) -> None:
    """As `logrotate` does without copytruncate."""
    writer = begun(tmp_path / "run.jsonl")
    writer.path.rename(tmp_path / "run.jsonl.1")
    go_on(writer, "was moved or replaced")
    assert read_log(tmp_path / "run.jsonl.1").column("step") == list(range(1, 9))
    assert not writer.path.exists()


def test_log_renamed_and_another_put_in_its_place(tmp_path: Path) -> None:
    writer = begun(tmp_path / "run.jsonl")
    writer.path.rename(tmp_path / "old.jsonl")
    writer.path.write_text("somebody else's")
    go_on(writer, "was moved or replaced")
    assert read_log(tmp_path / "old.jsonl").column("step") == list(range(1, 9))
    assert writer.path.read_text() == "somebody else's"


def test_log_replaced_by_another_file_is_given_up(tmp_path: Path) -> None:
    writer = begun(tmp_path / "run.jsonl")
    (tmp_path / "other").write_text("somebody else's")
    os.replace(tmp_path / "other", writer.path)
    go_on(writer, "was deleted")
    assert writer.failed
    assert writer.path.read_text() == "somebody else's"


def test_log_written_over_is_left_alone(tmp_path: Path) -> None:
    writer = begun(tmp_path / "run.jsonl")
    writer.path.write_text("somebody else's")  # the same file, with other content
    go_on(writer, "something else was written into the file")
    assert writer.path.read_text() == "somebody else's"


def test_a_training_may_change_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    writer = begun(Path("run.jsonl"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        writer.step({"step": 6, "loss": 1.0, "effective_lr": 0.1})
    assert read_log(tmp_path / "run.jsonl").column("step") == [1, 2, 3, 4, 5, 6]


def test_a_pipe_is_no_log_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "run.jsonl")
    with pytest.warns(RunLogWarning, match="it is a pipe, not a file"):
        RunLogWriter(tmp_path / "run.jsonl").start({})


WRITE = """
import sys
from catapult_opt.runlog import RunLogWriter
writer = RunLogWriter(sys.argv[1])
writer.start({})
for t in range(1, 10**9):
    writer.step({"step": t, "loss": 0.5, "effective_lr": 0.1, "phase": "x" * 5000})
    writer.event(t, "seen")
    print(t, flush=True)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_leaves_whole_lines(name: str, tmp_path: Path) -> None:
    """No handler of ours: every record is one write, so that a signal cuts off the one being written at most."""

    def as_from_a_shell() -> None:  # tests that run in the background may have them ignored
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    for times in (20, 57):
        path = tmp_path / f"{times}.jsonl"
        process = subprocess.Popen(
            [sys.executable, "-c", WRITE, path],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            preexec_fn=as_from_a_shell,
        )
        assert process.stdout is not None
        while int(process.stdout.readline()) < times:
            pass
        process.send_signal(getattr(signal, name))
        process.communicate(timeout=60)
        assert process.returncode in (-getattr(signal, name), 1, 130)
        log = read_log(path)
        assert len(log.dropped) <= 1 and all("truncated record" in sentence for sentence in log.dropped)
        assert path.read_bytes().endswith(b"\n")
        assert log.column("step") == list(range(1, len(log.steps) + 1)) and len(log.steps) >= times
