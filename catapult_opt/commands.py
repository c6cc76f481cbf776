"""What the commands of ``catapult-opt`` do; `cli` has their arguments.

matplotlib is imported when it is needed and torch only to measure or reproduce: looking at a running training is quick.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from . import logfiles, plain, report, summary
from .runlog import RunLog, RunLogError, read_log

STDOUT = ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")  # a picture's name that means standard output


class Screen(Console):
    """A console that leaves a closed pipe to the caller, and takes a terminal of no size for an ordinary one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.width < 1:
            self.width = 80
        if self.height < 1:
            self.height = 25

    def on_broken_pipe(self) -> None:
        """Let `cli.main` deal with it; rich would exit with status 1."""
        raise BrokenPipeError


def complain(errors: Sequence[str], warnings: Sequence[str] = ()) -> int:
    """Tell on standard error; the exit status that follows."""
    for kind, messages in (("warning", warnings), ("error", errors)):
        for message in messages:
            plain.tell(kind, message)
    return 2 if errors else 0


# ------------------------------------------------------------------------------------------------------------- report


def report_runs(options: argparse.Namespace) -> int:
    """``catapult-opt report``."""
    sort = f"-{options.sort}" if options.sort and options.reverse else options.sort
    if options.watch is not None:
        return _watch(options.runs, sort, options.watch)
    found = logfiles.read_all(options.runs)
    status = complain(found.errors, found.warnings)
    summaries = [summary.summarize(log) for log in found.logs]
    if options.json or options.csv:
        export = summary.to_json if options.json else summary.to_csv
        ordered = [one for one, _ in summary.sort_runs(zip(summaries, found.logs, strict=True), sort)]
        print(export(ordered).rstrip("\n"))
    elif found.logs:
        report.render(summaries, found.logs, Screen(), sort=sort)
    return status


def _watch(paths: Sequence[Path], sort: str | None, seconds: float) -> int:
    """Show the report until Ctrl-C; logs may come, go, grow and shrink."""
    console, logs = Screen(), _Cache()
    received: list[int] = []
    try:
        with _ended_by_signals(received):
            if not console.is_terminal:
                _every(seconds, _Text(paths, sort, console, logs).show)
            with Live(console=console, auto_refresh=False, vertical_overflow="ellipsis") as live:
                _every(seconds, lambda: live.update(_live_report(paths, sort, console, logs), refresh=True))
    except KeyboardInterrupt:
        return 128 + received[0] if received else 0


@contextlib.contextmanager
def _ended_by_signals(received: list[int]) -> Iterator[None]:
    """SIGTERM and SIGHUP end the watch as Ctrl-C does, so that the terminal gets its cursor back."""

    def end(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one ends it at once
        received.append(number)
        raise KeyboardInterrupt

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {n: signal.signal(n, end) for n in numbers if signal.getsignal(n) == signal.SIG_DFL}  # nohup ignores one
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _every(seconds: float, show: Callable[[], None]) -> NoReturn:
    while True:
        begun = time.monotonic()
        show()
        time.sleep(max(seconds, time.monotonic() - begun))  # reading large logs takes half the time at most


def _live_report(paths: Sequence[Path], sort: str | None, console: Console, logs: _Cache) -> RenderableType:
    errors, runs = logs.read_all(paths)
    # Above the report, which may be longer than the terminal is high.
    parts: list[RenderableType] = [Text(f"{time.strftime('%H:%M:%S')}  Ctrl-C ends this\n", style="dim")]
    parts += [Text(f"waiting: {plain.clean(error)}\n", style="yellow") for error in errors]
    if runs:
        parts.append(report.layout([one for one, _ in runs], [log for _, log in runs], console, sort=sort))
    return Group(*parts)


@dataclass
class _Text:
    """The report where there is no terminal: printed anew whenever it has changed."""

    paths: Sequence[Path]
    sort: str | None
    console: Console
    logs: _Cache
    before: str = ""

    def show(self) -> None:
        """Print it if it has changed."""
        errors, runs = self.logs.read_all(self.paths)
        with self.console.capture() as captured:
            for error in errors:
                self.console.print(Text(f"waiting: {plain.clean(error)}"), soft_wrap=True)
            if runs:
                report.render([one for one, _ in runs], [log for _, log in runs], self.console, sort=self.sort)
        if captured.get() != self.before:
            self.before = captured.get()
            print(time.strftime("%H:%M:%S"), self.before, sep="\n", flush=True)


_Run = tuple[summary.RunSummary, RunLog]


class _Cache:
    """Reads logs anew only where they have changed."""

    def __init__(self) -> None:
        self._read: dict[Path, tuple[object, _Run | str]] = {}

    def read_all(self, paths: Sequence[Path]) -> tuple[list[str], list[_Run]]:
        """What cannot be read and why, and the logs that can be read with their figures."""
        files, errors = logfiles.find(paths)
        read = [self._read_one(file) for file in files]
        self._read = {path: self._read[path] for path in files}
        return errors + [one for one in read if isinstance(one, str)], [one for one in read if not isinstance(one, str)]

    def _read_one(self, path: Path) -> _Run | str:
        try:
            state = os.stat(path)
            stamp: object = (state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
        except OSError as error:
            stamp = error.errno
        if path not in self._read or self._read[path][0] != stamp:
            self._read[path] = (stamp, self._anew(path))
        return self._read[path][1]

    def _anew(self, path: Path) -> _Run | str:
        try:
            log = read_log(path)  # the line being written may be cut off: no matter here
        except RunLogError as error:
            return str(error)
        return summary.summarize(log), log


# --------------------------------------------------------------------------------------------------------------- plot


def plot_runs(options: argparse.Namespace) -> int:
    """``catapult-opt plot``."""
    try:
        from . import plots
    except ImportError as error:
        return complain([str(error)])
    except Exception as error:  # such as a back end that does not exist, in its settings
        return complain([f"matplotlib cannot be loaded: {error}"])
    found = logfiles.read_all(options.runs, most=plots.MOST_RUNS)
    if found.unread:
        found.warnings.append(
            f"only the first {plots.MOST_RUNS} runs are drawn, {found.unread} more are not: name those to be drawn"
        )
    status = complain(found.errors, found.warnings)
    if not found.logs:
        return status
    default = f"{found.logs[0].path.stem}.png" if len(found.logs) == 1 else "runs.png"
    output = default if options.output is None else options.output
    try:
        if output in STDOUT:
            _refuse_terminal()
            plots.save(found.logs, sys.stdout.buffer)
            return status
        path = _picture(output, found.logs)
        if path.exists() and not path.is_file():
            with open(path, "wb", opener=_open_without_waiting) as file:
                plots.save(found.logs, file)
        else:
            plots.save(found.logs, path)
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        return complain([f"{output or repr(output)}: cannot be written ({reason})"])
    print(plain.clean(str(path)))
    return status


def _open_without_waiting(path: str, flags: int) -> int:
    """Open a device or a pipe; a pipe that nobody reads is an error."""
    opened = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    os.set_blocking(opened, True)
    return opened


def _refuse_terminal() -> None:
    if sys.stdout.isatty():
        raise ValueError("a picture is nothing for a terminal: redirect it, or name a file with -o")


def _picture(output: str, logs: Sequence[RunLog]) -> Path:
    """The file to write; ``ValueError`` where it would take the place of something else."""
    path = Path(output)
    if not output or path.is_dir():
        raise ValueError("it is a folder: name a file" if output else "it is no name of a file")
    if path.parent.exists() and not path.parent.is_dir():
        raise ValueError(f"{path.parent} is no folder")
    special = path.exists() and not path.is_file()
    if not path.suffix and not special:
        path = path.with_name(f"{path.name}.png")
    if any(path.exists() and path.samefile(log.path) for log in logs):
        raise ValueError("it is one of the run logs")
    return path


# ----------------------------------------------------------------------------------------- critical rates, the thesis


def critical_rates(options: argparse.Namespace) -> int:
    """``catapult-opt critical-lr``."""
    from .starting_rates import FactoryError, run

    try:
        run(options.factory, options.json, Screen())
    except FactoryError as error:
        return complain([str(error)])
    return 0


def reproduce(options: argparse.Namespace) -> int:
    """``catapult-opt reproduce``."""
    command = importlib.import_module("catapult_opt.analysis.reproduce.command")
    return int(command.run(options, Screen(), Console(stderr=True)))
