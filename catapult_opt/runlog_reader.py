"""Reading a run log: every whole record of it as columns, and what had to be dropped, in one pass and little memory."""

from __future__ import annotations

import bisect
import io
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from . import runlog_format as rules
from .runlog_columns import Columns, Floats, Group, Integers, Records, compact, grouped
from .runlog_format import MAX_LINE, Record, RunLogError, RunLogNotFound

__all__ = ["RunLog", "read_log"]


@dataclass(frozen=True)
class RunLog:
    """One run, as far as its log tells.

    Attributes:
        path: the file.
        header: the first record of the log, with None for what it does not tell.
        steps: the step records in the order written; each is a new dictionary when it is looked at.
        events: the event records, likewise.
        metrics: the metrics records, likewise.
        dropped: what was left out or is missing, and why, one sentence each.

    Example:
        >>> steps = [{"step": 1, "loss": 0.5, "eta_crit": 2.0}, {"step": 2, "loss": 0.25}]
        >>> log = RunLog(Path("run.jsonl"), {"name": "run"}, steps)
        >>> log.array("eta_crit"), len(log.measured)
        (array([ 2., nan]), 1)
    """

    path: Path
    header: Record
    steps: Sequence[Record] = field(default_factory=list)
    events: Sequence[Record] = field(default_factory=list)
    metrics: Sequence[Record] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The run's name."""
        return str(self.header["name"])

    @property
    def settings(self) -> Record:
        """The settings that the run was started with."""
        return dict(self.header["settings"])

    @property
    def measured(self) -> Sequence[Record]:
        """The step records on which the critical learning rate was measured."""
        if isinstance(self.steps, Records):
            return self.steps.having("eta_crit")
        return [record for record in self.steps if "eta_crit" in record]

    def column(self, key: str) -> list[Any]:
        """The value of ``key`` in every step record, ``None`` where a record has none."""
        return columns_of(self.steps).values(key)

    def array(self, key: str) -> Floats:
        """The value of ``key`` in every step record as a float64 array of shape (steps,), NaN where there is none."""
        return columns_of(self.steps).numbers(key)

    def metric(self, key: str) -> dict[int, float]:
        """The values of the metric ``key`` by step; the last one wins where a step has several."""
        metrics = columns_of(self.metrics).having("values", key)
        return dict(zip(metrics.values("step"), metrics.numbers("values", key).tolist(), strict=True))

    def series(self, key: str) -> tuple[Integers, Floats]:
        """Steps in ascending order, each once, and the values of the metric ``key`` there, the last one of each step.

        Both have shape (n,). A metric of step t was taken after t updates.
        """
        metrics = columns_of(self.metrics).having("values", key)
        return last_of_each(metrics.integers("step", 0), metrics.numbers("values", key))

    def to_pandas(self, records: Literal["steps", "events", "metrics"] = "steps") -> Any:
        """A ``pandas.DataFrame`` with a row per record and a column per field, missing values where there are none.

        The values of metrics are columns of their own. Needs pandas, which this package does not require.

        Raises:
            ImportError: pandas is not installed.
            ValueError: ``records`` is none of the three.
        """
        if records not in ("steps", "events", "metrics"):
            raise ValueError(f"records must be 'steps', 'events' or 'metrics', got {records!r}")
        try:
            import pandas
        except ImportError as error:
            raise ImportError("to_pandas needs pandas: pip install pandas") from error
        columns = columns_of(getattr(self, records))
        data = {k: _for_pandas(columns, k) for k in columns.keys() if k not in ("kind", "values")}  # noqa: SIM118
        if records == "metrics":
            data |= {key: columns.numbers("values", key) for key in columns.keys("values")}
        return pandas.DataFrame(data)


def _for_pandas(columns: Records, key: str) -> Any:
    kinds = {column.dtype.kind if isinstance(column := g.columns.get(key), np.ndarray) else "?" for g in columns.groups}
    if kinds == {"i"}:
        return columns.integers(key, 0)
    return columns.numbers(key) if kinds <= {"f", "i", "?"} and kinds != {"?"} else columns.values(key)


def columns_of(records: Sequence[Record]) -> Records:
    """The records of a log as columns; those of a log that was put together by hand are dictionaries."""
    return records if isinstance(records, Records) else Records.of(records)


def last_of_each(steps: Integers, values: Floats) -> tuple[Integers, Floats]:
    """Steps in ascending order, each once, with the last of its values."""
    if np.all(steps[1:] > steps[:-1]):
        return steps, values
    found, from_the_end = np.unique(steps[::-1], return_index=True)
    return found, values[::-1][from_the_end]


# ----------------------------------------------------------------------------------------------------------- reading


def read_log(path: str | os.PathLike[str]) -> RunLog:
    """Read a run log: every whole record of it, and what had to be dropped.

    Works on a log that is still being written or was cut off anywhere. Damaged lines are named in ``dropped``.

    Raises:
        RunLogError: the file is missing (then it is a ``FileNotFoundError`` too), is no regular file, cannot be read,
            is empty, is not a run log, is damaged in its header, or is written in a newer version of the format.
        TypeError: ``path`` is not a path.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a path of a run log, got {path!r}")
    path = Path(path)
    try:
        with open_regular(path) as file:
            lines = lines_of(file)
            _, data, size = next(lines, (1, b"", 0))
            header = rules.checked_header(data, size, path)
            reader = _Reader()
            reader.read(lines)
    except FileNotFoundError:
        raise RunLogNotFound(f"{path}: no such file") from None
    except OSError as error:
        raise RunLogError(f"{path}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        if isinstance(error, RunLogError):
            raise
        raise RunLogError(f"{path}: cannot be read ({error})") from None  # a path with a zero byte
    return reader.log(path, header)


def open_regular(path: Path) -> io.BufferedReader:
    """The file open for reading, if it is a regular one: a pipe could be waited for in vain, a device without end."""
    _refuse_unless_regular(path, os.stat(path).st_mode)  # before opening, as that alone sets some devices to work
    file = open(path, "rb", opener=_open_without_waiting)  # noqa: SIM115
    try:
        _refuse_unless_regular(path, os.fstat(file.fileno()).st_mode)  # it may have been replaced meanwhile
    except RunLogError:
        file.close()
        raise
    return file


def _refuse_unless_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise RunLogError(f"{path}: is {rules.kind_of_file(mode)}, not a run log")


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))


def lines_of(file: io.BufferedReader) -> Iterator[tuple[int, bytes, int]]:
    """Number, content and full size of every line; of an over-long one only the beginning is kept.

    Only as far as the file reaches now: one that grows faster than it is read has an end too.
    """
    number, left = 0, os.fstat(file.fileno()).st_size
    while left > 0 and (data := file.readline(MAX_LINE + 1)):
        number += 1
        size, end = len(data), data[-1:]
        while size > MAX_LINE and end != b"\n" and size < left and (more := file.readline(MAX_LINE)):
            size, end = size + len(more), more[-1:]
        left -= size
        yield number, data, size


_AT_ONCE: Final = 4096  # records that wait as Python objects before they become columns
_TRIES: Final = 32  # patterns made at most: a foreign log may have other fields on every line
_NAME: Final = re.compile("[A-Za-z_][A-Za-z0-9_]{0,39}")
_FIELDS: Final[dict[type, bytes]] = {  # as the writer spells them, and shorter than a line may be
    float: rb"(-?(?:0|[1-9]\d{0,17})(?:\.\d{1,30}(?:[eE][+-]?\d{1,4})?|[eE][+-]?\d{1,4}))",
    int: rb"(0|-?[1-9]\d{0,17})",
    bool: rb"(true|false)",
    str: rb'"(?!NaN"|-?Infinity")([ !#-\[\]-~]{0,40})"',
}


class _Pattern:
    """Step records that have the fields of one that was checked, each of the same type: valid for the same reasons.

    Matching a line takes half the time of parsing and checking it. Whatever does not match is parsed.
    """

    def __init__(self, checked: Record) -> None:
        self.types = {key: type(value) for key, value in checked.items() if key not in ("kind", "step")}
        fields = b"".join(b',"%s":%s' % (key.encode(), _FIELDS[kind]) for key, kind in self.types.items())
        self.match = re.compile(rb'\{"kind":"step","step":([1-9]\d{0,17})' + fields + rb"\}\n?").fullmatch
        self.lines: list[int] = []
        self.rows: list[tuple[bytes, ...]] = []

    @classmethod
    def of(cls, data: bytes, checked: Record) -> _Pattern | None:
        """The pattern of a line, if the writer would have written it so."""
        if any(
            type(v) not in _FIELDS or not re.fullmatch("[A-Za-z_][A-Za-z0-9_]{0,39}", k) for k, v in checked.items()
        ):
            return None
        pattern = cls(checked)
        return pattern if pattern.match(data) else None

    def take(self) -> Group:
        """What matched since the last time."""
        steps, *fields = zip(*self.rows, strict=True)
        columns: Columns = {"kind": compact(np.array(["step"] * len(steps), object))}
        columns["step"] = np.array(list(map(int, steps)), np.int64)
        for (key, kind), texts in zip(self.types.items(), fields, strict=True):
            columns[key] = compact(_converted(texts, kind))
        lines = np.array(self.lines, np.int64)
        self.lines.clear()
        self.rows.clear()
        return Group(lines, columns)


def _converted(texts: Sequence[bytes], kind: type) -> Any:
    if kind is float:
        return np.array(texts, np.float64)
    if kind is int:
        return np.array(list(map(int, texts)), np.int64)
    if kind is bool:
        return np.array([text == b"true" for text in texts], np.bool_)
    return np.array([text.decode("ascii") for text in texts], object)


class _Reader:
    """Collects the records of a log, kind by kind, and what was dropped."""

    def __init__(self) -> None:
        self._groups: dict[str, list[Group]] = {"step": [], "event": [], "metrics": []}
        self._waiting: dict[str, list[tuple[int, Record]]] = {"step": [], "event": [], "metrics": []}
        self._patterns: list[_Pattern] = []
        self._tries = 0
        self._resumes: list[tuple[int, int]] = []  # line and step
        self._dropped: list[tuple[int, str]] = []  # line and sentence

    def read(self, lines: Iterator[tuple[int, bytes, int]]) -> None:
        """Take the lines after the header."""
        room = _AT_ONCE
        for number, data, size in lines:
            for pattern in self._patterns:
                if found := pattern.match(data):
                    pattern.lines.append(number)
                    pattern.rows.append(found.groups())
                    break
            else:
                self._parse(number, data, size)
            room -= 1
            if not room:
                self._pack()
                room = _AT_ONCE
        self._pack()

    def log(self, path: Path, header: Record) -> RunLog:
        """All that was read."""
        if self._resumes:
            self._supersede()
        steps, events, metrics = (Records(groups) for groups in self._groups.values())
        dropped = [sentence for _, sentence in sorted(self._dropped, key=lambda item: item[0])]
        return RunLog(path, header, steps, events, metrics, dropped)

    def _parse(self, number: int, data: bytes, size: int) -> None:
        try:
            if size > MAX_LINE:
                raise ValueError("longer than any record")
            self._add(number, rules.parse(data), data)
        except (ValueError, RecursionError) as error:
            sentence = f"line {number}: {error or 'nested too deeply'} ({size} byte{'s' * (size != 1)})"
            self._dropped.append((number, sentence))

    def _add(self, number: int, record: Record, data: bytes) -> None:
        kind = record.get("kind")
        if kind == "resume":
            self._resumes.append((number, rules.checked_step(record, least=0)))
        elif kind == "step":
            checked = rules.checked_step_record(record)
            self._waiting["step"].append((number, checked))
            if self._tries < _TRIES:
                self._tries += 1
                if pattern := _Pattern.of(data, checked):
                    self._patterns.append(pattern)
        elif kind == "event":
            event = rules.checked_event(record)
            self._waiting["event"].append((number, event))
            if event["event"] == rules.TRUNCATED:
                sentence = f"records up to step {event['step']}: somebody cut the log off while it was written"
                self._dropped.append((number, sentence))
        elif kind == "metrics":
            self._waiting["metrics"].append((number, rules.checked_metrics(record)))
        else:
            raise ValueError("a second header" if kind == "header" else "record of an unknown kind")

    def _pack(self) -> None:
        for kind, records in self._waiting.items():
            self._groups[kind] += grouped(records)
            records.clear()
        self._groups["step"] += [pattern.take() for pattern in self._patterns if pattern.lines]

    def _supersede(self) -> None:
        """Drop what an earlier attempt wrote about steps that a resumed run takes again."""
        lines = np.array([line for line, _ in self._resumes], np.int64)
        steps = [step for _, step in self._resumes]
        least = np.minimum.accumulate(np.array([*steps, np.iinfo(np.int64).max])[::-1])[::-1]  # from each resume on
        counts: dict[int, int] = {}
        gone: list[tuple[int, int]] = []  # of each record: the resume that comes next, and its step
        for groups in self._groups.values():
            for i, group in enumerate(groups):
                following, at = np.searchsorted(lines, group.lines), _steps(group)
                keep = at <= least[following]
                if not keep.all():
                    gone += zip(following[~keep].tolist(), at[~keep].tolist(), strict=True)
                    groups[i] = group.select(keep)
        for resume in _first_below(steps, gone):
            counts[resume] = counts.get(resume, 0) + 1
        for resume, count in counts.items():
            line, step = self._resumes[resume]
            sentence = f"{count} record{'s' * (count != 1)} after step {step}: superseded, line {line} resumes the run"
            self._dropped.append((line, sentence + " there"))


def _steps(group: Group) -> Integers:
    column = group.columns["step"]
    assert isinstance(column, np.ndarray)
    return column.astype(np.int64, copy=False)


def _first_below(steps: Sequence[int], wanted: Sequence[tuple[int, int]]) -> Iterator[int]:
    """For each pair (i, step): the first index from ``i`` on at which ``steps`` is less than ``step``; there is one."""
    wanted = sorted(wanted)
    later: list[int] = []  # indices whose steps no earlier one undercuts, the next one last
    rising: list[int] = []  # their steps
    at = len(steps)
    for i, step in reversed(wanted):
        while at > i:
            at -= 1
            while rising and rising[-1] >= steps[at]:
                rising.pop()
                later.pop()
            rising.append(steps[at])
            later.append(at)
        yield later[bisect.bisect_left(rising, step) - 1]
