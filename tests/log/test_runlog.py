"""The run log survives kills, full disks and junk; nothing whole is lost, nothing broken is believed."""

import copy
import json
import math
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from catapult_opt import runlog
from catapult_opt.runlog import RunLogError, RunLogWarning, RunLogWriter, read_log

HEADER = {"name": "demo", "face": "CatapultSGD", "settings": {"kappa": 2.0}, "batch_size": 5, "parameters": 1024}
MEASURED = {"eta_crit": 0.2, "lambda_max": 10.0, "residual": 0.01, "matvecs": 3, "super_critical": True, "phase": "arm"}
HEADER_LINE = json.dumps({"kind": "header", "format": "catapult_opt-run", "version": 1, **HEADER})
STEP_LINE = '{"kind":"step","step":1,"loss":0.5,"effective_lr":0.1}'


def step(number, **more):
    return {"step": number, "loss": 1.0 / number, "effective_lr": 0.1, **more}


def write_run(path, steps=5):
    with RunLogWriter(path) as writer:
        writer.start(HEADER)
        for number in range(1, steps + 1):
            writer.step(step(number, **(MEASURED if number % 2 else {})))
        writer.event(2, "catapult_started", kappa=2.0)
        writer.metrics(steps, {"val_loss": 0.5})
    return path


def write_lines(path, *lines):
    path.write_bytes(b"".join(line if isinstance(line, bytes) else line.encode() + b"\n" for line in lines))
    return path


# ------------------------------------------------------------------------------------------------- what is written


def test_file_holds_the_documented_records_as_strict_json(tmp_path):
    def no_constants(name):
        raise AssertionError(f"{name} is not JSON")

    path = tmp_path / "deep" / "er" / "run.jsonl"
    with RunLogWriter(path) as writer:
        writer.start({**HEADER, "settings": {"patience": math.inf}})
        writer.step({"step": 1, "loss": math.nan, "effective_lr": 0.1, "ntk_lambda_max": None})
        writer.event(1, "back_off", factor=-math.inf)
        writer.metrics(1, {"val_loss": 3})
    header, *records = [json.loads(line, parse_constant=no_constants) for line in path.read_text().splitlines()]
    assert records == [
        {"kind": "step", "step": 1, "loss": "NaN", "effective_lr": 0.1},
        {"kind": "event", "step": 1, "event": "back_off", "factor": "-Infinity"},
        {"kind": "metrics", "step": 1, "values": {"val_loss": 3.0}},
    ]
    assert (header["kind"], header["format"], header["version"]) == ("header", "catapult_opt-run", 1)
    assert header["settings"] == {"patience": "Infinity"}
    assert header["libraries"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert header["libraries"]["torch"].split(".")[0].isdecimal()


def test_record_is_one_write_of_a_whole_line(tmp_path):
    writer = RunLogWriter(tmp_path / "run.jsonl")
    writer.start(HEADER)
    chunks = []

    class Recorder:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            chunks.append(bytes(data))
            return self.file.write(data)

        def __getattr__(self, name):
            return getattr(self.file, name)

    writer._file = Recorder(writer._file)
    writer.step(step(1))
    writer.event(1, "collapse")
    writer.metrics(1, {"val_loss": 1.0})
    assert len(chunks) == 3
    assert all(chunk.count(b"\n") == 1 and chunk.endswith(b"\n") for chunk in chunks)


@given(loss=st.floats(), rate=st.floats(), metric=st.floats(), detail=st.floats(width=32))
def test_floats_round_trip_bit_for_bit(tmp_path_factory, loss, rate, metric, detail):
    path = tmp_path_factory.mktemp("log") / "run.jsonl"
    with RunLogWriter(path) as writer:
        writer.start({**HEADER, "settings": {"x": [loss, {"y": rate}]}})
        writer.step({"step": 1, "loss": loss, "effective_lr": rate})
        writer.event(1, "restore", detail=detail)
        writer.metrics(1, {"val": metric})
    log = read_log(path)
    assert log.dropped == []
    read = [
        log.steps[0]["loss"],
        log.steps[0]["effective_lr"],
        log.metrics[0]["values"]["val"],
        log.events[0]["detail"],
    ]
    for ours, theirs in zip([loss, rate, metric, detail], read, strict=True):
        assert repr(ours) == repr(theirs)  # NaN equals NaN here, and -0.0 differs from 0.0
    assert repr(log.settings) == repr({"x": [loss, {"y": rate}]})


def test_numbers_of_torch_and_numpy_are_written_as_numbers(tmp_path):
    import numpy as np
    import torch

    path = tmp_path / "run.jsonl"
    with RunLogWriter(path) as writer:
        writer.start(
            {**HEADER, "settings": {"lr": np.float32(0.5), "flag": np.bool_(True), "device": torch.device("cpu")}}
        )
        writer.step({"step": 1, "loss": torch.tensor(0.25), "effective_lr": np.float64(0.1)})
        writer.metrics(1, {"val_loss": torch.tensor([2.0]), "val_acc": np.int64(1)})
        with pytest.raises(TypeError, match=r"val_loss.*one number"):
            writer.metrics(1, {"val_loss": torch.zeros(2)})
    log = read_log(path)
    assert log.settings == {"lr": 0.5, "flag": True, "device": "device(type='cpu')"}
    assert log.steps[0] == {"kind": "step", "step": 1, "loss": 0.25, "effective_lr": 0.1}
    assert [m["values"] for m in log.metrics] == [{"val_loss": 2.0, "val_acc": 1.0}]


def test_columns_and_metrics_line_up_with_steps(tmp_path):
    log = read_log(write_run(tmp_path / "run.jsonl", steps=3))
    assert log.column("loss") == [1.0, 1.0 / 2, 1.0 / 3]
    assert log.column("lambda_max") == [10.0, None, 10.0]
    assert [record["step"] for record in log.measured] == [1, 3]
    assert log.metric("val_loss") == {3: 0.5}
    assert (log.name, log.settings) == ("demo", {"kappa": 2.0})


def test_file_can_be_read_while_it_is_written(tmp_path):
    writer = RunLogWriter(tmp_path / "run.jsonl")
    writer.start(HEADER)
    for number in range(1, 4):
        writer.step(step(number))
        assert [record["step"] for record in read_log(writer.path).steps] == list(range(1, number + 1))


# ------------------------------------------------------------------------------------------ cut off, killed, damaged


def test_log_cut_at_any_byte_keeps_every_whole_record(tmp_path):
    whole = write_run(tmp_path / "whole.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    ends = [sum(map(len, lines[: n + 1])) - 1 for n in range(len(lines))]  # where each record is whole, newline or not
    cut = tmp_path / "cut.jsonl"
    for size in range(len(whole) + 1):
        cut.write_bytes(whole[:size])
        if size < ends[0]:
            with pytest.raises(RunLogError):
                read_log(cut)
            continue
        log = read_log(cut)
        expected = [json.loads(line) for line, end in zip(lines, ends, strict=True) if end <= size][1:]
        assert log.steps + log.events + log.metrics == expected
        rest = size - max(end for end in ends if end <= size) - 1  # bytes of a record begun and not finished
        number = len(expected) + 2
        said = [f"line {number}: truncated record ({rest} byte{'s' * (rest != 1)})"] if rest > 0 else []
        assert log.dropped == said


def test_killed_writer_loses_no_record_that_step_returned_from(tmp_path):
    path = tmp_path / "run.jsonl"
    code = (
        "import sys; from catapult_opt.runlog import RunLogWriter\n"
        f"w = RunLogWriter({str(path)!r}); w.start({HEADER!r})\n"
        "for t in range(1, 10**9):\n"
        "    w.step({'step': t, 'loss': 0.5, 'effective_lr': 0.1}); print(t, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if int(line) >= 500:
            break
    process.send_signal(signal.SIGKILL)
    last = max([int(line), *(int(text) for text in process.stdout.read().split("\n")[:-1])])
    process.wait()
    steps = [record["step"] for record in read_log(path).steps]
    assert steps == list(range(1, len(steps) + 1))
    assert last <= len(steps) <= last + 1
    RunLogWriter(path).start(HEADER, resumed_at=last)  # the lock died with its holder


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (STEP_LINE[:30], "damaged record"),
        ("[1, 2]", "not a JSON object"),
        (b"\xff\xfe\x00junk\n", "not text"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"kind":"step","step":' + "1" * 5000 + "}", "damaged record"),
        ('{"kind":"step","step":1' + " " * (1 << 20) + "}", "longer than any record"),
        ('{"kind":"step","step":"1","loss":1,"effective_lr":1}', "without a step number"),
        ('{"kind":"step","step":0,"loss":1,"effective_lr":1}', "without a step number"),
        ('{"kind":"step","step":true,"loss":1,"effective_lr":1}', "without a step number"),
        ('{"kind":"step","step":1,"effective_lr":1}', "without 'loss'"),
        ('{"kind":"step","step":1,"loss":[],"effective_lr":1}', "'loss' is of the wrong type"),
        ('{"kind":"step","step":1,"loss":1' + "0" * 400 + ',"effective_lr":1}', "'loss' is of the wrong type"),
        ('{"kind":"step","step":1,"loss":1,"effective_lr":1,"eta_crit":1}', "without 'lambda_max'"),
        (
            '{"kind":"step","step":1,"loss":1,"effective_lr":1,"eta_crit":1,"lambda_max":1,"super_critical":"no"}',
            "'super_critical' is of the wrong type",
        ),
        ('{"kind":"event","step":1,"event":7}', "without the event's name"),
        ('{"kind":"metrics","step":1,"values":{"val_loss":"low"}}', "not numbers"),
        ('{"kind":"metrics","step":1,"values":[0.4]}', "not numbers"),
        ('{"kind":"resume"}', "without a step number"),
        ('{"kind":"banana","step":1}', "unknown kind"),
        ('{"kind":["step"],"step":1}', "unknown kind"),
        (HEADER_LINE, "a second header"),
    ],
)
def test_damaged_line_is_dropped_and_named_and_the_rest_kept(tmp_path, line, why):
    path = write_lines(tmp_path / "run.jsonl", HEADER_LINE, STEP_LINE, line, STEP_LINE.replace(":1,", ":2,", 1))
    log = read_log(path)
    assert [record["step"] for record in log.steps] == [1, 2]
    assert log.events == log.metrics == []
    assert len(log.dropped) == 1
    assert log.dropped[0].startswith("line 3: ")
    assert why in log.dropped[0]


def test_gigantic_line_does_not_fill_the_memory(tmp_path):
    import tracemalloc

    path = write_lines(tmp_path / "run.jsonl", HEADER_LINE, b"x" * (64 << 20) + b"\n", STEP_LINE)
    tracemalloc.start()
    log = read_log(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(log.steps) == 1
    assert peak < 8 << 20


@given(junk=st.binary(max_size=300))
def test_random_bytes_after_the_header_never_crash_the_reader(tmp_path_factory, junk):
    path = tmp_path_factory.mktemp("log") / "run.jsonl"
    write_lines(path, HEADER_LINE, junk + b"\n", STEP_LINE)
    assert read_log(path).steps[-1]["loss"] == 0.5


@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
        max_leaves=5,
    ),
    key=st.sampled_from(["kind", "step", "loss", "effective_lr", "eta_crit", "lambda_max", "super_critical", "phase"]),
)
def test_any_json_value_in_any_field_is_read_or_dropped(tmp_path_factory, value, key):
    record = {"kind": "step", **step(1), **MEASURED, key: value}
    path = write_lines(tmp_path_factory.mktemp("log") / "run.jsonl", HEADER_LINE, json.dumps(record))
    log = read_log(path)
    assert len(log.steps + log.events) + len(log.dropped) == 1
    for kept in log.steps:
        assert isinstance(kept["loss"], float)
        assert isinstance(kept["super_critical"], bool)


# --------------------------------------------------------------------------------------------- not a run log at all


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is empty"),
        (b'{"name": "somebody else", "loss": 1}\n', "is not a catapult_opt run log"),
        (b"[]\n", "is not a catapult_opt run log"),
        (b"step,loss\n1,0.5\n", "is not a catapult_opt run log"),
        (b"\n\n", "is not a catapult_opt run log"),
        (bytes(range(256)) * 40, "is not a catapult_opt run log"),
        (b"\0" * (3 << 20), "is not a catapult_opt run log"),
        (HEADER_LINE[:-20].encode(), "header is damaged (truncated record)"),
        (
            HEADER_LINE.replace('"batch_size": 5', '"batch_size": "five"').encode() + b"\n",
            "'batch_size' is of the wrong",
        ),
        (HEADER_LINE.replace('"version": 1', '"version": "1"').encode() + b"\n", "no version"),
        (HEADER_LINE.replace('"version": 1', '"version": 2').encode() + b"\n", "version 2 .* up to version 1: upgrade"),
        (
            b'{"kind":"header","format":"catapult_opt-run","version":3,"name":7}\n',
            "version 3 .* up to version 1: upgrade",
        ),
    ],
)
def test_unreadable_file_is_a_one_line_error(tmp_path, content, why):
    path = tmp_path / "run.jsonl"
    path.write_bytes(content)
    with pytest.raises(RunLogError, match=why.replace("(", r"\(").replace(")", r"\)")) as caught:
        read_log(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder_are_errors(tmp_path):
    with pytest.raises(RunLogError, match="no such file"):
        read_log(tmp_path / "nothing.jsonl")
    with pytest.raises(FileNotFoundError):
        read_log(tmp_path / "nothing.jsonl")
    with pytest.raises(RunLogError, match="is a folder"):
        read_log(tmp_path)
    with pytest.raises(RunLogError, match="cannot be read"):
        read_log(write_run(tmp_path / "run.jsonl") / "below.jsonl")


def test_header_without_optional_fields_is_enough(tmp_path):
    line = '{"kind":"header","format":"catapult_opt-run","version":1}'
    log = read_log(write_lines(tmp_path / "bare.jsonl", line, STEP_LINE))
    assert (log.name, log.settings, log.header["batch_size"]) == ("bare", {}, None)
    assert len(log.steps) == 1


# ------------------------------------------------------------------------------------------------- starting, resuming


def test_existing_run_is_not_overwritten(tmp_path):
    path = write_run(tmp_path / "run.jsonl")
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match=r"run\.jsonl.*another path.*checkpoint"):
        RunLogWriter(path).start(HEADER)
    assert path.read_bytes() == before


def test_empty_file_may_be_started(tmp_path):
    path = tmp_path / "run.jsonl"
    path.touch()
    RunLogWriter(path).start(HEADER)
    assert read_log(path).name == "demo"


def test_resumed_run_supersedes_what_came_after_its_checkpoint(tmp_path):
    path = tmp_path / "run.jsonl"
    with RunLogWriter(path) as writer:
        writer.start(HEADER)
        for number in (1, 2, 3, 4):
            writer.step({"step": number, "loss": 1.0, "effective_lr": 0.1})
            writer.event(number, "catapult_started")
            writer.metrics(number, {"val_loss": 1.0})
    with RunLogWriter(path) as writer:
        writer.start(HEADER, resumed_at=2)
        writer.step({"step": 3, "loss": 7.0, "effective_lr": 0.1})
    log = read_log(path)
    assert [(record["step"], record["loss"]) for record in log.steps] == [(1, 1.0), (2, 1.0), (3, 7.0)]
    assert [record["step"] for record in log.events] == [1, 2]
    assert [record["step"] for record in log.metrics] == [1, 2]
    assert log.dropped == ["6 records after step 2: superseded, line 14 resumes the run there"]


@pytest.mark.parametrize("cut", [1, 2, 10, 40])
def test_resume_after_a_kill_drops_only_the_fragment(tmp_path, cut):
    path = write_lines(tmp_path / "run.jsonl", HEADER_LINE, STEP_LINE, STEP_LINE.replace(":1,", ":2,", 1))
    path.write_bytes(path.read_bytes()[:-cut])
    with RunLogWriter(path) as writer:
        writer.start(HEADER, resumed_at=1)
        writer.step(step(2))
    log = read_log(path)
    assert [record["step"] for record in log.steps] == [1, 2]
    assert len(log.dropped) == 1
    assert ("superseded" if cut == 1 else "line 3: damaged record") in log.dropped[0]


def test_resume_where_the_log_is_gone_starts_a_new_one(tmp_path):
    path = tmp_path / "run.jsonl"
    with RunLogWriter(path) as writer:
        writer.start(HEADER, resumed_at=40)
        writer.step(step(41))
    assert [record["step"] for record in read_log(path).steps] == [41]
    assert read_log(path).dropped == []


@pytest.mark.parametrize("content", [b"somebody's notes", HEADER_LINE.replace(": 1,", ": 9,", 1).encode() + b"\n"])
def test_resume_never_writes_into_a_file_it_cannot_read(tmp_path, content):
    path = tmp_path / "run.jsonl"
    path.write_bytes(content)
    with pytest.raises(RunLogError, match=r"run\.jsonl"):
        RunLogWriter(path).start(HEADER, resumed_at=1)
    assert path.read_bytes() == content


@pytest.mark.skipif(runlog.fcntl is None, reason="no advisory locks on this platform")
def test_second_live_writer_is_refused_until_the_first_is_closed(tmp_path):
    first, second = RunLogWriter(tmp_path / "run.jsonl"), RunLogWriter(tmp_path / "run.jsonl")
    first.start(HEADER)
    with pytest.raises(RuntimeError, match=r"run\.jsonl is being written by another run"):
        second.start(HEADER, resumed_at=0)
    first.close()
    second.start(HEADER, resumed_at=0)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork on this platform")
def test_forked_child_does_not_keep_a_closed_log_locked(tmp_path):
    writer = RunLogWriter(tmp_path / "run.jsonl")
    writer.start(HEADER)
    child = os.fork()
    if child == 0:
        time.sleep(30)  # like a data loader's worker, which holds every open file of its parent
        os._exit(0)
    try:
        writer.close()
        RunLogWriter(writer.path).start(HEADER, resumed_at=0)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_works_without_fcntl(tmp_path, monkeypatch):
    monkeypatch.setattr(runlog, "fcntl", None)
    assert len(read_log(write_run(tmp_path / "run.jsonl")).steps) == 5


def test_copy_of_a_writer_does_not_write_into_the_log(tmp_path):
    writer = RunLogWriter(tmp_path / "run.jsonl")
    writer.start(HEADER)
    for copied in (copy.deepcopy(writer), pickle.loads(pickle.dumps(writer))):
        copied.step(step(1))
        copied.close()
    writer.step(step(2))
    assert [record["step"] for record in read_log(writer.path).steps] == [2]


# ---------------------------------------------------------------------------------------------------- failing writes


def assert_silent(writer):
    assert writer.failed
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one warning was enough
        writer.step(step(9))
        writer.event(9, "collapse")
        writer.metrics(9, {"val_loss": 1.0})
        writer.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this platform")
def test_full_disk_gives_one_warning_and_training_goes_on():
    writer = RunLogWriter("/dev/full")
    with pytest.warns(RunLogWarning, match=r"/dev/full cannot be written \(No space left on device\)") as caught:
        writer.start(HEADER)
    assert len(caught) == 1
    assert_silent(writer)


def test_disk_that_fills_up_in_mid_record_leaves_a_readable_log(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "run.jsonl"
    code = (
        "import resource, signal, warnings; from catapult_opt.runlog import RunLogWriter\n"
        "warnings.simplefilter('always')\n"
        f"w = RunLogWriter({str(path)!r}); w.start({HEADER!r})\n"
        "w.step({'step': 1, 'loss': 0.5, 'effective_lr': 0.1})\n"
        f"signal.signal(signal.SIGXFSZ, signal.SIG_IGN); size = w.path.stat().st_size + 20\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))\n"
        "for t in (2, 3): w.step({'step': t, 'loss': 0.5, 'effective_lr': 0.1})\n"
        "assert w.failed\n"
    )
    assert resource
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("RunLogWarning")) == (0, 1), done.stderr
    log = read_log(path)
    assert [record["step"] for record in log.steps] == [1]
    assert log.dropped == ["line 3: truncated record (20 bytes)"]


@pytest.mark.parametrize("place", ["file/run.jsonl", "file/deeper/run.jsonl", "folder"])
def test_impossible_path_gives_one_warning(tmp_path, place):
    (tmp_path / "file").write_text("a file where a folder should be")
    (tmp_path / "folder").mkdir()
    writer = RunLogWriter(tmp_path / place)
    with pytest.warns(RunLogWarning, match="cannot be written") as caught:
        writer.start(HEADER)
    assert len(caught) == 1
    assert_silent(writer)


@pytest.mark.skipif(os.name == "nt", reason="an open file cannot be deleted on Windows")
def test_log_deleted_under_the_writer_is_noticed(tmp_path):
    writer = RunLogWriter(tmp_path / "runs" / "run.jsonl")
    writer.start(HEADER)
    writer.path.unlink()
    writer.path.parent.rmdir()
    with pytest.warns(RunLogWarning, match="deleted"):
        writer.step(step(1))
    assert_silent(writer)


def test_reader_and_writer_at_once_never_see_half_a_record(tmp_path):
    writer = RunLogWriter(tmp_path / "run.jsonl")
    writer.start(HEADER)
    done = threading.Event()

    def write():
        for number in range(1, 3000):
            writer.step(step(number, **MEASURED))
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    reads = 0
    while not done.is_set() or reads == 0:
        assert read_log(writer.path).dropped == []
        reads += 1
    thread.join()
    assert len(read_log(Path(writer.path)).steps) == 2999
