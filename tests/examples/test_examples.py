"""The examples run as a user runs them, and leave what they say."""

import csv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from scripts import run_here

from catapult_opt import read_log

EXAMPLES = Path(__file__).parents[2] / "examples"
PNG = b"\x89PNG"


def run(script, *args):
    result = run_here(EXAMPLES / script, *args)
    assert result.returncode == 0
    return result


def in_this_process(workers, context, start, arguments):
    """The pool of batch_sizes.py without its processes, which each take seconds to import."""
    return ThreadPoolExecutor(1, initializer=start, initargs=arguments)


@pytest.fixture(scope="module")
def batch_sizes(tmp_path_factory):
    out = tmp_path_factory.mktemp("batch_sizes")
    (out / "batch5-seed0.jsonl").write_text("left by an earlier call, to be replaced\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("concurrent.futures.ProcessPoolExecutor", in_this_process)
        return out, run("batch_sizes.py", "--quick", "--out", out)


@pytest.fixture(scope="module")
def drop_in(tmp_path_factory):
    out = tmp_path_factory.mktemp("drop_in")
    return out, run("drop_in.py", "--quick", "--out", out)


def test_batch_sizes_logs_every_run(batch_sizes):
    out, _ = batch_sizes
    assert {path.name for path in out.glob("*.jsonl")} == {f"batch{b}-seed0.jsonl" for b in (5, 10, 50, 500)}
    for batch in (5, 10, 50, 500):
        log = read_log(out / f"batch{batch}-seed0.jsonl")
        assert log.dropped == []
        assert log.header["batch_size"] == batch
        every = 50 if batch == 500 else 10
        assert len(log.measured) == -(-len(log.steps) // every)
        validated = log.metric("val_loss")
        best = min(validated, key=validated.get)
        assert best in log.metric("test_loss")
        assert 0 < log.metric("agop_alignment")[best] <= 1
        assert log.metric("train_loss").keys() == validated.keys()


def test_batch_sizes_shows_what_the_thesis_says(batch_sizes):
    out, result = batch_sizes
    rows = {int(row["batch_size"]): row for row in csv.DictReader((out / "runs.csv").open())}
    above = [int(rows[b]["super_critical"]) / int(rows[b]["steps"]) for b in (5, 10, 50, 500)]
    assert above == sorted(above, reverse=True)
    assert above[0] > 0
    assert above[-1] == 0  # the full batch trains at half its own critical rate
    assert float(rows[5]["test_value"]) < float(rows[10]["test_value"]) < float(rows[500]["test_value"])
    assert float(rows[5]["agop"]) > float(rows[500]["agop"])
    assert "on 1 of 1 seeds" in " ".join(result.stdout.split())


def test_batch_sizes_prints_the_report_and_the_table(batch_sizes):
    out, result = batch_sizes
    text = result.stdout
    assert "not the thesis'" in text
    for words in ("batch5-seed0", "At the best validation loss", "above critical", f"to {out}"):
        assert words in text
    assert "\x1b" not in text, "colour codes in a pipe"
    assert "Warning" not in result.stderr


def test_batch_sizes_takes_other_batch_sizes_and_seeds(tmp_path):
    """In a process of its own, as a user runs it."""
    options = ["--batch-sizes", 100, "--seeds", 2, "--workers", 1]
    result = run_here(EXAMPLES / "batch_sizes.py", "--quick", "--out", tmp_path, *options)
    assert result.returncode == 0
    assert {path.name for path in tmp_path.glob("*.jsonl")} == {"batch100-seed0.jsonl", "batch100-seed1.jsonl"}
    assert "mean ± sd of 2 seeds" in result.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--batch-sizes", "501"], "--batch-sizes: 501 is more than the 500 training samples"),
        (["--batch-sizes", "0"], "must be at least 1, got 0"),
        (["--seeds", "-1"], "must be at least 1, got -1"),
        (["--device", "nonsense"], "--device: nonsense cannot be used"),
    ],
)
def test_batch_sizes_names_bad_arguments(args, message, tmp_path):
    result = run_here(EXAMPLES / "batch_sizes.py", "--quick", "--out", tmp_path / "out", *args)
    assert result.returncode == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_drop_in_logs_every_optimizer(drop_in):
    out, result = drop_in
    for name in ("SGD", "Adam", "CatapultSGD"):
        log = read_log(out / f"{name}.jsonl")
        assert log.dropped == []
        assert len(log.steps) == 300
        assert len(log.metric("test_loss")) == 30
        assert name in result.stdout
    assert "AGOP alignment" in result.stdout
    assert "Warning" not in result.stderr


def test_drop_in_catapult_sgd_catapults_and_learns(drop_in):
    out, _ = drop_in
    log = read_log(out / "CatapultSGD.jsonl")
    assert sum(event["event"] == "catapult_recovered" for event in log.events) >= 1
    # The variance is 1, and SGD at the critical rate reaches 0.5.
    assert min(log.metric("test_loss").values()) < 0.4


def test_drop_in_reports_a_divergence(tmp_path):
    result = run_here(EXAMPLES / "drop_in.py", "--quick", "--out", tmp_path, "--sgd-lr", 100, "--adam-lr", 0.03)
    assert result.returncode == 0
    table = result.stdout.partition("At the best validation loss")[2]
    rows = {line.split()[0]: line.split() for line in table.splitlines() if line.strip()}
    assert rows["SGD"][1:3] == ["100", "diverged"]
    assert rows["Adam"][1] == "0.03"
    assert float(rows["CatapultSGD"][3]) < float(rows["Adam"][3])


@pytest.mark.parametrize(("example", "picture"), [("batch_sizes", "batch_sizes.png"), ("drop_in", "drop_in.png")])
def test_pictures_where_matplotlib_is_there(example, picture, request):
    pytest.importorskip("matplotlib")
    out, result = request.getfixturevalue(example)
    assert (out / picture).read_bytes().startswith(PNG)
    assert picture in result.stdout


@pytest.mark.parametrize("script", ["batch_sizes.py", "drop_in.py"])
def test_help(script):
    result = run_here(EXAMPLES / script, "--help")
    assert result.returncode == 0
    assert "--quick" in result.stdout
