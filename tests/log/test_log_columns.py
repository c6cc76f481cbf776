"""Promise: a log read in columns is the same log: records, figures and what was dropped; in little memory.

Oracles: the records as they were written; the reader with its patterns switched off, which parses every line as JSON;
resumed runs taken one resume after the other.
"""

from __future__ import annotations

import json
import math
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from catapult_opt import RunLog, read_log, runlog_reader
from catapult_opt.report import summarize
from catapult_opt.runlog import RunLogWriter
from catapult_opt.runlog_columns import Records

HEADER = {"kind": "header", "format": "catapult_opt-run", "version": 1, "name": "demo"}
STEP = {"kind": "step", "step": 1, "loss": 0.5, "effective_lr": 0.1}
MEASURED = {"eta_crit": 0.2, "lambda_max": 10.0, "matvecs": 3, "super_critical": True, "phase": "arm"}


def write(path: Path, *records: dict[str, Any]) -> Path:
    lines = [json.dumps(record, separators=(",", ":")) for record in (HEADER, *records)]
    path.write_text("\n".join(lines) + "\n")
    return path


def mixed(count: int) -> list[dict[str, Any]]:
    return [{**STEP, "step": t, "loss": 1 / t, **(MEASURED if t % 3 == 0 else {})} for t in range(1, count + 1)]


# ------------------------------------------------------------------------------------------------ as a list of records


@pytest.mark.parametrize("count", [1, 7, 5000])  # less and more than are packed at once
def test_records_look_like_the_list_that_was_written(count: int, tmp_path: Path) -> None:
    written = mixed(count)
    steps = read_log(write(tmp_path / "run.jsonl", *written)).steps
    assert isinstance(steps, Records)
    assert len(steps) == count
    assert list(steps) == written
    assert repr(steps) == repr(written)
    assert steps[-1] == written[-1] and steps[1:4] == written[1:4] and steps[::-2] == written[::-2]
    assert steps == written and steps != written[:-1]
    assert steps + [STEP] == [*written, STEP] and [STEP] + steps == [STEP, *written]  # noqa: RUF005
    with pytest.raises(IndexError):
        steps[count]


def test_columns_and_arrays(tmp_path: Path) -> None:
    log = read_log(write(tmp_path / "run.jsonl", *mixed(6)))
    assert log.column("phase") == [None, None, "arm", None, None, "arm"]
    assert log.column("matvecs") == [None, None, 3, None, None, 3]
    assert all(type(value) is int for value in log.column("step"))
    np.testing.assert_array_equal(log.array("lambda_max"), [np.nan, np.nan, 10, np.nan, np.nan, 10])
    np.testing.assert_array_equal(log.array("loss"), [1 / t for t in range(1, 7)])
    assert np.isnan(log.array("nowhere")).all() and log.column("nowhere") == [None] * 6
    assert [record["step"] for record in log.measured] == [3, 6]


def test_a_log_put_together_by_hand_has_columns_too() -> None:
    log = RunLog(Path("x"), {"name": "x"}, mixed(4), [], [{"kind": "metrics", "step": 2, "values": {"val": 1.0}}])
    assert log.array("loss")[3] == 0.25 and log.metric("val") == {2: 1.0}
    assert [r["step"] for r in log.measured] == [3]


def test_series_of_a_metric_is_sorted_and_the_last_value_of_a_step_wins(tmp_path: Path) -> None:
    pairs = [(3, 0.3), (1, 0.1), (3, 0.33), (2, 0.2)]
    metrics = [{"kind": "metrics", "step": t, "values": {"val_loss": value, "other": 0.0}} for t, value in pairs]
    log = read_log(write(tmp_path / "run.jsonl", *metrics, {"kind": "metrics", "step": 9, "values": {"other": 1.0}}))
    steps, values = log.series("val_loss")
    assert steps.tolist() == [1, 2, 3] and values.tolist() == [0.1, 0.2, 0.33]
    assert log.metric("val_loss") == {3: 0.33, 1: 0.1, 2: 0.2}


# -------------------------------------------------------------------------------------------- the short way of reading

number = st.floats() | st.integers(-(10**20), 10**20) | st.sampled_from(["NaN", "-Infinity", True, None, "x", -0.0])
field = st.sampled_from([*STEP, *MEASURED, "age", "new_field", "x y", 'q"'])


@st.composite
def lines(draw: st.DrawFn) -> bytes:
    """A line as the writer would write it; one in three is changed, in a field or in a byte."""
    record: dict[str, Any] = {**STEP, "step": draw(st.integers(1, 20)), "loss": draw(st.floats(allow_nan=False))}
    record |= draw(st.sampled_from([{}, MEASURED, {"age": 2}, {"phase": "below the edge"}]))
    change = draw(st.integers(0, 8))
    if change == 0:
        record[draw(field)] = draw(number)
    spaced = (", ", ": ") if change == 1 else (",", ":")
    text = json.dumps(record, separators=spaced).encode() + draw(st.sampled_from([b"\n", b"\n", b"\r\n"]))
    if change == 2:
        at = draw(st.integers(0, len(text) - 1))
        text = text[:at] + draw(st.binary(max_size=2)) + text[at + 1 :]
    return text


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(lines(), max_size=30), st.sampled_from([1, 2, 5, 4096]))
def test_matching_a_line_is_the_same_as_parsing_it(tmp_path: Path, some: list[bytes], at_once: int) -> None:
    path = tmp_path / "run.jsonl"
    path.write_bytes(json.dumps(HEADER).encode() + b"\n" + b"".join(some))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runlog_reader, "_AT_ONCE", at_once)
        short = read_log(path)
        patch.setattr(runlog_reader, "_TRIES", 0)  # no patterns
        parsed = read_log(path)
    assert repr(short.steps) == repr(parsed.steps)  # NaN equals NaN here, 1 is not 1.0, and -0.0 not 0.0
    assert short.dropped == parsed.dropped


def test_the_usual_line_is_matched_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunLogWriter(tmp_path / "run.jsonl") as writer:
        writer.start({})
        for t in range(1, 101):
            writer.step({"step": t, "loss": 1 / 3 / t, "effective_lr": 1e-05, **(MEASURED if t % 2 else {"age": 1})})
    parsed = []
    parse = runlog_reader.rules.parse
    monkeypatch.setattr(runlog_reader.rules, "parse", lambda data: parsed.append(data) or parse(data))
    assert len(read_log(tmp_path / "run.jsonl").steps) == 100
    assert len(parsed) == 3  # the header, and one record of each kind, by whose pattern the others are known


def test_a_log_with_other_fields_on_every_line_makes_few_patterns(tmp_path: Path) -> None:
    records = [{**STEP, "step": t, f"field_{t}": 1.0} for t in range(1, 2001)]
    log = read_log(write(tmp_path / "run.jsonl", *records))
    assert log.steps == records


# ------------------------------------------------------------------------------------------------------ resumed runs


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from("smer"), st.integers(1, 9)), max_size=25))
def test_resumes_drop_what_they_would_one_after_the_other(tmp_path: Path, written: list[tuple[str, int]]) -> None:
    kinds = {"s": STEP, "m": {"kind": "metrics", "values": {"a": 1.0}}, "e": {"kind": "event", "event": "x"}}
    records = [{**kinds.get(kind, {"kind": "resume"}), "step": step} for kind, step in written]
    kept: list[dict[str, Any]] = []
    said = []
    for line, record in enumerate(records, 2):
        if record["kind"] == "resume":
            before, step = len(kept), record["step"]
            kept = [other for other in kept if other["step"] <= step]
            if gone := before - len(kept):
                plural = "s" * (gone != 1)
                said.append(f"{gone} record{plural} after step {step}: superseded, line {line} resumes the run there")
        else:
            kept.append(record)
    log = read_log(write(tmp_path / "run.jsonl", *records))
    assert log.dropped == said
    for kind, read in (("step", log.steps), ("metrics", log.metrics), ("event", log.events)):
        assert read == [record for record in kept if record["kind"] == kind]


# ---------------------------------------------------------------------------------------------------- size and pandas


def test_memory_of_a_long_log_is_that_of_its_numbers(tmp_path: Path) -> None:
    """Six changing columns and the number of the line, 8 bytes each: 56 a record. Dictionaries take about 900."""
    count = 60_000
    records = [{**STEP, "step": t, "loss": 1 / t, "effective_lr": 1 / t, **MEASURED} for t in range(1, count + 1)]
    path = write(
        tmp_path / "run.jsonl", *[r | {"eta_crit": 1 / r["step"], "lambda_max": 2.0 * r["step"]} for r in records]
    )
    tracemalloc.start()
    log = read_log(path)
    kept, peak = tracemalloc.get_traced_memory()
    summary = summarize(log)
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert summary.measured == count
    assert kept < 80 * count
    assert peak < kept + 20e6 and used < kept + 20e6


def test_to_pandas(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    metrics = {"kind": "metrics", "step": 3, "values": {"val_loss": 0.5}}
    log = read_log(write(tmp_path / "run.jsonl", *mixed(3), metrics, {"kind": "event", "step": 2, "event": "collapse"}))
    frame = log.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert frame["step"].tolist() == [1, 2, 3] and frame["step"].dtype == np.int64
    assert math.isnan(frame["lambda_max"][0]) and frame["lambda_max"][2] == 10.0
    assert frame["phase"].tolist()[2] == "arm" and "kind" not in frame
    assert log.to_pandas("metrics").to_dict("list") == {"step": [3], "val_loss": [0.5]}
    assert log.to_pandas("events")["event"].tolist() == ["collapse"]


def test_to_pandas_names_what_is_missing_or_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = read_log(write(tmp_path / "run.jsonl", STEP))
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        log.to_pandas()
    with pytest.raises(ValueError, match=r"records must be .*got 'rows'"):
        log.to_pandas("rows")  # type: ignore[arg-type]
