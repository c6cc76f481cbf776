"""Promise: the picture of a long run is that of all its points, drawn from a few; marks of a kind are one collection.

Oracles: the points themselves; the picture of a run drawn point by point.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from catapult_opt import RunLog, plots, read_log
from catapult_opt.cli import main

HEADER = {"kind": "header", "format": "catapult_opt-run", "version": 1, "name": "run"}
MEASURED = {"eta_crit": 0.2, "lambda_max": 10.0}


def long_run(path: Path, above: Any, losses: Any, **events: list[int]) -> RunLog:
    """A run with these losses, of which all steps are measured, those in ``above`` super-critical."""
    above = set(above)
    records: list[dict[str, Any]] = [HEADER]
    for t, loss in enumerate(losses, 1):
        records.append({"kind": "step", "step": t, "loss": loss, "effective_lr": 0.1, **MEASURED})
        records[-1]["super_critical"] = t in above
    records += [{"kind": "event", "step": t, "event": name} for name, steps in events.items() for t in steps]
    path.write_text("\n".join(json.dumps(record, separators=(",", ":")) for record in records) + "\n")
    return read_log(path)


def test_no_spike_is_lost(tmp_path: Path) -> None:
    """One point in thirty is drawn; each spike up or down of a single step is among them, and each gap."""
    n = 60_000
    values = np.random.default_rng(0).uniform(1.0, 2.0, n)
    up, down, gaps = [7, 20_001, 59_999], [8, 31_234], [12_345, 44_000]
    values[up], values[down], values[gaps] = 1e3, 1e-3, np.nan
    drawn = plots._outline(values)
    assert len(drawn) < 11_000
    assert {*up, *down, *gaps, 0, n - 1} <= set(drawn.tolist())
    assert np.all(np.diff(drawn) > 0)
    for part in range(0, n, 30):  # of every stretch the extremes
        stretch, shown = values[part : part + 30], values[drawn[(drawn >= part) & (drawn < part + 30)]]
        assert np.nanmax(shown) == np.nanmax(stretch) and np.nanmin(shown) == np.nanmin(stretch)


@pytest.mark.parametrize("values", [np.full(9000, np.nan), np.full(9001, np.inf), np.zeros(0), np.arange(8001.0)])
def test_outline_of_anything(values: np.ndarray) -> None:
    drawn = plots._outline(values)
    assert len(drawn) == 0 or (drawn[0] == 0 and drawn[-1] == len(values) - 1)


def picture(log: RunLog) -> np.ndarray:
    figure = Figure(figsize=(8, 3), layout="constrained")
    plots.plot_loss(log, figure.subplots())
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].astype(float)


def test_the_picture_is_that_of_all_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = np.exp(np.random.default_rng(1).normal(size=50_000).cumsum() / 200)
    losses[[500, 30_000]] *= 50
    log = long_run(tmp_path / "run.jsonl", [], losses.tolist())
    short = picture(log)
    monkeypatch.setattr(plots, "_outline", lambda values: np.arange(len(values)))
    whole = picture(log)
    changed = np.abs(short - whole).max(axis=2) > 64
    assert changed.mean() < 0.01  # a few pixels at the edges of the line
    assert not np.array_equal(whole, np.full_like(whole, 255.0))


def test_every_other_step_above_is_one_collection(tmp_path: Path) -> None:
    """It was a patch for each of them: 120 seconds at 10,000 steps."""
    n = 10_000
    log = long_run(tmp_path / "run.jsonl", range(2, n + 1, 2), [1.0] * n, collapse=list(range(1, n, 3)))
    ax = plots.plot_loss(log)
    assert len(ax.patches) == 0 and len(ax.lines) == 1
    shaded, collapses = ax.collections
    assert len(shaded.get_paths()) == 1  # closer than the points of a picture
    assert shaded.get_paths()[0].get_extents().x0 == 1.5 and shaded.get_paths()[0].get_extents().x1 == n + 0.5
    assert 1000 < len(collapses.get_segments()) <= 4001


def test_short_runs_show_every_stretch_and_every_mark(tmp_path: Path) -> None:
    log = long_run(tmp_path / "run.jsonl", range(2, 61, 2), [1.0] * 60, restore=list(range(1, 60, 2)))
    shaded, undone = plots.plot_loss(log).collections
    extents = [path.get_extents() for path in shaded.get_paths()]
    assert [(box.x0, box.x1) for box in extents] == [(t - 0.5, t + 0.5) for t in range(2, 61, 2)]
    assert len(undone.get_segments()) == 30


def test_of_many_runs_the_first_are_drawn_and_a_line_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "MOST_RUNS", 2)
    for i in range(5):
        long_run(tmp_path / f"run_{i}.jsonl", [], [1.0, 0.5])
    (tmp_path / "run_0.jsonl").write_text("damaged: catapult_opt-run")
    assert main(["plot", str(tmp_path), "-o", str(tmp_path / "many.png")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0].endswith("only the first 2 runs are drawn, 2 more are not: name those to be drawn")
    assert "run_0.jsonl" in said[1] and len(said) == 2
    with pytest.raises(ValueError, match="logs must be 1 to 2 runs, got 3: draw them in several pictures"):
        plots.save([read_log(tmp_path / f"run_{i}.jsonl") for i in (1, 2, 3)], tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()
