"""What `catapult-opt report` and `plot` cost on large logs: seconds and peak memory, each command in its own process.

The logs are written first, as `CatapultMonitor` writes them: a million steps measured every 50th time, a million
measured every time, some with every other step above the critical rate, a metric and an event after every step, a run
resumed 20,000 times, and 500 runs of a thousand steps.

    python benchmarks/logs.py            # in a temporary folder of 0.7 GB: about 3 minutes
    python benchmarks/logs.py --quick    # a hundredth of the sizes

Seconds of the processor are steadier on a busy machine than those of the clock; both are printed. For the clock's
seconds to mean something, let nothing else run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

COMMAND = [sys.executable, "-m", "catapult_opt"]
HEADER = {"kind": "header", "format": "catapult_opt-run", "version": 1, "name": "run", "face": "CatapultSGD"}


def step(t: int, measured: bool, above: bool = False) -> dict[str, Any]:
    """A step record with numbers of full length."""
    record: dict[str, Any] = {
        "kind": "step",
        "step": t,
        "loss": 1.2345678901234567 / t,
        "effective_lr": 0.1234567890123,
    }
    if not measured:
        return {**record, "age": 3}
    record |= {"eta_crit": 0.2345678901234567, "lambda_max": 8.123456789012345, "residual": 0.012345678901234567}
    record |= {"matvecs": 2, "super_critical": above, "phase": "arm", "probe_seconds": 0.0012345678901234}
    return {**record, "elapsed": 0.012345678901234567, "ntk_lambda_max": 1.2345678901234567}


def rarely(steps: int) -> Iterator[dict[str, Any]]:
    """Every 50th step is measured."""
    return (step(t, t % 50 == 1) for t in range(1, steps + 1))


def always(steps: int) -> Iterator[dict[str, Any]]:
    """Every step is measured."""
    return (step(t, True) for t in range(1, steps + 1))


def alternating(steps: int) -> Iterator[dict[str, Any]]:
    """Every step is measured, every other one above the critical rate."""
    return (step(t, True, t % 2 == 0) for t in range(1, steps + 1))


def evaluated(steps: int) -> Iterator[dict[str, Any]]:
    """A metric and an event after every third step."""
    for t in range(1, steps // 3 + 1):
        yield step(t, t % 50 == 1)
        yield {"kind": "metrics", "step": t, "values": {"val_loss": 1 / t, "test_loss": 2 / t}}
        yield {"kind": "event", "step": t, "event": ("catapult_started", "catapult_recovered")[t % 2], "peak": 2.5}


def resumed(steps: int) -> Iterator[dict[str, Any]]:
    """Resumed after every tenth step, two steps back."""
    for t in range(1, steps + 1):
        yield step(t, False)
        if t % 10 == 0:
            yield {"kind": "resume", "step": t - 2}


def write(path: Path, records: Iterator[dict[str, Any]]) -> None:
    """A log of these records, written at once."""
    with open(path, "w") as file:
        file.write(json.dumps(HEADER) + "\n")
        file.writelines(json.dumps(record, separators=(",", ":")) + "\n" for record in records)


def cost(*arguments: str) -> tuple[int, float, float, float]:
    """Exit status, seconds of the processor, seconds of the clock and peak memory in MB of a command."""
    begun = time.perf_counter()
    process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    peak = used.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
    return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, time.perf_counter() - begun, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a hundredth of the sizes")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures there too")
    options = parser.parse_args()
    million, runs = (10_000, 5) if options.quick else (1_000_000, 500)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        single: dict[str, Callable[[int], Iterator[dict[str, Any]]]] = {
            "measured every 50th step": rarely,
            "measured every step": always,
            "every other step above": alternating,
            "metrics and events": evaluated,
        }
        picture = str(Path(folder, "run.png"))
        for name, make in single.items():
            path = Path(folder, "run.jsonl")
            write(path, make(million))
            for command in (["report", str(path)], ["plot", str(path), "-o", picture]):
                rows.append(row(f"{name}, {million:,} lines", command, path.stat().st_size))
            path.unlink()
        write(path, resumed(million // 5))
        rows.append(row(f"resumed {million // 50:,} times", ["report", str(path)], path.stat().st_size))
        path.unlink()
        many = Path(folder, "many")
        many.mkdir()
        for i in range(runs):
            write(many / f"run_{i}.jsonl", (step(t, t % 10 == 1) for t in range(1, 1001)))
        size = sum(path.stat().st_size for path in many.iterdir())
        for command in (["report", str(many)], ["report", str(many), "--json"], ["plot", str(many), "-o", picture]):
            rows.append(row(f"{runs} runs of 1,000 steps", command, size))
    show(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(any(row["status"] != 0 for row in rows))


def row(what: str, command: list[str], size: int) -> dict[str, Any]:
    """The figures of a command."""
    name = " ".join([command[0], *[part for part in command if part.startswith("--")]])
    status, processor, clock, peak = cost(*command)
    return {"log": what, "MB": size / 1e6, "command": name, "status": status} | {
        "processor": processor,
        "clock": clock,
        "peak": peak,
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table()
    for header in ("log", "MB", "command", "processor s", "clock s", "peak MB"):
        table.add_column(header, justify="left" if header in ("log", "command") else "right")
    for r in rows:
        figures = f"{r['processor']:.1f}", f"{r['clock']:.1f}", f"{r['peak']:.0f}"
        table.add_row(r["log"], f"{r['MB']:.0f}", r["command"] + " (failed)" * (r["status"] != 0), *figures)
    Console(width=None if sys.stdout.isatty() else 110).print(table)


if __name__ == "__main__":
    main()
