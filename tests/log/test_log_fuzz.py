"""Promise: a run log is untrusted input. Whatever bytes it holds, reading and reporting it ends in a log or in a
`RunLogError` of one line, runs nothing, sends no control character to the terminal, and takes bounded memory.
"""

from __future__ import annotations

import io
import json
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from catapult_opt.report import SORT_KEYS, render, sort_runs, summarize, to_csv, to_json
from catapult_opt.runlog import RunLog, RunLogError, RunLogWriter, read_log

HEADER = {"kind": "header", "format": "catapult_opt-run", "version": 1, "name": "demo", "settings": {"kappa": 2.0}}
STEP = {"kind": "step", "step": 1, "loss": 0.5, "effective_lr": 0.1}
MEASURED = {**STEP, "eta_crit": 0.2, "lambda_max": 10.0, "super_critical": True, "phase": "arm", "elapsed": 1.0}
EVENT = {"kind": "event", "step": 1, "event": "catapult_recovered", "peak": 3.0, "curvature_ratio": 0.5}
METRICS = {"kind": "metrics", "step": 1, "values": {"val_loss": 0.5, "test_loss": 0.6, "agop": 0.7}}
KINDS: list[dict[str, Any]] = [HEADER, STEP, MEASURED, EVENT, METRICS, {"kind": "resume", "step": 1}]

numbers = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([2**31, 2**53, 2**63 - 1, 2**63, 10**400, -(10**30)]),
    st.floats(),
    st.sampled_from(["NaN", "Infinity", "-Infinity"]),
)
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=8) | st.sampled_from(["\x1b[2J", "a\nb", "é" * 300]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def records(draw: st.DrawFn) -> dict[str, Any]:
    """A record of ours with some of its fields spoiled, left out or added."""
    record = dict(draw(st.sampled_from(KINDS)))
    if "step" in record:
        record["step"] = draw(st.integers(1, 50))
    for _ in range(draw(st.integers(0, 3))):
        record[draw(st.sampled_from([*record, "batch_size", "extra_bytes", "age", "probe_seconds", "x"]))] = draw(
            values
        )
    for key in draw(st.sets(st.sampled_from(list(record)), max_size=1)):
        del record[key]
    return record


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """Mostly a run log: lines of ours, spoiled ones, junk, cut anywhere, a byte changed."""
    lines = [json.dumps(draw(records() if draw(st.booleans()) else st.just(HEADER))).encode()]
    for _ in range(draw(st.integers(0, 12))):
        lines.append(draw(st.one_of(records().map(lambda r: json.dumps(r).encode()), st.binary(max_size=30))))
    data = b"\n".join(lines)
    for at, byte in draw(st.lists(st.tuples(st.integers(0, len(data)), st.binary(min_size=1, max_size=1)), max_size=2)):
        data = data[:at] + byte + data[at + 1 :]
    return data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data


def use(log: RunLog) -> str:
    """Everything that the command line makes of a log."""
    summary = summarize(log)
    console = Console(file=io.StringIO(), width=100)
    for sort in (None, *SORT_KEYS):
        sort_runs([(summary, log)], sort)
    render([summary, summary], [log, log], console)
    json.loads(to_json([summary]), parse_constant=_no_constant)
    to_csv([summary])
    printed: str = console.file.getvalue()  # type: ignore[attr-defined]
    return printed


def _no_constant(name: str) -> Any:
    raise AssertionError(f"{name} is not JSON")


def read_and_use(path: Path) -> RunLog | None:
    try:
        log = read_log(path)
    except RunLogError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017
        return None
    printed = use(log)
    assert all(char.isprintable() or char == "\n" for char in printed), "nothing of the log speaks to the terminal"
    return log


fuzz = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@settings(fuzz, max_examples=80)
@given(files())
def test_any_file_is_read_or_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "run.jsonl"
    path.write_bytes(data)
    read_and_use(path)


@pytest.mark.slow
@settings(fuzz, max_examples=10_000)
@given(files())
def test_any_of_ten_thousand_files_is_read_or_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "run.jsonl"
    path.write_bytes(data)
    read_and_use(path)


@settings(fuzz, max_examples=40)
@given(st.binary(max_size=400))
def test_random_bytes_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "run.jsonl"
    path.write_bytes(data)
    assert read_and_use(path) is None


@settings(fuzz, max_examples=50)
@given(st.lists(records(), max_size=8), st.integers(0, 20))
def test_a_writer_that_resumes_in_any_log_continues_or_refuses(
    tmp_path: Path, lines: list[dict[str, Any]], at: int
) -> None:
    """And what it then writes can be read."""
    path = tmp_path / "run.jsonl"
    path.write_bytes(b"\n".join(json.dumps(r).encode() for r in [HEADER, *lines]))
    with RunLogWriter(path) as writer:
        writer.start(HEADER, resumed_at=at)
        writer.step({"step": at + 1, "loss": 7.0, "effective_lr": 0.1})
    log = read_and_use(path)
    assert log is not None
    assert log.steps[-1]["loss"] == 7.0
    assert all(record["step"] <= at for record in log.steps[:-1])


DEEP = sys.getrecursionlimit() * 100
HUGE: dict[str, Callable[[Any], Any]] = {
    "a line": lambda file: file.seek(2**27, io.SEEK_CUR),  # of which nothing is on the disk
    "a number": lambda file: file.write(b'{"kind":"step","step":1,"loss":' + b"9" * 10**6),
    "nested lists": lambda file: file.write(b'{"kind":"step","step":1,"loss":1,"effective_lr":1,"x":' + b"[" * DEEP),
    "nested lists that end": lambda file: file.write(
        b'{"kind":"step","step":1,"loss":1,"effective_lr":1,"x":' + b"[" * DEEP + b"]" * DEEP + b"}"
    ),
    "nested objects in the header": lambda file: file.write(
        b'{"kind":"header","format":"catapult_opt-run","version":1,"settings":' + b'{"a":' * DEEP + b"1" + b"}" * DEEP
    ),
    "a text": lambda file: file.write(b'{"kind":"event","step":1,"event":"' + b"e" * (2**20 - 60) + b'"}'),
}


@pytest.mark.parametrize("what", list(HUGE))
@pytest.mark.parametrize("first", [True, False], ids=["as the header", "later"])
def test_huge_things_take_bounded_memory(what: str, first: bool, tmp_path: Path) -> None:
    take_bounded_memory(HUGE[what], first, tmp_path / "run.jsonl")


@pytest.mark.slow
def test_a_line_of_a_gigabyte_takes_bounded_memory(tmp_path: Path) -> None:
    take_bounded_memory(lambda file: file.seek(2**30, io.SEEK_CUR), False, tmp_path / "run.jsonl")


def take_bounded_memory(write: Callable[[Any], Any], first: bool, path: Path) -> None:
    with open(path, "wb") as file:
        if not first:
            file.write(json.dumps(HEADER).encode() + b"\n" + json.dumps(STEP).encode() + b"\n")
        write(file)
        file.write(b"\n" + json.dumps({**STEP, "step": 2}).encode() + b"\n")
    tracemalloc.start()
    try:
        log = read_and_use(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        path.unlink()
    assert peak < 40e6
    assert first or (log is not None and [s["step"] for s in log.steps] == [1, 2])


@pytest.mark.parametrize(
    "name", ["__class__", "__reduce__", "__import__('os').system('x')", "!!python/object:os.system"]
)
def test_nothing_in_a_log_is_run_or_looked_up(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of Python are text here. Oracle: Python's own audit of imports, code and processes."""
    path = tmp_path / "run.jsonl"
    spoiled = [{**HEADER, "name": name, "settings": {name: name}}, {**MEASURED, name: name}, {**EVENT, "event": name}]
    path.write_text("\n".join(json.dumps(record) for record in [*spoiled, {**METRICS, "values": {name: 1.0}}]))
    use(read_log(path))  # whatever is imported lazily is there now
    happened: list[str] = []
    listening = [True]
    forbidden = ("exec", "compile", "import", "os.system", "subprocess.Popen", "pickle.find_class")
    sys.addaudithook(lambda event, args: happened.append(event) if listening[0] and event in forbidden else None)
    use(read_log(path))
    listening[0] = False
    assert happened == []


@settings(fuzz, max_examples=60)
@given(
    st.lists(
        st.tuples(st.floats(), st.floats(), st.none() | st.floats(), st.booleans(), st.text(max_size=5)), max_size=12
    ),
    st.dictionaries(st.text(max_size=5), st.floats() | st.integers(-(2**62), 2**62), max_size=3),
)
def test_round_trip_of_any_run(
    tmp_path: Path, rows: list[tuple[float, float, float | None, bool, str]], metrics: dict[str, float]
) -> None:
    """What is written is what is read: steps, events and metrics, to the bit."""
    path = tmp_path / "run.jsonl"
    path.unlink(missing_ok=True)
    written = []
    with RunLogWriter(path) as writer:
        writer.start({"name": "demo", "settings": {"numbers": [row[0] for row in rows]}})
        for step, (loss, rate, eta, above, phase) in enumerate(rows, 1):
            record: dict[str, Any] = {"step": step, "loss": loss, "effective_lr": rate}
            if eta is not None:
                record |= {"eta_crit": eta, "lambda_max": 2.0, "super_critical": above, "phase": phase}
            writer.step(record)
            written.append({"kind": "step", **record})
            writer.event(step, "seen", loss=loss)
        writer.metrics(len(rows), metrics)
    log = read_and_use(path)
    assert log is not None
    assert log.dropped == []
    assert repr(log.steps) == repr(written)  # NaN equals NaN here, and -0.0 differs from 0.0
    assert repr([e["loss"] for e in log.events]) == repr([row[0] for row in rows])
    assert repr(log.metrics[0]["values"]) == repr({key: float(value) for key, value in metrics.items()})
