"""What a run log says in figures: :func:`summarize`, and how runs are sorted and exported.

Match rate (thesis, Table 4.2): of the steps t on which the training loss rose, L(t+1) > L(t), the share whose rate was
above the critical one, eta(t) > eta_crit(t). Only measured steps count, nothing is extrapolated.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from . import plain
from .runlog import RunLog, encode
from .runlog_columns import Floats, Integers, Records
from .runlog_reader import columns_of, last_of_each

__all__ = ["SORT_KEYS", "RunSummary", "natural", "sort_runs", "summarize", "to_csv", "to_json"]


@dataclass(frozen=True)
class RunSummary:
    """The figures of one run; ``None`` where the log does not tell.

    Attributes:
        name: the run's name.
        path: the file.
        face: the class that wrote the log, such as CatapultSGD.
        batch_size: samples in the first step's batch.
        parameters: how many numbers are trained.
        steps: step records in the log.
        measured: how many of these have the critical learning rate measured.
        super_critical: measured steps with eta - eta_crit > 1e-8, up to ``super_critical_until``.
        super_critical_until: the step of the best validation loss; None where all steps count.
        catapults: episodes in which the loss rose, peaked and came back, with a smaller lambda_max.
        collapses: how often lambda_max went to zero (dead units).
        back_offs: how often the rate was lowered because a spike did not come down.
        restores: how often a spike was undone by going back to earlier weights.
        failed_measurements: how often no critical rate could be measured.
        match_rate: the share, from 0 to 1, of ``match_rises`` whose rate was above the critical one.
        match_rises: measured steps on which the loss rose.
        match_loss: which loss that is: "train_loss", or "batch_loss", which is exact only for the full batch.
        lambda_start: the first finite measured lambda_max.
        lambda_end: the last one.
        best_metric: the validation metric by which the best step is found; a loss goes before others.
        best_value: its best value.
        best_step: the step of that value.
        test_metric: the test metric that goes with the validation metric.
        test_value: its value at ``best_step``.
        agop: the AGOP alignment at ``best_step`` where it was logged there, else the last one.
        agop_step: the step of that value.
        probe_seconds: seconds spent measuring.
        probe_share: that time as a share of the running time up to the last measurement.
        extra_bytes: memory that the optimizer keeps between the steps beside the weights.
        oldest: the greatest age, in steps, of a critical rate in use.
        dropped: what is missing from the log, one sentence each.
    """

    name: str
    path: str
    face: str
    batch_size: int | None
    parameters: int | None
    steps: int
    measured: int
    super_critical: int
    super_critical_until: int | None
    catapults: int
    collapses: int
    back_offs: int
    restores: int
    failed_measurements: int
    match_rate: float | None
    match_rises: int
    match_loss: str | None
    lambda_start: float | None
    lambda_end: float | None
    best_metric: str | None
    best_value: float | None
    best_step: int | None
    test_metric: str | None
    test_value: float | None
    agop: float | None
    agop_step: int | None
    probe_seconds: float
    probe_share: float | None
    extra_bytes: int | None
    oldest: int
    dropped: tuple[str, ...]


@np.errstate(all="ignore")  # infinities may be among what is added up
def summarize(log: RunLog) -> RunSummary:
    """All figures of a run.

    Example:
        >>> from pathlib import Path
        >>> header = dict.fromkeys(("face", "batch_size", "parameters", "extra_bytes")) | {"name": "a", "settings": {}}
        >>> step = {"loss": 0.5, "effective_lr": 0.1, "eta_crit": 0.08, "lambda_max": 25.0, "super_critical": True}
        >>> summarize(RunLog(Path("a.jsonl"), header, [{"step": 1, **step}])).super_critical
        1
    """
    steps, metrics = columns_of(log.steps), columns_of(log.metrics)
    measured = steps.having("eta_crit")
    happened = Counter(columns_of(log.events).values("event"))
    best_metric, best_step, best_value = _best_validation(log, metrics)
    until = best_step if best_metric and not higher_is_better(best_metric) else None
    match_loss, matches = _matches(log, steps, measured)
    lambdas = measured.numbers("lambda_max")
    lambdas = lambdas[np.isfinite(lambdas)]
    test_metric, test_value = _test_metric(log, metrics, best_metric, best_step)
    spent = float(measured.having("probe_seconds").numbers("probe_seconds").sum())
    elapsed = float(measured.having("elapsed").numbers("elapsed").sum())  # each since the one before
    agop_step, agop = _agop(log, metrics, best_step)
    above = measured.numbers("super_critical") == 1
    if until is not None:
        above &= measured.integers("step", 0) <= until
    return RunSummary(
        name=log.name,
        path=str(log.path),
        face=log.header["face"],
        batch_size=log.header["batch_size"],
        parameters=log.header["parameters"],
        steps=len(steps),
        measured=len(measured),
        super_critical=int(above.sum()),
        super_critical_until=until,
        catapults=happened["catapult_recovered"],
        collapses=happened["collapse"],
        back_offs=happened["back_off"],
        restores=happened["restore"],
        failed_measurements=happened["measurement_failed"],
        match_rate=float(matches.mean()) if len(matches) else None,
        match_rises=len(matches),
        match_loss=match_loss,
        lambda_start=float(lambdas[0]) if len(lambdas) else None,
        lambda_end=float(lambdas[-1]) if len(lambdas) else None,
        best_metric=best_metric,
        best_value=best_value,
        best_step=best_step,
        test_metric=test_metric,
        test_value=test_value,
        agop=agop,
        agop_step=agop_step,
        probe_seconds=spent,
        probe_share=spent / elapsed if elapsed > 0 else None,
        extra_bytes=log.header.get("extra_bytes"),
        oldest=int(steps.having("age").integers("age", 0).max(initial=0)),
        dropped=tuple(log.dropped),
    )


_MOST_NAMES: Final = 100  # of metrics that are looked through: a damaged log may have another one on every line


def _metric_names(metrics: Records, prefix: str) -> list[str]:
    """The metrics whose name starts with ``prefix``, in the order of their first record."""
    names = [key for key in metrics.keys("values") if key.lower().startswith(prefix)]
    return names[:_MOST_NAMES]


def higher_is_better(metric: str) -> bool:
    """Whether the best value of a metric is its highest, by its name."""
    return any(word in metric.lower() for word in ("acc", "score", "auc"))


def _best_validation(log: RunLog, metrics: Records) -> tuple[str | None, int | None, float | None]:
    """Metric, step and value of the best validation; a loss goes before other metrics, an early step before others."""
    names = sorted(_metric_names(metrics, "val"), key=lambda name: "loss" not in name.lower())
    for name in names:
        steps, values = log.series(name)
        finite = np.isfinite(values)
        steps, values = steps[finite], values[finite]
        if len(values):
            at = int((np.argmax if higher_is_better(name) else np.argmin)(values))
            return name, int(steps[at]), float(values[at])
    return None, None, None


def _test_metric(
    log: RunLog, metrics: Records, best_metric: str | None, best_step: int | None
) -> tuple[str | None, float | None]:
    """The test metric that goes with the validation metric (test_loss with val_loss), at the best validation step."""
    if best_metric is None or best_step is None:
        return None, None
    counterpart = re.sub(r"^val[a-z]*", "test", best_metric.lower())
    for name in sorted(_metric_names(metrics, "test"), key=lambda name: name.lower() != counterpart):
        steps, values = log.series(name)
        if len(at := np.flatnonzero(steps == best_step)):
            return name, float(values[at[0]])
    return None, None


def _agop(log: RunLog, metrics: Records, best_step: int | None) -> tuple[int | None, float | None]:
    for name in _metric_names(metrics, "agop"):
        steps, values = log.series(name)
        at = next(iter(np.flatnonzero(steps == best_step)), -1)
        return int(steps[at]), float(values[at])
    return None, None


def _matches(log: RunLog, steps: Records, measured: Records) -> tuple[str | None, npt.NDArray[np.bool_]]:
    """For every measured step on which the loss rose: was its rate above the critical one?

    L is the full training loss where ``train_loss`` is logged before and after a step, else the loss of the steps' own
    batches.
    """
    # A metric of step t is taken after t updates, the loss of step t before its update: both become "after t updates".
    batch = last_of_each(steps.integers("step", 0) - 1, steps.numbers("loss"))
    at = measured.integers("step", 0)
    for name, series in (("train_loss", log.series("train_loss")), ("batch_loss", batch)):
        (before, known_before), (after, known_after) = _looked_up(series, at - 1), _looked_up(series, at)
        known = known_before & known_after
        if known.any():
            rises = known & (after > before)
            return name, (measured.numbers("effective_lr") > measured.numbers("eta_crit"))[rises]
    return None, np.zeros(0, np.bool_)


def _looked_up(series: tuple[Integers, Floats], wanted: Integers) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """The values of a series at the wanted steps, and at which of these it has one."""
    steps, values = series
    if not len(steps):
        return np.full(len(wanted), np.nan), np.zeros(len(wanted), np.bool_)
    at = np.searchsorted(steps, wanted).clip(max=len(steps) - 1)
    return values[at], steps[at] == wanted


# ------------------------------------------------------------------------------------------------- sorting, exporting

SORT_KEYS: Final[dict[str, str]] = {  # as typed: the field of RunSummary
    "name": "name",
    "batch": "batch_size",
    "steps": "steps",
    "super-critical": "super_critical",
    "catapults": "catapults",
    "collapses": "collapses",
    "match": "match_rate",
    "lambda": "lambda_end",
    "best": "best_value",
    "test": "test_value",
    "agop": "agop",
}


def sort_runs(runs: Iterable[tuple[RunSummary, RunLog]], sort: str | None) -> list[tuple[RunSummary, RunLog]]:
    """Runs in ascending order of a key of ``SORT_KEYS``, descending with a "-" before it; unknown values come last."""
    if sort is None:
        return list(runs)
    descending, key = sort.startswith("-"), SORT_KEYS[sort.removeprefix("-")]
    known: list[tuple[RunSummary, RunLog]] = []
    unknown: list[tuple[RunSummary, RunLog]] = []
    for run in runs:
        value = getattr(run[0], key)
        (unknown if value is None or value != value else known).append(run)

    def order(run: tuple[RunSummary, RunLog]) -> Any:
        return natural(run[0].name) if key == "name" else getattr(run[0], key)

    return sorted(known, key=order, reverse=descending) + unknown


def natural(text: str) -> list[tuple[int, str]]:
    """Sort key by which batch_5 comes before batch_10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d{1,18})", text)]


def to_json(summaries: Iterable[RunSummary]) -> str:
    """A JSON list with an object per run; NaN and infinities are strings, as in the log. Texts are those of the log."""
    return json.dumps([encode(asdict(summary)) for summary in summaries], indent=2, allow_nan=False)


def to_csv(summaries: Iterable[RunSummary]) -> str:
    """A line per run under a line of names; an unknown value is an empty cell.

    Texts are made harmless: control characters become "?", and one that a spreadsheet would take for a formula, because
    it begins with = + - or @, gets an apostrophe before it. `to_json` gives texts as they are.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(RunSummary)], lineterminator="\n")
    writer.writeheader()
    for summary in summaries:
        row = {**asdict(summary), "dropped": "; ".join(summary.dropped)}
        writer.writerow({key: plain.cell(value) if isinstance(value, str) else value for key, value in row.items()})
    return text.getvalue()
