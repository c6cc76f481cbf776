"""Every figure of the report against one worked out by hand, and the report legible wherever it is shown."""

import csv
import io
import json
import math
import re
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from catapult_opt.report import SORT_KEYS, layout, render, sort_runs, summarize, to_csv, to_json
from catapult_opt.runlog import RunLog

LOSS = [1.0, 0.8, 2.0, 0.5, 0.6, 0.4, 0.7, 0.3]  # of steps 1 to 8; the rate is 0.1 throughout
ETA_CRIT = {1: 0.2, 2: 0.05, 3: 0.08, 4: 0.2, 6: 0.04, 7: 0.3}  # steps 5 and 8 are not measured
EVENTS = [(2, "catapult_started"), (3, "catapult_peaked"), (4, "catapult_recovered"), (5, "back_off"), (6, "collapse")]
EVENTS += [(6, "catapult_started"), (7, "catapult_peaked"), (7, "restore"), (8, "measurement_failed")]
METRICS = {2: {"val_loss": 0.9}, 4: {"val_loss": 0.3, "test_loss": 0.35, "agop_alignment": 0.8}}
METRICS[6] = {"val_loss": 0.5, "test_loss": 0.2, "agop_alignment": 0.9}


def make_log(name="hand", *, loss=LOSS, eta_crit=ETA_CRIT, events=EVENTS, metrics=METRICS, batch_size=5, rate=0.1):
    header = {"name": name, "face": "CatapultSGD", "settings": {}, "batch_size": batch_size, "parameters": 1024}
    steps = [{"kind": "step", "step": t, "loss": value, "effective_lr": rate} for t, value in enumerate(loss, start=1)]
    for t, critical in eta_crit.items():
        steps[t - 1] |= {"eta_crit": critical, "lambda_max": 2 / critical, "super_critical": rate - critical > 1e-8}
        steps[t - 1] |= {"phase": "arm", "probe_seconds": 0.25, "matvecs": 2, "residual": 0.01}
    log = RunLog(Path(f"{name}.jsonl"), header, steps)
    log.events.extend({"kind": "event", "step": step, "event": event} for step, event in events)
    log.metrics.extend({"kind": "metrics", "step": step, "values": values} for step, values in metrics.items())
    return log


def shown(logs, width=80, *, terminal=True, encoding="utf-8", **options):
    """What ``render`` prints, as plain text."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=file, width=width, force_terminal=terminal, color_system="standard" if terminal else None)
    render([summarize(log) for log in logs], logs, console, **options)
    file.seek(0)
    return re.sub(r"\x1b\[[0-9;]*m", "", file.read())


# --------------------------------------------------------------------------------------------------------- figures


def test_every_figure_of_the_hand_written_log():
    summary = summarize(make_log())
    assert (summary.name, summary.path, summary.face) == ("hand", "hand.jsonl", "CatapultSGD")
    assert (summary.batch_size, summary.parameters) == (5, 1024)
    assert (summary.steps, summary.measured) == (8, 6)
    assert (summary.super_critical, summary.super_critical_until) == (2, 4)  # steps 2 and 3; step 6 is past the best
    assert (summary.catapults, summary.collapses, summary.back_offs, summary.restores) == (1, 1, 1, 1)
    assert summary.failed_measurements == 1
    assert (summary.match_loss, summary.match_rises) == ("batch_loss", 3)  # rises at 2, 4 and 6, super-critical 2 and 6
    assert summary.match_rate == pytest.approx(2 / 3)
    assert summary.lambda_start == pytest.approx(10.0)
    assert summary.lambda_end == pytest.approx(2 / 0.3)
    assert (summary.best_metric, summary.best_value, summary.best_step) == ("val_loss", 0.3, 4)
    assert (summary.test_metric, summary.test_value) == ("test_loss", 0.35)
    assert (summary.agop, summary.agop_step) == (0.8, 4)
    assert summary.probe_seconds == 1.5
    assert summary.dropped == ()


def test_log_without_records_has_no_figures():
    summary = summarize(make_log(loss=[], eta_crit={}, events=[], metrics={}))
    assert (summary.steps, summary.measured, summary.super_critical, summary.match_rises) == (0, 0, 0, 0)
    assert summary.match_rate is summary.match_loss is summary.lambda_start is summary.lambda_end is None
    assert summary.best_metric is summary.best_step is summary.test_value is summary.agop is None


def test_super_critical_steps_are_counted_throughout_where_no_validation_loss_is_known():
    assert summarize(make_log(metrics={})).super_critical == 3
    accuracy_only = summarize(make_log(metrics={4: {"val_acc": 0.9}}))
    assert (accuracy_only.super_critical, accuracy_only.super_critical_until) == (3, None)


def test_super_critical_steps_count_up_to_and_with_the_best_validation_step():
    for best, count in ((1, 0), (2, 1), (3, 2), (6, 3)):
        assert summarize(make_log(metrics={best: {"val_loss": 0.1}, 8: {"val_loss": 0.2}})).super_critical == count


def test_match_rate_takes_the_full_training_loss_where_it_is_logged():
    # After 0 to 4 updates. Step 1 falls; 2 and 3 rise, super-critical; 4 rises and is not; the others have no pair.
    train = {t: {"train_loss": value} for t, value in enumerate([1.0, 0.5, 0.6, 0.7, 0.9])}
    summary = summarize(make_log(metrics=train))
    assert (summary.match_loss, summary.match_rises) == ("train_loss", 3)
    assert summary.match_rate == pytest.approx(2 / 3)
    falling_then = summarize(make_log(metrics=train | {3: {"train_loss": 0.1}}))  # now only 2 and 4 rise
    assert (falling_then.match_rises, falling_then.match_rate) == (2, 0.5)


def test_match_rate_needs_consecutive_training_losses():
    sparse = {t: {"train_loss": float(t)} for t in (2, 4, 6)}
    assert summarize(make_log(metrics=sparse)).match_loss == "batch_loss"


def test_match_rate_skips_steps_that_are_missing_from_the_log():
    log = make_log()
    del log.steps[2]  # step 3: whether the loss rose at step 2 cannot be known, and 2 -> 4 is not a step
    summary = summarize(log)
    assert (summary.match_rises, summary.match_rate) == (2, 0.5)


def test_loss_that_stays_the_same_has_not_risen():
    assert summarize(make_log(loss=[1.0, 0.5, 0.5, 0.5, 0.4, 0.4, 0.4, 0.4])).match_rises == 0


def test_match_rate_is_unknown_not_zero_where_the_loss_never_rose():
    summary = summarize(make_log(loss=[8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]))
    assert (summary.match_rate, summary.match_rises) == (None, 0)


def test_match_rate_of_a_nan_loss_counts_no_rise_into_it():
    summary = summarize(make_log(loss=[1.0, 0.8, math.nan, math.nan, 0.6, 0.4, math.inf, 0.3]))
    assert (summary.match_rises, summary.match_rate) == (1, 1.0)  # 6 -> inf


@pytest.mark.parametrize(
    ("metrics", "best"),
    [
        ({1: {"val_acc": 0.7}, 2: {"val_acc": 0.9}, 3: {"val_acc": 0.8}}, ("val_acc", 2, 0.9)),
        ({1: {"valid_AUC": 0.7}, 2: {"valid_AUC": 0.9}}, ("valid_AUC", 2, 0.9)),
        ({1: {"val_error": 0.7}, 2: {"val_error": 0.9}}, ("val_error", 1, 0.7)),
        ({1: {"val_acc": 0.9, "val_loss": 0.7}, 2: {"val_acc": 0.8, "val_loss": 0.6}}, ("val_loss", 2, 0.6)),
        ({1: {"val_loss": math.nan}, 2: {"val_loss": 0.9}, 3: {"val_loss": -math.inf}}, ("val_loss", 2, 0.9)),
        ({1: {"val_loss": 0.5}, 2: {"val_loss": 0.5}}, ("val_loss", 1, 0.5)),
        ({1: {"val_loss": math.nan}}, (None, None, None)),
        ({1: {"train_loss": 0.1, "interval": 3.0}}, (None, None, None)),
    ],
)
def test_best_validation(metrics, best):
    summary = summarize(make_log(metrics=metrics))
    assert (summary.best_metric, summary.best_step, summary.best_value) == best


def test_test_metric_is_the_counterpart_at_the_best_validation_step():
    both = {3: {"val_loss": 0.1, "test_acc": 0.9, "test_loss": 0.2}}
    assert summarize(make_log(metrics=both)).test_metric == "test_loss"
    elsewhere = summarize(make_log(metrics={3: {"val_loss": 0.1}, 4: {"test_loss": 0.2}}))
    assert (elsewhere.test_metric, elsewhere.test_value) == (None, None)


def test_metrics_of_one_step_may_come_in_several_records():
    log = make_log(metrics={4: {"val_loss": 0.3}})
    log.metrics.append({"kind": "metrics", "step": 4, "values": {"test_loss": 0.4, "agop_alignment": 0.7}})
    summary = summarize(log)
    assert (summary.test_value, summary.agop, summary.agop_step) == (0.4, 0.7, 4)


def test_agop_is_the_last_one_where_none_was_logged_at_the_best_validation_step():
    summary = summarize(
        make_log(metrics={2: {"val_loss": 0.1}, 3: {"agop_alignment": 0.5}, 5: {"agop_alignment": 0.6}})
    )
    assert (summary.agop, summary.agop_step) == (0.6, 5)
    assert "0.600†" in shown([make_log(metrics={2: {"val_loss": 0.1}, 5: {"agop_alignment": 0.6}})])


# -------------------------------------------------------------------------------------------------- sorting, exports


def test_sort_by_every_key():
    runs = [make_log("batch_10", batch_size=10, metrics={}), make_log("batch_5", batch_size=5), make_log("batch_7")]
    runs[2].header["batch_size"] = None
    pairs = [(summarize(log), log) for log in runs]
    assert [s.name for s, _ in sort_runs(pairs, "name")] == ["batch_5", "batch_7", "batch_10"]
    assert [s.name for s, _ in sort_runs(pairs, "batch")] == ["batch_5", "batch_10", "batch_7"]
    assert [s.name for s, _ in sort_runs(pairs, "-batch")] == ["batch_10", "batch_5", "batch_7"]  # unknown stays last
    assert sort_runs(pairs, None) == pairs
    for key in SORT_KEYS:
        assert {s.name for s, _ in sort_runs(pairs, f"-{key}")} == {"batch_5", "batch_7", "batch_10"}


def test_json_is_strict_and_complete():
    log = make_log(metrics={})
    log.steps[6]["loss"] = math.inf
    (run,) = json.loads(to_json([summarize(log)]), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (run["catapults"], run["match_rate"], run["best_value"], run["dropped"]) == (1, 2 / 3, None, [])
    infinite = summarize(make_log(metrics={2: {"val_loss": 0.1, "test_loss": math.inf}}))
    assert json.loads(to_json([infinite]))[0]["test_value"] == "Infinity"


def test_csv_has_a_line_per_run():
    log = make_log("a, b")
    log.dropped.extend(["line 2: x", "line 3: y"])
    rows = list(csv.DictReader(io.StringIO(to_csv([summarize(log), summarize(make_log(metrics={}))]))))
    assert (rows[0]["name"], rows[0]["super_critical"], rows[0]["dropped"]) == ("a, b", "2", "line 2: x; line 3: y")
    assert rows[1]["best_value"] == ""


# ------------------------------------------------------------------------------------------------------- the display


def long_run(name="run", steps=2000, spike_at=1234):
    loss = [math.exp(-t / 400) for t in range(1, steps + 1)]
    loss[spike_at - 1] = 50.0
    events = [(spike_at - 1, "catapult_started"), (spike_at, "catapult_peaked"), (spike_at + 9, "catapult_recovered")]
    metrics = {t: {"val_loss": 1 / t, "test_loss": 2 / t, "agop_alignment": 0.5} for t in range(100, steps + 1, 100)}
    eta_crit = {t: 0.01 * t for t in range(1, steps + 1, 20)}
    events += [(steps // 2, "collapse")]
    return make_log(name, loss=loss, eta_crit=eta_crit, events=events, metrics=metrics, batch_size=2000)


@pytest.mark.parametrize("width", [80, 100, 140, 200])
def test_report_fits_the_terminal_with_nothing_cut_off(width):
    text = shown([long_run("batch_5"), long_run("a-rather-long-name-for-a-run", 24_000)], width)
    assert max(cell_len(line) for line in text.splitlines()) <= width
    assert "…" not in text
    for figure in ("2000", "24000", "(1200)", "batch_5", "val_loss", "AGOP", "0.500"):
        assert figure in text


def test_one_table_at_80_columns_for_ordinary_runs():
    text = shown([long_run("batch_5"), long_run("full_batch")], 80)
    assert sum(line.startswith("───") for line in text.splitlines()) == 1
    assert "full_batch" in text


def test_figures_as_shown():
    lines = shown([make_log()], 200).splitlines()
    cells = re.split(r"\s{2,}", lines[2].strip())
    assert cells == ["hand", "5", "8 (6)", "2", "1", "1", "66.7%* of 3", "10.0 → 6.67", "0.300 @ 4", "0.350", "0.800"]


def test_notes_say_how_the_figures_were_counted():
    text = shown([make_log()], 200)
    assert "up to the best validation loss" in text
    assert "exact only for the full batch" in text
    assert "up to the best validation loss where known" in shown([make_log(), make_log(metrics={})], 200)
    train = {t: {"train_loss": value} for t, value in enumerate([1.0, 0.5, 0.6])}
    plain = shown([make_log(metrics=train)], 200)
    assert "up to the best" not in plain
    assert "exact only" not in plain


def test_columns_without_a_figure_are_left_out():
    bare = shown([make_log(eta_crit={}, events=[], metrics={}, batch_size=None)], 200).split("\n\n")[0]
    for word in ("batch", "super", "match", "λ", "best", "test", "AGOP"):
        assert word not in bare
    assert "catapults" in bare


@pytest.mark.parametrize("width", [10, 24, 40, 60])
def test_narrow_terminal_is_no_crash_and_keeps_names(width):
    text = shown([long_run("batch_5")], width)
    assert max(cell_len(line) for line in text.splitlines()) <= width
    assert "batch_5" in text or width < 24


def test_pipe_gets_plain_text_at_full_width():
    text = shown([long_run("x" * 150), long_run("b")], 80, terminal=False)
    assert "\x1b" not in text
    assert "x" * 150 in text.splitlines()[2]
    assert "…" not in text
    assert text == shown([long_run("x" * 150), long_run("b")], 40, terminal=False)


def test_terminal_gets_colour():
    file = io.StringIO()
    render([summarize(make_log())], [make_log()], Console(file=file, width=80, force_terminal=True))
    assert "\x1b[" in file.getvalue() or Console().no_color


def spark(text, label):
    """The characters of a sparkline: between its label and the range after it."""
    line = next(line for line in text.splitlines() if line.strip().startswith(label + " "))
    return line.strip().removeprefix(label).strip().split("  ")[0].split(" ")[0]


def test_spike_of_one_step_survives_in_the_sparkline_with_its_catapult_under_it():
    text = shown([long_run(spike_at=1234)], 80)
    loss = spark(text, "loss")
    assert loss.count("█") == 1
    assert abs(loss.index("█") / len(loss) - 1234 / 2000) < 1.5 / len(loss)
    lines = text.splitlines()
    row = next(i for i, line in enumerate(lines) if line.strip().startswith("loss "))
    assert lines[row].index("█") == lines[row + 2].index("▲")
    assert lines[row + 2].count("▲") == 1
    assert lines[row + 2].count("×") == 1  # noqa: RUF001
    assert "1 catapult" in lines[row + 2]


def test_sparkline_of_known_values():
    loss = [1.0, 10.0, 100.0, 1000.0, 1e4, 1e5, 1e6, 1e7]
    text = shown([make_log(loss=loss, eta_crit={}, events=[], metrics={})], 80)
    assert spark(text, "loss") == "▁▂▃▄▅▆▇█"
    assert "1.00 – 1.00e7" in text  # noqa: RUF001


@pytest.mark.parametrize(
    ("loss", "expected"),
    [([math.nan] * 3, "!!!"), ([1.0, math.inf, 1.0], "▁!▁"), ([0.0, -1.0, 5.0], "▁▁▁"), ([0.0, 1.0, 8.0], "▁▁█")],
)
def test_sparkline_of_losses_without_logarithm(loss, expected):
    assert spark(shown([make_log(loss=loss, eta_crit={}, events=[], metrics={})]), "loss") == expected


def test_console_that_cannot_show_blocks_gets_ascii():
    text = shown([long_run("größe"), make_log()], 80, encoding="ascii")
    assert text.isascii()
    assert "gr??e" in text
    assert "^" in text
    assert "lambda" in text


def test_name_from_a_foreign_log_sends_nothing_to_the_terminal():
    text = shown([make_log("\x1b[31mred\x07[bold]x\nnew")], 200)
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "?[31mred?[bold]x?new" in text


def test_run_without_steps_and_no_runs_at_all():
    assert "no steps yet" in shown([make_log(loss=[], eta_crit={}, events=[], metrics={})])
    assert shown([]) == "no runs\n"


def test_layout_agrees_with_render_in_a_terminal():
    log, file = make_log(), io.StringIO()
    console = Console(file=file, width=80, force_terminal=True, color_system=None)
    console.print(layout([summarize(log)], [log], console))
    assert file.getvalue() == shown([log])


# ------------------------------------------------------------------------------------------------------------- plots


def test_plot_shows_the_runs_numbers():
    pytest.importorskip("matplotlib")
    from catapult_opt import plots

    loss, rates, curvature = plots.plot_run(make_log())
    assert list(loss.lines[0].get_ydata()) == LOSS
    assert list(loss.lines[0].get_xdata()) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert list(rates.lines[0].get_xdata()) == list(ETA_CRIT)
    assert list(rates.lines[0].get_ydata()) == list(ETA_CRIT.values())
    assert list(rates.lines[1].get_ydata()) == [0.1] * 8
    assert list(curvature.lines[0].get_ydata()) == [2 / critical for critical in ETA_CRIT.values()]
    shaded, *marks = loss.collections  # each one collection, however many there are
    spans = [path.get_extents() for path in shaded.get_paths()]
    assert [(box.x0, box.x1) for box in spans] == [(1.5, 3.5), (5.5, 6.5)]
    marked = {mark.get_label(): [segment[0][0] for segment in mark.get_segments()] for mark in marks}
    assert marked == {"catapult": [3], "collapse": [6], "undone": [7]}


def test_plot_takes_the_users_axes_and_saves_runs_side_by_side(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from catapult_opt import plots

    ax = Figure().subplots()
    assert plots.plot_loss(make_log(), ax=ax) is ax
    empty = make_log(loss=[], eta_crit={}, events=[], metrics={})
    plots.save([make_log("a $x$ b"), empty, long_run()], tmp_path / "new" / "runs.png")
    assert (tmp_path / "new" / "runs.png").read_bytes().startswith(b"\x89PNG")
