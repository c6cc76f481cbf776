"""The run log: what a training run leaves behind, one JSON record a line. Written here, read in `runlog_reader`.

A line is appended with one unbuffered write, so the file can be read while it grows and after a kill at any byte: a cut
line is a prefix of a JSON object, which never parses, so no half record is ever taken for a whole one. What a line may
hold is told in `runlog_format`.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import platform
import stat
import warnings
import weakref
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from .runlog_format import (
    FORMAT,
    TRUNCATED,
    VERSION,
    Record,
    RunLogError,
    RunLogWarning,
    checked_header,
    decode,
    encode,
    to_line,
)
from .runlog_reader import RunLog, lines_of, open_regular, read_log

try:
    import fcntl
except ImportError:  # Windows: no advisory locks, two writers are then the user's own affair
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "FORMAT",
    "VERSION",
    "RunLog",
    "RunLogError",
    "RunLogWarning",
    "RunLogWriter",
    "decode",
    "encode",
    "read_log",
]


class RunLogWriter:
    """Appends a run's records to its log, and never stands in the way of the training.

    A write that fails gives one :class:`RunLogWarning`; from then on ``failed`` is true and records are ignored, as
    they are before :meth:`start` and after :meth:`close`. A log that somebody moves or cuts off while it is written
    gives one warning too, and goes on: with a new header where that was lost, and an event that tells what is missing.
    A copy (``deepcopy``, pickle) is a writer not started, and so is the writer of a forked child (a data loader's
    worker): neither writes into the original's log.

    The log is locked while it is written. The lock goes with the process, however that ends.

    Attributes:
        path: the log.
        failed: whether it was given up.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, RunLogWriter(f"{folder}/run.jsonl") as writer:
        ...     writer.start({"name": "demo"})
        ...     writer.step({"step": 1, "loss": 0.5, "effective_lr": 0.1})
        ...     read_log(writer.path).column("loss")
        [0.5]
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.failed = False
        self._file: io.FileIO | None = None
        self._header = b""  # the first line of the log
        self._size = 0  # bytes that the log has at least, if nobody takes some away
        self._step = 0  # the last one written
        self._noticed: set[str] = set()  # kinds of trouble that a warning told of already

    def __getstate__(self) -> Record:
        return RunLogWriter(self.path).__dict__

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

        Raises, before anything is written:
            FileExistsError: there is a log already, and the run is not a resumed one.
            RunLogError: the file to continue is not a run log that this version can read.
            RuntimeError: another writer is at work on it.
        """
        self.close()
        self.__dict__ |= RunLogWriter(self.path).__dict__
        try:
            self._place = os.path.abspath(self.path)  # the training may change its folder
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = io.FileIO(self.path, "a+")
            _writers.add(self)
            state = os.fstat(self._file.fileno())
            if stat.S_ISFIFO(state.st_mode):
                raise OSError(errno.EINVAL, "it is a pipe, not a file")
        except OSError as error:
            return self._give_up(error)
        try:
            self._lock()
            lead = self._lead_in(state.st_size, resumed_at)
        except BaseException:
            self.close()
            raise
        self._size = state.st_size
        if self._size == 0:
            self._header = to_line(_full_header(header, self.path))
            self._write(self._header)
        if resumed_at is not None:
            self._write(lead + to_line({"kind": "resume", "step": resumed_at, "created": _now()}))
            self._step = resumed_at

    def step(self, record: Mapping[str, Any]) -> None:
        """Write a step record; fields that are ``None`` are left out."""
        if self._file is not None:
            fields = {key: value for key, value in record.items() if value is not None}
            self._write(to_line({"kind": "step", **fields}))
            self._step = fields.get("step", self._step)

    def event(self, step: int, name: str, **details: Any) -> None:
        """Write that ``name`` happened at ``step``."""
        if self._file is not None:
            self._write(to_line({"kind": "event", "step": step, "event": name, **details}))

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Write metrics taken after ``step`` steps; each must be one number, else ``TypeError``."""
        numbers = {str(key): _number(key, value) for key, value in values.items()}
        if self._file is not None:
            self._write(to_line({"kind": "metrics", "step": step, "values": numbers}))

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
        with open_regular(self.path) as file:
            _, self._header, length = next(lines_of(file))
            checked_header(self._header, length, self.path)
            file.seek(-1, os.SEEK_END)
            return b"" if file.read(1) == b"\n" else b"\n"

    def _write(self, line: bytes) -> None:
        if self._file is None:
            return
        try:
            state = os.fstat(self._file.fileno())
            line = self._lost(self._file, state) + line
            self._size += len(line)
            while line:  # one write, unless the disk takes only a part: then the next one says why
                line = line[self._file.write(line) or 0 :]
        except OSError as error:
            self._give_up(error)

    def _lost(self, file: io.FileIO, state: os.stat_result) -> bytes:
        """What must be written first because somebody cut the log off meanwhile; ``OSError`` where there is no use."""
        if state.st_nlink == 0:
            raise FileNotFoundError(errno.ENOENT, "the file was deleted or replaced")
        if not self._is_in_place(state):
            self._notice("moved", "was moved or replaced: its records still go into the file that was opened first")
        lost, self._size = self._size - state.st_size, state.st_size
        if lost <= 0 or not stat.S_ISREG(state.st_mode):
            return b""
        file.seek(0)
        start = file.read(len(self._header)) or b""
        if not self._header.startswith(start):
            raise OSError(errno.EINVAL, "something else was written into the file")
        lead = b""
        if len(start) < len(self._header):
            file.truncate(0)
            self._size = 0
            lead = self._header
        else:
            file.seek(-1, os.SEEK_END)
            lead = b"" if file.read(1) == b"\n" else b"\n"
        self._notice("cut", f"was cut off while it was written: {lost} bytes are lost. The training and the log go on")
        return lead + to_line({"kind": "event", "step": self._step, "event": TRUNCATED, "lost_bytes": lost})

    def _is_in_place(self, state: os.stat_result) -> bool:
        try:
            return os.path.samestat(os.stat(self._place), state)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            return True  # it cannot be told

    def _notice(self, kind: str, what: str) -> None:
        if kind not in self._noticed:
            self._noticed.add(kind)
            warnings.warn(f"the run log {self.path} {what}", RunLogWarning, stacklevel=5)

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
    versions = {"python": platform.python_version()}
    for library in ("catapult_opt", "torch", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[library] = metadata.version(library)
    return versions
