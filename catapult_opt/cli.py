"""The command line: ``catapult-opt report``, ``plot``, ``critical-lr`` and ``reproduce``.

Only the run log and the report are imported here, matplotlib when it is needed and torch only to reproduce, so that
looking at a running training is quick.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from catapult_opt import __version__
from catapult_opt import report as reports
from catapult_opt.runlog import FORMAT, RunLog, RunLogError, read_log

__all__ = ["main"]

_EXAMPLES = """\
examples:
  catapult-opt report run.jsonl                 one run
  catapult-opt report runs/ --sort best         every run log below a folder
  catapult-opt report runs/ --watch             while training; Ctrl-C ends it
  catapult-opt report runs/ --json | jq '.[].catapults'
  catapult-opt plot runs/batch_5.jsonl -o batch_5.png
  catapult-opt critical-lr train:setup          before training: a rate for each optimizer
  catapult-opt reproduce --list                 figures and tables of the thesis
  catapult-opt reproduce table-4.1 --quick

`catapult-opt COMMAND --help` has more of them. A run log is what CatapultSGD,
CatapultLR and CatapultMonitor write when given log="run.jsonl".

exit status: 0; 1 if a statement of the thesis fails (reproduce); 2 for wrong
arguments, or if something could not be read, measured, run or written; 130
after Ctrl-C (report --watch: 0).
"""

_REPORT = """\
A table with a row per run: super-critical steps, catapults, collapses, match
rate, curvature, best validation. Under it, per run, the loss and lambda_max
over the steps, with the catapults marked.
"""

_REPORT_EPILOG = """\
examples:
  catapult-opt report run.jsonl                 one run
  catapult-opt report runs/ --sort best         all below a folder, the best first
  catapult-opt report runs/ --watch 5           anew every 5 seconds, until Ctrl-C
  catapult-opt report runs/ --json | jq '.[].catapults'
  catapult-opt report runs/ --csv > runs.csv

keys to sort by:
  {keys}

In JSON, a figure that the log does not tell is null, and NaN and the
infinities are the strings "NaN", "Infinity" and "-Infinity".

exit status: 0, or 2 if a log could not be read (the others are reported all
the same); a log that was cut off is reported as far as it goes.
"""

_PLOT = """\
Loss, learning rate against the critical one, and lambda_max over the steps;
super-critical steps are shaded; catapults, collapses and spikes that were
undone are marked.
Needs matplotlib: pip install 'catapult_opt[plot]'.
"""

_PLOT_EPILOG = """\
examples:
  catapult-opt plot run.jsonl                   writes run.png
  catapult-opt plot runs/batch_5.jsonl -o batch_5.svg
  catapult-opt plot a.jsonl b.jsonl -o ab.pdf   side by side

exit status: 0, or 2 if a log could not be read (the others are drawn all the
same) or the picture not written.
"""

_CRITICAL = """\
The critical learning rate of your model on one batch, for each optimizer, and
a rate to start from: one command instead of a learning-rate range test. It
trains nothing: every figure is taken on a copy of the model.
"""

_CRITICAL_EPILOG = """\
FACTORY names a function without arguments that returns
(model, criterion, inputs, targets); (model, None, inputs) where the model
returns the loss. inputs may be a tensor, a tuple or a dict of arguments.

examples:
  catapult-opt critical-lr train:setup          setup() in train.py, here
  catapult-opt critical-lr project.models:small --json

  # train.py
  def setup():
      x, y = next(iter(loader))
      return model, torch.nn.MSELoss(), x, y

exit status: 0, or 2 if the factory cannot be used or the batch not measured.
"""

_REPRODUCE = """\
Run the experiment behind a figure or table of the thesis and judge what it
states: holds, holds in part, or fails. Leaves results, verdict and a picture
in DIR/NAME. Results that are there already are not run again, so the same
command goes on after an interruption.
"""

_REPRODUCE_EPILOG = """\
examples:
  catapult-opt reproduce --list                 what there is
  catapult-opt reproduce theorem-3.3.4 --quick  seconds, not the thesis' numbers
  catapult-opt reproduce table-4.1 --seeds 5    more seeds than recorded
  catapult-opt reproduce fig-4.3 --data DIR --download
  catapult-opt reproduce all --full --out full  may take days

Without --quick or --full, the setting that fits two CPU cores. Pictures need
matplotlib: pip install 'catapult_opt[plot]'.

exit status: 0; 1 if a statement fails; 2 if something could not be run; 130
after Ctrl-C, and the same command goes on.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):  # a name that the terminal cannot spell is no reason to fail
        sys.stdout.reconfigure(errors="replace")
    try:
        status = int(options.run(options))
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the flush at exit complains
        return 0
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="catapult-opt",
        description="Look at training runs: their critical learning rates and their catapults.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"catapult-opt {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_report(commands)
    _add_plot(commands)
    _add_critical(commands)
    _add_reproduce(commands)
    return parser


def _add_report(commands: Any) -> None:
    keys = "\n  ".join(textwrap.wrap(", ".join(reports.SORT_KEYS), 76))
    command = commands.add_parser(
        "report",
        help="a table of runs, with a sparkline each",
        description=_REPORT,
        epilog=_REPORT_EPILOG.format(keys=keys),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_runs(command)
    form = command.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print a JSON list, an object per run")
    form.add_argument("--csv", action="store_true", help="print comma-separated values, a line per run")
    form.add_argument(
        "--watch",
        metavar="SECONDS",
        type=_seconds,
        nargs="?",
        const=2.0,
        help="keep the report up to date, every 2 seconds if not given",
    )
    command.add_argument(
        "--sort", metavar="KEY", choices=list(reports.SORT_KEYS), help="sort the runs by a key, see below"
    )
    command.add_argument("--reverse", action="store_true", help="sort in descending order")
    command.set_defaults(run=_report)


def _add_plot(commands: Any) -> None:
    command = commands.add_parser(
        "plot",
        help="loss, rates and curvature of runs as a picture",
        description=_PLOT,
        epilog=_PLOT_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_runs(command)
    command.add_argument(
        "-o", "--output", metavar="FILE", help="picture to write, its suffix says the format (default: RUN.png)"
    )
    command.set_defaults(run=_plot)


def _add_critical(commands: Any) -> None:
    command = commands.add_parser(
        "critical-lr",
        help="the critical rate of your model for each optimizer, before training",
        description=_CRITICAL,
        epilog=_CRITICAL_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("factory", metavar="FACTORY", help="module:function, see below")
    command.add_argument("--json", action="store_true", help="print a JSON list, an object per optimizer")
    command.set_defaults(run=_critical)


def _add_reproduce(commands: Any) -> None:
    command = commands.add_parser(
        "reproduce",
        help="run a figure or table of the thesis, with a verdict",
        description=_REPRODUCE,
        epilog=_REPRODUCE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("names", metavar="NAME", nargs="*", help="fig-4.9, table-4.1, ... or all")
    command.add_argument("--list", action="store_true", help="name everything that can be reproduced")
    scale = command.add_mutually_exclusive_group()
    scale.add_argument("--quick", action="store_true", help="scaled down to seconds: not the thesis' numbers")
    scale.add_argument("--full", action="store_true", help="the thesis' own setting: may take hours or days on a CPU")
    command.add_argument("--seeds", metavar="N", type=_positive, help="repetitions (default: the setting's own)")
    command.add_argument("--data", metavar="DIR", type=Path, help="folder with the data sets")
    command.add_argument("--download", action="store_true", help="fetch data sets that DIR lacks")
    command.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="folder for results (default: runs/reproduce[-quick|-full])",
    )
    command.add_argument("--compare", metavar=("A.json", "B.json"), nargs=2, type=Path, help="two recorded results")
    command.add_argument(
        "--results",
        metavar="DIR",
        nargs="?",
        const="",
        help="for the repository: record the results in DIR, if given, and write RESULTS.md from all recorded ones",
    )
    command.add_argument(
        "--into", metavar="DIR", type=Path, default=Path("analysis"), help="where RESULTS.md goes (default: analysis)"
    )
    command.set_defaults(run=_reproduce)


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _add_runs(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "runs", metavar="RUN", nargs="+", type=Path, help="a run log, or a folder with run logs (*.jsonl) at any depth"
    )


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds: --watch goes after the runs") from None
    if not 0.05 <= seconds <= 86_400:
        raise argparse.ArgumentTypeError(f"{text} is not between 0.05 and 86400 seconds")
    return seconds


# ------------------------------------------------------------------------------------------------------------ finding


def _find(paths: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """The run logs meant by ``paths``, each once and in order, and what is wrong with the paths."""
    found: dict[str, Path] = {}
    problems = []
    for path in paths:
        files = sorted(_search(path), key=lambda file: reports.natural(str(file))) if path.is_dir() else [path]
        if not files:
            problems.append(f"{path}: no run logs (*.jsonl) in this folder")
        for file in files:
            found.setdefault(os.path.realpath(file), file)
    return list(found.values()), problems


def _search(folder: Path) -> Iterator[Path]:
    for root, _, names in os.walk(folder):
        yield from (path for name in names if name.endswith(".jsonl") and _looks_like_a_log(path := Path(root, name)))


def _looks_like_a_log(path: Path) -> bool:
    """Whether a file found in a folder is meant to be a run log; a folder may hold other .jsonl files too."""
    try:
        with open(path, "rb") as file:
            start = file.read(4096)
    except OSError:
        return True  # let the reader say why
    return not start or FORMAT.encode() in start


def _read(paths: Sequence[Path]) -> tuple[list[RunLog], list[str], list[str]]:
    """Logs, errors and warnings."""
    files, errors = _find(paths)
    logs, warnings = [], []
    for file in files:
        try:
            log = read_log(file)
        except RunLogError as error:
            errors.append(str(error))
            continue
        logs.append(log)
        warnings += [f"{file}: dropped {sentence}" for sentence in _first(log.dropped)]
    return logs, errors, warnings


def _first(sentences: Sequence[str], count: int = 3) -> list[str]:
    """The first few sentences, and how many there are beyond them."""
    rest = len(sentences) - count
    return [*sentences[:count]] + ([f"{rest} more"] if rest > 0 else [])


def _complain(errors: Sequence[str], warnings: Sequence[str] = ()) -> int:
    for kind, messages in (("warning", warnings), ("error", errors)):
        for message in messages:
            print(f"catapult-opt: {kind}: {reports.clean(message)}", file=sys.stderr)
    return 2 if errors else 0


# ----------------------------------------------------------------------------------------------------------- commands


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # main() deals with it; rich would exit with status 1


def _report(options: argparse.Namespace) -> int:
    sort = _sort(options)
    if options.watch is not None:
        return _watch(options.runs, sort, options.watch)
    logs, errors, warnings = _read(options.runs)
    status = _complain(errors, warnings)
    summaries = [reports.summarize(log) for log in logs]
    if options.json or options.csv:
        export = reports.to_json if options.json else reports.to_csv
        ordered = [summary for summary, _ in reports.sort_runs(zip(summaries, logs, strict=True), sort)]
        print(export(ordered).rstrip("\n"))
    elif logs:
        reports.render(summaries, logs, _Console(), sort=sort)
    return status


def _sort(options: argparse.Namespace) -> str | None:
    sort: str | None = options.sort
    return f"-{sort}" if sort and options.reverse else sort


def _watch(paths: Sequence[Path], sort: str | None, seconds: float) -> int:
    """Show the report until Ctrl-C; logs may come and go."""
    console = _Console()
    try:
        with Live(console=console, auto_refresh=False, vertical_overflow="ellipsis") as live:
            while True:
                live.update(_live_report(paths, sort, console), refresh=True)
                time.sleep(seconds)
    except KeyboardInterrupt:
        return 0


def _live_report(paths: Sequence[Path], sort: str | None, console: Console) -> RenderableType:
    logs, errors, _ = _read(paths)  # the line being written may be cut off: no matter here
    # Above the report, which may be longer than the terminal is high.
    parts: list[RenderableType] = [Text(f"{time.strftime('%H:%M:%S')}  Ctrl-C ends this\n", style="dim")]
    parts += [Text(f"waiting: {reports.clean(error)}\n", style="yellow") for error in errors]
    if logs:
        parts.append(reports.layout([reports.summarize(log) for log in logs], logs, console, sort=sort))
    return Group(*parts)


def _plot(options: argparse.Namespace) -> int:
    try:
        from catapult_opt import plots
    except ImportError as error:
        return _complain([str(error)])
    logs, errors, warnings = _read(options.runs)
    status = _complain(errors, warnings)
    if not logs:
        return status
    output = Path(options.output or (f"{logs[0].path.stem}.png" if len(logs) == 1 else "runs.png"))
    try:
        plots.save(logs, output)
    except (OSError, ValueError) as error:
        return _complain([f"{output}: cannot be written ({error})"])
    print(output)
    return status


def _critical(options: argparse.Namespace) -> int:
    from catapult_opt import MeasurementError
    from catapult_opt.starting_rates import FactoryError, run

    try:
        run(options.factory, options.json, _Console())
    except (FactoryError, MeasurementError) as error:
        return _complain([str(error)])
    return 0


def _reproduce(options: argparse.Namespace) -> int:
    command = importlib.import_module("catapult_opt.analysis.reproduce.command")  # loads torch
    return int(command.run(options, _Console(), Console(stderr=True)))
