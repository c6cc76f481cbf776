"""The run log: what a training run leaves behind, one JSON record a line.

The first line is the header, every later line a record of kind ``step``, ``event``, ``metrics`` or ``resume``. A line
is appended with one unbuffered write, so the file can be read while it grows and after a kill at any byte: a cut line
is a prefix of a JSON object, which never parses, so no half record is ever taken for a whole one. Every line is strict
JSON: NaN and the infinities are written as the strings "NaN", "Infinity" and "-Infinity".
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import platform
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, Final, TypeGuard

try:
    import fcntl
except ImportError:  # Windows: no advisory locks, two writers are then the user's own affair
    fcntl = None  # type: ignore[assignment]

__all__ = ["FORMAT", "VERSION", "RunLog", "RunLogError", "RunLogWarning", "RunLogWriter", "encode", "read_log"]

FORMAT: Final = "catapult_opt-run"
VERSION: Final = 1
MAX_LINE: Final = 1 << 20  # bytes; a longer line is not a record of ours, and must not fill the memory
_MAX_INT: Final = 1 << 63
_NON_FINITE: Final = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

Record = dict[str, Any]


class RunLogError(ValueError):
    """A run log that cannot be read at all; the message is one line and names the file."""


class RunLogNotFound(RunLogError, FileNotFoundError):
    """There is no such file."""


class RunLogWarning(UserWarning):
    """The run log could not be written; training goes on without it."""


@dataclass(frozen=True)
class RunLog:
    """One run, as far as its log tells."""

    path: Path
    header: Record
    steps: list[Record] = field(default_factory=list)  # in the order written
    events: list[Record] = field(default_factory=list)
    metrics: list[Record] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)  # what was left out and why, one sentence each

    @property
    def name(self) -> str:
        """The run's name."""
        return str(self.header["name"])

    @property
    def settings(self) -> Record:
        """The settings that the run was started with."""
        return dict(self.header["settings"])

    @property
    def measured(self) -> list[Record]:
        """The step records on which the critical learning rate was measured."""
        return [record for record in self.steps if "eta_crit" in record]

    def column(self, key: str) -> list[Any]:
        """The value of ``key`` in every step record, ``None`` where a record has none."""
        return [record.get(key) for record in self.steps]

    def metric(self, key: str) -> dict[int, float]:
        """The values of the metric ``key`` by step; the last one wins where a step has several."""
        return {m["step"]: m["values"][key] for m in self.metrics if key in m["values"]}


# ---------------------------------------------------------------------------------------------------------- encoding


def encode(value: Any) -> Any:
    """``value`` as strict JSON can hold it: non-finite floats as strings, foreign objects as numbers or their repr."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return _encode_float(value)
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [encode(item) for item in value]
    try:
        return encode(value.item())  # a scalar of numpy or torch, neither of which is imported here
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return repr(value)


def _encode_float(value: float) -> float | str:
    if math.isfinite(value):
        return float(value)
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def decode(value: Any) -> Any:
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [decode(item) for item in value]
    return value


def _line(record: Record) -> bytes:
    try:  # nearly every record is plain and finite already
        text = json.dumps(record, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError):
        text = json.dumps(encode(record), allow_nan=False, separators=(",", ":"))
    return text.encode("ascii") + b"\n"


# ----------------------------------------------------------------------------------------------------------- reading


def read_log(path: str | os.PathLike[str]) -> RunLog:
    """Read a run log: every whole record of it, and what had to be dropped.

    Works on a log that is still being written or was cut off anywhere. Damaged lines are named in ``dropped``; a file
    that is missing, empty, not a run log, damaged in its header or of a newer version raises :class:`RunLogError`.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a path of a run log, got {path!r}")
    path = Path(path)
    try:
        with open(path, "rb") as file:
            lines = _lines(file)
            log = RunLog(path, _read_header(path, next(lines, (1, b"", 0))))
            for number, data, size in lines:
                _add_line(log, number, data, size)
    except FileNotFoundError:
        raise RunLogNotFound(f"{path}: no such file") from None
    except IsADirectoryError:
        raise RunLogError(f"{path}: is a folder, not a run log") from None
    except OSError as error:
        raise RunLogError(f"{path}: cannot be read ({error.strerror or error})") from None
    return log


def _lines(file: io.BufferedReader) -> Iterator[tuple[int, bytes, int]]:
    """Number, content and full size of every line; of an over-long one only the beginning is kept."""
    number = 0
    while data := file.readline(MAX_LINE + 1):
        number += 1
        size, end = len(data), data[-1:]
        while end != b"\n" and (more := file.readline(MAX_LINE)):
            size, end = size + len(more), more[-1:]
        yield number, data, size


def _parse(data: bytes) -> Record:
    """The JSON object on a line; ``ValueError`` says what is wrong with it."""
    try:
        record = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError("not text") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError:  # this includes integers of absurd length
        raise ValueError("truncated record" if not data.endswith(b"\n") else "damaged record") from None
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    return record


def _read_header(path: Path, first: tuple[int, bytes, int]) -> Record:
    _, data, size = first
    if not data.strip():
        raise RunLogError(f"{path}: is empty" if size == 0 else f"{path}: is not a catapult_opt run log")
    try:
        header = _parse(data)
    except ValueError as error:
        if FORMAT.encode() in data[:4096]:
            raise RunLogError(f"{path}: the header is damaged ({error})") from None
        raise RunLogError(f"{path}: is not a catapult_opt run log") from None
    if header.get("kind") != "header" or header.get("format") != FORMAT:
        raise RunLogError(f"{path}: is not a catapult_opt run log")
    try:
        return _checked_header(header, path)
    except (ValueError, RecursionError) as error:
        raise RunLogError(f"{path}: {error}") from None


def _checked_header(header: Record, path: Path) -> Record:
    version = header.get("version")
    if not _is_int(version):
        raise ValueError("the header is damaged (no version)")
    if version > VERSION:  # before anything else: a newer version may mean the other fields differently
        raise ValueError(
            f"is written in version {version} of the format, and this catapult_opt reads up to version {VERSION}: "
            "upgrade it with `pip install --upgrade catapult_opt`"
        )
    defaults: Record = {"name": path.stem, "face": "", "settings": {}, "batch_size": None, "parameters": None}
    defaults["extra_bytes"] = None
    header = {**defaults, "libraries": {}, **{key: item for key, item in header.items() if item is not None}}
    for key, check in _HEADER_FIELDS.items():
        if header[key] is not None and not check(header[key]):
            raise ValueError(f"the header is damaged (field {key!r} is of the wrong type)")
    return {**header, "settings": decode(header["settings"])}


def _add_line(log: RunLog, number: int, data: bytes, size: int) -> None:
    try:
        if size > MAX_LINE:
            raise ValueError("longer than any record")
        _add_record(log, number, _parse(data))
    except (ValueError, RecursionError) as error:
        log.dropped.append(f"line {number}: {error or 'nested too deeply'} ({size} byte{'s' * (size != 1)})")


def _add_record(log: RunLog, number: int, record: Record) -> None:
    kind = record.get("kind")
    if kind == "resume":
        _supersede(log, number, _checked_step(record, least=0))
    elif kind == "step":
        log.steps.append(_checked_step_record(record))
    elif kind == "event":
        _checked_step(record, least=0)
        if not isinstance(record.get("event"), str):
            raise ValueError("event record without the event's name")
        log.events.append(decode(record))
    elif kind == "metrics":
        log.metrics.append(_checked_metrics(record))
    else:
        raise ValueError("a second header" if kind == "header" else "record of an unknown kind")


def _supersede(log: RunLog, number: int, step: int) -> None:
    """Drop what an earlier attempt wrote about steps that the resumed run takes again."""
    count = 0
    for records in (log.steps, log.events, log.metrics):
        kept = [record for record in records if record["step"] <= step]
        count += len(records) - len(kept)
        records[:] = kept
    if count:
        log.dropped.append(
            f"{count} record{'s' * (count != 1)} after step {step}: superseded, line {number} resumes the run there"
        )


def _checked_step(record: Record, least: int) -> int:
    step = record.get("step")
    if not _is_int(step) or not least <= step < _MAX_INT:
        raise ValueError(f"{record['kind']} record without a step number")
    return step


def _checked_step_record(record: Record) -> Record:
    _checked_step(record, least=1)
    required = _REQUIRED + (_REQUIRED_IF_MEASURED if "eta_crit" in record else ())
    for key in required:
        if key not in record:
            raise ValueError(f"step record without {key!r}")
    checked = decode(record)
    for key in _STEP_FIELDS.keys() & checked.keys():
        if not _STEP_FIELDS[key](checked[key]):
            raise ValueError(f"step record whose {key!r} is of the wrong type")
        if _STEP_FIELDS[key] is _is_number:
            checked[key] = float(checked[key])
    return dict(checked)


def _checked_metrics(record: Record) -> Record:
    _checked_step(record, least=0)
    values = decode(record.get("values"))
    if not isinstance(values, dict) or not all(_is_number(value) for value in values.values()):
        raise ValueError("metrics record whose values are not numbers")
    return {**record, "values": {key: float(value) for key, value in values.items()}}


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (_is_int(value) and abs(value) < _MAX_INT)


def _is_a(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind)


_HEADER_FIELDS: Final[dict[str, Callable[[Any], bool]]] = {
    "name": _is_a(str),
    "face": _is_a(str),
    "settings": _is_a(dict),
    "batch_size": _is_int,
    "parameters": _is_int,
    "extra_bytes": _is_int,
    "libraries": _is_a(dict),
}
_STEP_FIELDS: Final[dict[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("loss", "effective_lr", "eta_crit", "lambda_max", "ntk_lambda_max"), _is_number),
    **dict.fromkeys(("residual", "probe_seconds", "elapsed", "eta_crit_mean", "log_lambda_sd"), _is_number),
    **dict.fromkeys(("matvecs", "age"), _is_int),
    "super_critical": _is_a(bool),
    "phase": _is_a(str),
}
_REQUIRED: Final = ("loss", "effective_lr")
_REQUIRED_IF_MEASURED: Final = ("lambda_max", "super_critical")


# ----------------------------------------------------------------------------------------------------------- writing


class RunLogWriter:
    """Appends a run's records to its log, and never stands in the way of the training.

    A write that fails gives one :class:`RunLogWarning`; from then on ``failed`` is true and records are ignored, as
    they are before :meth:`start` and after :meth:`close`. A copy (``deepcopy``, pickle) is a writer not started, and
    so is the writer of a forked child (a data loader's worker): neither writes into the original's log.

    The log is locked while it is written. The lock goes with the process, however that ends.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.failed = False
        self._file: io.FileIO | None = None

    def __getstate__(self) -> Record:
        return {"path": self.path, "failed": False, "_file": None}

    def __enter__(self) -> RunLogWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    @property
    def started(self) -> bool:
        """Whether records are being written."""
        return self._file is not None

    def start(self, header: Mapping[str, Any], *, resumed_at: int | None = None) -> None:
        """Create the log and write its header, or continue an existing log after step ``resumed_at``.

        Raises before anything is written: ``FileExistsError`` where a log stands already and the run is not a resumed
        one, :class:`RunLogError` where the file to continue is not a run log that this version can read,
        ``RuntimeError`` where another writer is at work on it.
        """
        self.close()
        self.failed = False
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = io.FileIO(self.path, "a")
            _writers.add(self)
            size = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            return self._give_up(error)
        try:
            self._lock()
            lead = self._lead_in(size, resumed_at)
        except BaseException:
            self.close()
            raise
        if size == 0:
            self._write(_line(_full_header(header, self.path)))
        if resumed_at is not None:
            self._write(lead + _line({"kind": "resume", "step": resumed_at, "created": _now()}))

    def step(self, record: Mapping[str, Any]) -> None:
        """Write a step record; fields that are ``None`` are left out."""
        if self._file is not None:
            fields = {key: value for key, value in record.items() if value is not None}
            self._write(_line({"kind": "step", **fields}))

    def event(self, step: int, name: str, **details: Any) -> None:
        """Write that ``name`` happened at ``step``."""
        if self._file is not None:
            self._write(_line({"kind": "event", "step": step, "event": name, **details}))

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Write metrics taken after ``step`` steps; each must be one number, else ``TypeError``."""
        numbers = {str(key): _number(key, value) for key, value in values.items()}
        if self._file is not None:
            self._write(_line({"kind": "metrics", "step": step, "values": numbers}))

    def close(self) -> None:
        """Release the file; harmless if done twice."""
        file, self._file = getattr(self, "_file", None), None
        if file is None:
            return
        try:
            if fcntl is not None:  # explicitly: forked children (data loader workers) hold the file open too
                fcntl.flock(file.fileno(), fcntl.LOCK_UN)
        except OSError:
            pass
        finally:
            file.close()

    def _lock(self) -> None:
        if fcntl is None or self._file is None:
            return
        try:
            fcntl.flock(self._file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"{self.path} is being written by another run: give each run its own log") from None
        except OSError:
            pass  # a file system without locks

    def _lead_in(self, size: int, resumed_at: int | None) -> bytes:
        """What must stand before the next record: a newline if the last line was cut off."""
        if size == 0:
            return b""
        if resumed_at is None:
            raise FileExistsError(
                f"{self.path} holds a run already: choose another path, delete it, "
                "or load the run's checkpoint first to continue it"
            )
        with open(self.path, "rb") as file:
            _read_header(self.path, next(_lines(file)))
            file.seek(-1, os.SEEK_END)
            return b"" if file.read(1) == b"\n" else b"\n"

    def _write(self, line: bytes) -> None:
        if self._file is None:
            return
        try:
            while line:  # one write, unless the disk takes only a part: then the next one says why
                line = line[self._file.write(line) or 0 :]
            if os.fstat(self._file.fileno()).st_nlink == 0:
                raise FileNotFoundError(2, "the file was deleted")
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.failed = True
        with contextlib.suppress(OSError):
            self.close()
        reason = error.strerror or str(error)
        message = f"the run log {self.path} cannot be written ({reason}): training goes on without it"
        warnings.warn(message, RunLogWarning, stacklevel=4)


_writers: weakref.WeakSet[RunLogWriter] = weakref.WeakSet()


def _leave_to_parent() -> None:
    """A forked child holds the lock too: it would outlive the parent, and leaving it explicitly would end it."""
    for writer in list(_writers):
        file, writer._file = writer._file, None
        if file is not None:
            file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)


def _number(key: Any, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TypeError(f"metric {key!r} must be one number, not {value!r}") from None


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _full_header(header: Mapping[str, Any], path: Path) -> Record:
    ours = {"kind": "header", "format": FORMAT, "version": VERSION, "created": _now()}
    theirs = {key: value for key, value in header.items() if value is not None}
    return {**ours, "name": path.stem, **theirs, **ours, "libraries": _libraries()}


def _libraries() -> dict[str, str]:
    from catapult_opt import __version__  # here, not above: the package may still be importing

    versions = {"catapult_opt": __version__, "python": platform.python_version()}
    for library in ("torch", "numpy"):
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return versions
