"""Promise: the command line ends as its help says, whatever becomes of its output: no traceback, exit status 2 for what
could not be written, 0 for a reader that has seen enough, 130 after Ctrl-C.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from catapult_opt.cli import main
from catapult_opt.runlog import RunLogWriter

pytestmark = pytest.mark.skipif(os.name == "nt", reason="shells of Unix")
COMMAND = f"{sys.executable} -m catapult_opt"
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "run.jsonl"
    with RunLogWriter(path) as writer:
        writer.start({"name": "demo"})
        for t in range(1, 9):
            writer.step({"step": t, "loss": 1 / t, "effective_lr": 0.1})
    return path


def shell(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", line.replace("catapult-opt", COMMAND)], capture_output=True, text=True, timeout=120, cwd=folder
    )


@pytest.mark.parametrize("form", ["report run.jsonl", "report run.jsonl --json", "plot run.jsonl"])
def test_full_output_is_told_and_exit_status_2(form: str, log: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this platform")
    done = shell(f"catapult-opt {form} > /dev/full", log.parent)
    assert done.returncode == 2
    assert done.stderr == "catapult-opt: error: standard output: No space left on device\n"


def test_closed_output_is_told_and_exit_status_2(log: Path) -> None:
    done = shell("catapult-opt report run.jsonl >&-", log.parent)
    assert (done.returncode, done.stderr) == (2, "catapult-opt: error: standard output is closed\n")


@pytest.mark.parametrize("errors", ["2>&-", "2>/dev/full"])
def test_errors_that_cannot_be_told_do_not_end_up_in_the_output(errors: str, log: Path) -> None:
    done = shell(f"catapult-opt report run.jsonl missing.jsonl --json {errors}", log.parent)
    assert done.returncode == 2
    assert len(json.loads(done.stdout)) == 1
    assert shell(f"catapult-opt report run.jsonl >&- {errors}", log.parent).returncode == 2


@pytest.mark.parametrize("form", ["report run.jsonl", "report run.jsonl --csv", "--help", "plot run.jsonl -o -"])
def test_a_reader_that_leaves_at_once_is_no_error(form: str, log: Path) -> None:
    if "plot" in form:
        pytest.importorskip("matplotlib")
    done = shell(f"catapult-opt {form} | true; echo ${{PIPESTATUS[0]}}", log.parent)
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_ctrl_c_while_a_factory_runs(tmp_path: Path) -> None:
    """The user's own code may take minutes. What it has to close is closed."""
    (tmp_path / "slow.py").write_text(
        "import time\ndef setup():\n    try:\n        open('begun', 'w').close(); time.sleep(60)\n"
        "    finally:\n        open('closed', 'w').close()\n"
    )
    process = subprocess.Popen(
        [*COMMAND.split(), "critical-lr", "slow:setup"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    for _ in range(600):
        if (tmp_path / "begun").exists():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert (process.returncode, said) == (130, b"")
    assert (tmp_path / "closed").exists()


# ----------------------------------------------------------------------------------------------------------- pictures


@pytest.fixture
def here(log: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(log.parent)
    return log.parent


PNG = b"\x89PNG"


@pytest.mark.parametrize(
    ("output", "written"), [("a", "a.png"), ("b.PNG", "b.PNG"), ("new/c", "new/c.png"), ("v1.svg", "v1.svg")]
)
def test_the_picture_is_where_it_is_said_to_be(output: str, written: str, here: Path, capsys: Captured) -> None:
    assert main(["plot", "run.jsonl", "-o", output]) == 0
    assert capsys.readouterr().out == f"{written}\n"
    assert (here / written).read_bytes().startswith(b"<?xml" if written.endswith("svg") else PNG)


@pytest.mark.parametrize("output", ["-", "/dev/stdout"])
@pytest.mark.parametrize("to", ["| cat", "> picture; cat picture"])
def test_a_picture_on_standard_output_is_a_picture_and_nothing_else(output: str, to: str, here: Path) -> None:
    line = f"{COMMAND} plot run.jsonl -o {output} {to}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, timeout=120, cwd=here)
    assert done.stdout.startswith(PNG) and done.stdout.endswith(b"IEND\xaeB`\x82")
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_picture_is_not_written_into_a_terminal(
    here: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert main(["plot", "run.jsonl", "-o", "-"]) == 2
    out = capsys.readouterr()
    assert out.out == "" and "a picture is nothing for a terminal" in out.err


@pytest.mark.parametrize(
    ("output", "why"),
    [
        ("", "no name of a file"),
        ("folder", "is a folder"),
        (".", "is a folder"),
        ("run.jsonl", "one of the run logs"),
        ("link.png", "one of the run logs"),
        ("x.colour", "colour"),
        ("run.jsonl/x.png", "run.jsonl is no folder"),
        ("pipe", "No such device or address"),
        ("/dev/full", "No space left on device"),
        ("n" * 300 + ".png", "File name too long"),
    ],
)
def test_what_cannot_be_written_is_one_line_and_nothing_is_lost(
    output: str, why: str, here: Path, capsys: Captured
) -> None:
    (here / "folder").mkdir()
    (here / "link.png").symlink_to("run.jsonl")
    os.mkfifo(here / "pipe")  # which nobody reads
    before = (here / "run.jsonl").read_bytes()
    assert main(["plot", "run.jsonl", "-o", output]) == 2
    out = capsys.readouterr()
    assert out.out == "" and len(out.err.splitlines()) == 1
    assert "cannot be written" in out.err and why in out.err
    assert (here / "run.jsonl").read_bytes() == before


def test_a_picture_that_fails_leaves_the_one_before(
    here: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    def fail(*_: object, **__: object) -> None:
        raise ValueError("no font")

    (here / "run.png").write_text("the one before")
    monkeypatch.setattr(Figure, "savefig", fail)
    assert main(["plot", "run.jsonl"]) == 2
    assert "no font" in capsys.readouterr().err
    assert (here / "run.png").read_text() == "the one before"
