"""The command line: ``catapult-opt report``, ``plot``, ``critical-lr`` and ``reproduce``.

Here are the arguments, the help, and how the program ends; what the commands do is in `commands`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import __version__, plain

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
infinities are the strings "NaN", "Infinity" and "-Infinity". In CSV, texts
have "?" for control characters, and an apostrophe before = + - or @, so that
no spreadsheet takes a run's name for a formula.

exit status: 0, or 2 if a log could not be read (the others are reported all
the same); a log that was cut off is reported as far as it goes.
"""

_PLOT = """\
Loss, learning rate against the critical one, and lambda_max over the steps;
super-critical steps are shaded; catapults, collapses and spikes that were
undone are marked. Of more than 12 runs, the first 12 are drawn.
Needs matplotlib: pip install 'catapult_opt[plot]'.
"""

_PLOT_EPILOG = """\
examples:
  catapult-opt plot run.jsonl                   writes run.png
  catapult-opt plot runs/batch_5.jsonl -o batch_5.svg
  catapult-opt plot a.jsonl b.jsonl -o ab.pdf   side by side
  catapult-opt plot run.jsonl -o - > run.png    to standard output

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

What FACTORY prints goes to standard error.

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
    """Run the command line; returns the exit status.

    Raises:
        SystemExit: after ``--help`` and ``--version`` (status 0), and on wrong arguments (2).
    """
    if sys.stderr is None:  # closed: print() would take standard output instead
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is None:
        return _fail("standard output is closed")
    if hasattr(sys.stdout, "reconfigure"):  # a name that the terminal cannot spell is no reason to fail
        sys.stdout.reconfigure(errors="replace")
    try:
        return _run(argv)
    except BrokenPipeError:  # `| head` has seen enough
        _discard_output()
        return 0
    except OSError as error:
        _discard_output()
        return _fail(f"{error.filename or 'standard output'}: {error.strerror or error}")
    except KeyboardInterrupt:
        return 130


def _run(argv: Sequence[str] | None) -> int:
    try:
        options = _parser().parse_args(argv)
        from . import commands  # not before: until here, Ctrl-C finds little to interrupt

        return int(getattr(commands, options.run)(options))
    finally:
        sys.stdout.flush()  # here, where it can still be told if that fails


def _fail(message: str) -> int:
    plain.tell("error", message)
    return 2


def _discard_output() -> None:
    """What is still to be written goes nowhere: else the flush at exit complains."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
    from .summary import SORT_KEYS

    keys = "\n  ".join(textwrap.wrap(", ".join(SORT_KEYS), 76))
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
    command.add_argument("--sort", metavar="KEY", choices=list(SORT_KEYS), help="sort the runs by a key, see below")
    command.add_argument("--reverse", action="store_true", help="sort in descending order")
    command.set_defaults(run="report_runs")


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
        "-o",
        "--output",
        metavar="FILE",
        help="picture to write: its suffix names the format, PNG without one; - is standard output (default: RUN.png)",
    )
    command.set_defaults(run="plot_runs")


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
    command.set_defaults(run="critical_rates")


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
    command.set_defaults(run="reproduce")


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
