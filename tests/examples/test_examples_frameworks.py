"""The examples in frameworks and on several processes run as a user runs them, and leave what they say."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from pathlib import Path

import pytest

from catapult_opt import read_log

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(*command: object) -> str:
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True], ids=["ddp", "fsdp"])
def test_ddp(shard: bool, tmp_path: Path) -> None:
    """Two processes, then the checkpoint on one."""
    example, common = EXAMPLES / "ddp.py", ["--out", tmp_path, *(["--shard"] if shard else [])]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    shown = run(*launch, 2, example, *common)
    assert shown.count("critical rate") == 3  # one line an epoch: rank 0's
    log = read_log(tmp_path / "run.jsonl")
    assert log.header["batch_size"] == 128 and len(log.steps) == 12
    run(*launch, 1, example, *common, "--epochs", 1, "--resume")
    resumed = read_log(tmp_path / "resumed.jsonl")
    assert [record["step"] for record in resumed.steps] == [13, 14, 15, 16]


def test_lightning_module(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    run(EXAMPLES / "lightning_module.py", "--out", tmp_path, "--epochs", 2)
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert len(rows) == 8
    for row in rows:
        # On mini-batches the rate goes by the mean over the last measurements, not by the last one alone.
        assert 0 < float(row["effective_lr"]) <= 2 * float(row["eta_crit"]) * 1.25
        assert float(row["catapults"]) >= 0 and math.isfinite(float(row["loss"]))


def test_hf_trainer(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    shown = run(EXAMPLES / "hf_trainer.py", "--out", tmp_path, "--epochs", 1)
    assert shown.count("'eta_crit'") >= 2 and "'effective_lr'" in shown  # every fourth step, and at the end
    assert len(read_log(tmp_path / "run.jsonl").steps) == 8


def test_accelerate_loop(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    assert run(EXAMPLES / "accelerate_loop.py", "--out", tmp_path, "--epochs", 2).count("critical rate") == 2
    log = read_log(tmp_path / "run.jsonl")
    assert len(log.steps) == 8 and log.header["batch_size"] == 128  # two micro-batches of 64
    assert (tmp_path / "checkpoint" / "optimizer.bin").exists()


def test_tensorboard_log(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(EXAMPLES / "tensorboard_log.py", "--out", tmp_path, "--steps", 20)
    written = {}
    for folder, tag in ((".", "loss"), (".", "catapults"), ("rate_applied", "rate"), ("rate_critical", "rate")):
        events = EventAccumulator(str(tmp_path / folder))
        events.Reload()
        written[folder, tag] = [event.value for event in events.Scalars(tag)]
    assert all(len(values) == 20 for values in written.values())
    assert written["rate_applied", "rate"][0] == pytest.approx(2 * written["rate_critical", "rate"][0])
