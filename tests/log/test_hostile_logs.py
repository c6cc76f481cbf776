"""Promise: one bad file hides no other, hangs no shell, writes nothing into a terminal, is no formula in a spreadsheet.

Every case runs ``report`` on a folder with a sound log beside the hostile one: that is reported, the other one named.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from catapult_opt import runlog_format
from catapult_opt.cli import main
from catapult_opt.plain import clean
from catapult_opt.runlog import RunLogError, read_log

HEADER = {"kind": "header", "format": "catapult_opt-run", "version": 1, "name": "sound", "face": "CatapultSGD"}
STEP = {"kind": "step", "loss": 0.5, "effective_lr": 0.1, "eta_crit": 0.2, "lambda_max": 10.0, "super_critical": False}
Captured = pytest.CaptureFixture[str]

unix = pytest.mark.skipif(os.name == "nt", reason="no such files on Windows")


def write(path: Path, *more: object, **header: object) -> Path:
    records = [{**HEADER, **header}, *[{**STEP, "step": t} for t in (1, 2, 3)], *more]
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n")
    return path


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "runs"
    folder.mkdir()
    write(folder / "sound.jsonl")
    yield folder
    for root, folders, _ in os.walk(folder):
        for name in folders:
            os.chmod(Path(root, name), 0o700)


# ---------------------------------------------------------------------------------------------------- what is no file


def bind(path: Path) -> None:
    before = os.getcwd()
    os.chdir(path.parent)  # the address of a socket may not be long
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(path.name)
    os.chdir(before)


SPECIAL: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (lambda path: os.mkfifo(path), "is a pipe, not a run log"),
    "link to a pipe": (lambda path: (os.mkfifo(path.with_suffix("")), path.symlink_to(path.with_suffix(""))), "a pipe"),
    "socket": (bind, "is a socket, not a run log"),
    "endless device": (lambda path: path.symlink_to("/dev/zero"), "is a device, not a run log"),
    "terminal": (lambda path: path.symlink_to("/dev/tty"), "is a device, not a run log"),
    "null": (lambda path: path.symlink_to("/dev/null"), "is a device, not a run log"),
    "link to itself": (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
    "link to nothing": (lambda path: path.symlink_to("nowhere"), "no such file"),
    "empty": (lambda path: path.touch(), "is empty"),
}


@unix
@pytest.mark.parametrize("kind", list(SPECIAL))
@pytest.mark.parametrize("named", [True, False], ids=["named", "in the folder"])
def test_what_is_no_log_is_named_and_the_others_are_reported(
    kind: str, named: bool, runs: Path, capsys: Captured
) -> None:
    make, why = SPECIAL[kind]
    make(runs / "odd.jsonl")
    assert main(["report", *([str(runs / "odd.jsonl")] if named else []), str(runs), "--json"]) == 2
    out = capsys.readouterr()
    assert [run["name"] for run in json.loads(out.out)] == ["sound"]
    assert len(out.err.splitlines()) == 1 and f"{runs / 'odd.jsonl'}: " in out.err and why in out.err
    with pytest.raises(RunLogError, match=why):
        read_log(runs / "odd.jsonl")


@unix
def test_folders_that_lead_back_or_are_called_like_logs_do_no_harm(runs: Path, capsys: Captured) -> None:
    (runs / "again").symlink_to(runs)
    (runs / "dir.jsonl").mkdir()
    assert main(["report", str(runs), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 1


AS_NOBODY = """
import os, sys
from catapult_opt import cli, commands
if os.geteuid() == 0:  # who may read everything
    os.setgid(65534); os.setuid(65534)
sys.exit(cli.main(sys.argv[1:]))
"""


def as_nobody(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", AS_NOBODY, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder)


@unix
def test_folders_and_files_that_may_not_be_read_are_named() -> None:
    folder = Path(tempfile.mkdtemp())  # pytest's own may not be entered by others
    try:
        folder.chmod(0o755)
        write(folder / "sound.jsonl")
        write(folder / "closed.jsonl").chmod(0)
        for name in ("locked", "within/locked"):
            (folder / name).mkdir(parents=True)
            (folder / name).chmod(0)
        done = as_nobody("report", ".", "locked", "locked/deeper/run.jsonl", "--json", folder=folder)
        assert [run["name"] for run in json.loads(done.stdout)] == ["sound"]
        said = done.stderr.splitlines()
        assert done.returncode == 2
        for name in ("closed.jsonl", "./locked", "within/locked", "locked/deeper/run.jsonl"):
            assert any(name in line and "Permission denied" in line for line in said), (name, said)
    finally:
        for name in ("locked", "within/locked"):
            (folder / name).chmod(0o700)
        shutil.rmtree(folder)


# ------------------------------------------------------------------------------------------------------- what is text

NAMES = {
    "escape sequence": "\x1b]0;owned\x07\x1b[31mred\x1b[0m",
    "8-bit escape": "\x9b31mred",
    "markup": "[bold red]x[/bold red]",
    "closing markup": "val_acc[/]",
    "link": "[link=http://example.org]y[/link]",
    "index": "val_loss[0]",
    "line ends": "a\nb\rc\u2028d",
    "writing turned round": "\u202egpj.exe\u202c",
    "half a character": "\ud800",
    "no width": "a\u200bb",
    "formula": "=cmd|'/c calc'!A1",
    "plus": "+1+1",
    "minus": "-1",
    "at": "@SUM(1)",
    "tab before a formula": "\t=1",
    "space before a formula": " =1",
    "wide formula": "\uff1d1",
    "endless": "x" * 100_000,
    "mathematics": "$x^{$ ${\\rm x}",
    "empty": "",
}
MOVES_THE_CURSOR = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def harmless(text: str) -> bool:
    """Oracle: no control character but line ends, no mark that turns the direction of writing."""
    return not MOVES_THE_CURSOR.search(text)


@pytest.mark.parametrize("kind", list(NAMES))
@pytest.mark.parametrize("place", ["run", "metric", "event", "face", "key", "value"])
def test_names_are_plain_text_everywhere(kind: str, place: str, runs: Path, capsys: Captured) -> None:
    name = NAMES[kind]
    header = {"name": {"run": name}.get(place, "odd"), "face": {"face": name}.get(place, "CatapultSGD")}
    metric = "val_" + name if place == "metric" else "val_loss"
    more = [
        {"kind": "metrics", "step": 2, "values": {metric: 0.5, metric.replace("val", "test", 1): 0.25}},
        {"kind": "event", "step": 2, "event": name if place == "event" else "collapse", "peak": name},
        {**STEP, "step": 4, (name or "x" if place == "key" else "phase"): name if place in ("key", "value") else "arm"},
    ]
    write(runs / "odd.jsonl", *more, **header)
    outputs = []
    for form in ([], ["--csv"], ["--json"]):
        assert main(["report", str(runs), *form]) == 0
        out = capsys.readouterr()
        assert harmless(out.out) and harmless(out.err)
        outputs.append(out.out)
    table, as_csv, as_json = outputs
    assert table.count("sound") >= 2  # its row and its sparkline
    for row in csv.reader(io.StringIO(as_csv)):
        for cell in row:
            assert not cell.lstrip().startswith(("=", "+", "-", "@", "\uff1d")) or re.fullmatch(r"[-+.\de]+", cell)
    if place == "run":  # JSON has it as it is, what a terminal shows has all that can be shown of it
        assert {run["name"] for run in json.loads(as_json)} == {"sound", name}
        assert clean(name)[:30] in table
    if place == "metric":
        assert clean(name)[:30] in table


@unix
def test_names_of_files_are_plain_text(runs: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    odd = runs / "\x1b[31mred\x07.jsonl"
    write(odd, "damaged", name=None)
    monkeypatch.chdir(runs)
    for arguments in (
        ["report", "."],
        ["report", ".", "--csv"],
        ["plot", odd.name],
        ["plot", odd.name, "-o", odd.name],
    ):
        main(arguments)
        out = capsys.readouterr()
        assert harmless(out.out) and harmless(out.err)
        assert "red" in out.out + out.err
    assert (runs / "\x1b[31mred\x07.png").exists()
    (runs / os.fsdecode(b"\xff\xfe.jsonl")).write_bytes((runs / "sound.jsonl").read_bytes())
    assert main(["report", "."]) == 0


def test_figures_in_csv_stay_figures(runs: Path, capsys: Captured) -> None:
    write(runs / "odd.jsonl", {"kind": "metrics", "step": 2, "values": {"val_loss": -1.5}})
    assert main(["report", str(runs / "odd.jsonl"), "--csv"]) == 0
    [row] = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert row["best_value"] == "-1.5" and row["name"] == "sound"


def test_endless_names_and_numbers_leave_room_for_the_others(
    runs: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a terminal of 80 columns: each part of the table says which run is which."""
    metrics = {"kind": "metrics", "step": 2, "values": {"val_" + "m" * 500: 0.5, "test_" + "x" * 500: 0.1}}
    write(runs / "odd.jsonl", metrics, name="n" * 500, batch_size=10**300)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(["report", str(runs)]) == 0
    lines = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= 80
    tables = sum(line.startswith("───") for line in lines)
    assert tables >= 1 and sum(line.startswith("sound") for line in lines) == tables + 1  # and its sparkline


@pytest.mark.parametrize("width", ["0", "1", "7", "20", "-3", "x", "99999"])
def test_terminals_of_any_width(width: str, runs: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    """COLUMNS=0 left the table empty."""
    monkeypatch.setenv("COLUMNS", width)
    for force in ("1", None):
        monkeypatch.setenv("FORCE_COLOR", force) if force else monkeypatch.delenv("FORCE_COLOR")
        assert main(["report", str(runs)]) == 0
        out = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
        assert "sound" in out if width not in ("1", "7") else "s" in out


def test_numbers_beyond_all_bounds(runs: Path, capsys: Captured) -> None:
    odd = [1e308, -1e308, 1e-320, 0, -1, 2**62, "NaN", "Infinity", "-Infinity"]
    steps = [
        {**STEP, "step": t, "loss": v, "eta_crit": v, "lambda_max": v, "probe_seconds": v} for t, v in enumerate(odd, 4)
    ]
    steps += [{**STEP, "step": 2**63 - 1, "age": 10**30, "matvecs": -(10**30)}, {**STEP, "step": 1, "elapsed": -1e308}]
    write(runs / "odd.jsonl", *steps, batch_size=10**300, parameters=-5, extra_bytes=10**18)
    for form in ([], ["--csv"], ["--json"]):
        assert main(["report", str(runs), *form]) == 0
        out = capsys.readouterr()
        assert "sound" in out.out and out.err == ""
    pytest.importorskip("matplotlib")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(["plot", str(runs), "-o", str(runs / "x.png")]) == 0


@pytest.mark.skipif(not os.path.exists("/proc/kmsg"), reason="no such files on this platform")
def test_files_of_the_system_that_are_called_regular_are_not_waited_for() -> None:
    with pytest.raises(RunLogError):  # reading it waits for the next message of the kernel
        read_log("/proc/kmsg")


def test_a_log_that_grows_faster_than_it_is_read_has_an_end(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line that is read makes another."""
    path = runs / "sound.jsonl"
    parse = runlog_format.parse

    def grow(data: bytes) -> object:
        with open(path, "ab") as file:
            file.write(b'{"kind":"event","step":4,"event":"x"}\n' * 3)
        return parse(data)

    monkeypatch.setattr(runlog_format, "parse", grow)
    assert len(read_log(path).steps) == 3


def test_a_metric_of_another_name_on_every_line_takes_no_square_of_the_time(runs: Path, capsys: Captured) -> None:
    """Half a minute at 20,000 lines where every name is sought in every line."""
    names = [(t, f"{kind}_{t}") for t in range(20_000) for kind in ("val", "test")]
    write(runs / "odd.jsonl", *[{"kind": "metrics", "step": t, "values": {name: 0.5}} for t, name in names])
    begun = time.process_time()
    assert main(["report", str(runs), "--json"]) == 0
    assert time.process_time() - begun < 15
    assert len(json.loads(capsys.readouterr().out)) == 2
