"""Promise: a training killed at any moment loses no log record of a step that returned, and goes on from its checkpoint
as if nothing had happened: weights, rates and counts are those of a run never interrupted, to the bit.

The kills are SIGKILL at random times, while the child trains, logs and checkpoints after every step. Children are
forked from this process, which has torch loaded already.
"""

from __future__ import annotations

import collections
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from training import QUICK, Base, Training, net, product

from catapult_opt import read_log
from catapult_opt.runlog import RunLogError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")

STEPS = 44
POLICY = replace(QUICK, total_steps=STEPS, cooldown=0.2)
COLUMNS = ("step", "loss", "effective_lr", "eta_crit", "lambda_max", "super_critical", "phase")


BASES: dict[str, Base] = {
    "Adam under CatapultLR": lambda params: Adam(params, lr=0.01),
    "SGD under CatapultLR": lambda params: SGD(params, lr=0.1, momentum=0.3),
}


class Killed(Training):
    """A training of one kind that saves and finds its checkpoints in a folder."""

    def __init__(self, kind: str, folder: Path) -> None:
        x, y = product()
        count = 4 if kind == "sgd in mini-batches" else 1
        model = net(6, 24, 1, activation=nn.ReLU)
        if kind != "sgd":
            model = net(6, 24, 1, activation=nn.ReLU, norm=True, dropout=0.1)
        torch.manual_seed(0)  # of the dropout
        face, more = ("CatapultLR", {"base": BASES[kind]}) if kind in BASES else ("CatapultSGD", {"momentum": 0.3})
        self.path, log = folder / "checkpoint.pt", folder / "run.jsonl"
        batches = list(zip(x.chunk(count), y.chunk(count), strict=True))
        super().__init__(face, model, batches, log=log, policy=POLICY, **more)  # type: ignore[arg-type]
        if self.path.exists():
            saved = torch.load(self.path, weights_only=True)
            self.load(saved)
            self.done = saved["done"]
            torch.set_rng_state(saved["rng"])
        else:
            log.unlink(missing_ok=True)  # of a life that ended before its first checkpoint

    def save(self) -> None:
        new = self.path.with_suffix(".new")
        torch.save({**self.checkpoint(), "done": self.done, "rng": torch.get_rng_state()}, new)
        os.replace(new, self.path)

    def live(self, say: Callable[[str], Any]) -> None:
        while self.done < STEPS:
            say("train")
            self.step()
            say(f"returned {self.done} {self.watch.phase}")
            self.save()

    def outcome(self) -> Any:
        log = read_log(self.path.with_name("run.jsonl"))
        weights = [v.numpy().tobytes() for v in self.model.state_dict().values()]
        counts = (self.watch.catapults, self.watch.super_critical_steps)
        rates = self.rates()
        return weights, rates, {name: log.column(name) for name in COLUMNS}, [e["event"] for e in log.events], counts


def whole(kind: str, folder: Path) -> Any:
    folder.mkdir()
    training = Killed(kind, folder)
    training.live(lambda what: None)
    return training.outcome()


def life(kind: str, folder: Path, seconds: float) -> tuple[bool, list[str]]:
    """One child that trains on from the last checkpoint, killed after so many seconds: did it end, and what it said."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            Killed(kind, folder).live(lambda what: os.write(write, f"{what}\n".encode()))
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    os.close(write)
    killer = threading.Timer(seconds, os.kill, (child, signal.SIGKILL))
    killer.start()
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # its number stays taken until the timer is off
    killer.cancel()
    killer.join()
    status = os.waitpid(child, 0)[1]
    with os.fdopen(read) as file:
        said = file.read().splitlines()
    assert status == signal.SIGKILL or os.waitstatus_to_exitcode(status) == 0
    return os.WIFEXITED(status), said


def check_log(path: Path, said: list[str]) -> None:
    """Every step that returned has its record, and nothing but the last line is cut."""
    returned = [int(line.split()[1]) for line in said if line.startswith("returned")]
    try:
        log = read_log(path)
    except RunLogError:
        assert not returned
        return
    steps = log.column("step")
    assert steps == list(range(1, len(steps) + 1))
    assert not returned or len(steps) in (returned[-1], returned[-1] + 1)
    assert all("superseded" in why or "record (" in why for why in log.dropped), log.dropped


def kill(kinds: list[str], kills: int, seed: int, tmp_path: Path) -> collections.Counter[str]:
    """Kill that many times, over as many trainings as it takes; where the kills fell."""
    chance = random.Random(seed)
    expected, took = {}, {}
    for kind in kinds:
        begun = time.perf_counter()
        expected[kind] = whole(kind, tmp_path / f"{kind} whole")
        took[kind] = time.perf_counter() - begun
    fell: collections.Counter[str] = collections.Counter()
    number = 0
    while fell.total() < kills:
        kind = kinds[number % len(kinds)]
        folder = tmp_path / f"{number}"
        folder.mkdir()
        number += 1
        ended, short = False, took[kind] * 0.6
        while not ended:
            ended, said = life(kind, folder, chance.uniform(0, short) if fell.total() < kills else 60)
            check_log(folder / "run.jsonl", said)
            if not ended:
                fell[(said or ["before the first step"])[-1].replace("returned", "after").translate(NO_DIGITS)] += 1
                short *= 1.1  # so that it ends some day
        finished = Killed(kind, folder)
        assert finished.done == STEPS
        assert finished.outcome() == expected[kind], f"training {number - 1}, {kind}"
    return fell


NO_DIGITS = str.maketrans("", "", "0123456789")
KINDS = ["sgd", "sgd in mini-batches", "Adam under CatapultLR", "SGD under CatapultLR"]


def test_ten_kills(tmp_path: Path) -> None:
    assert kill(KINDS, 10, seed=0, tmp_path=tmp_path).total() >= 10


@pytest.mark.slow
def test_two_hundred_kills(tmp_path: Path) -> None:
    """They fall within steps and between them, in several phases of the policy."""
    fell = kill(KINDS, 200, seed=1, tmp_path=tmp_path)
    print(dict(fell))
    assert fell.total() >= 200
    assert "train" in fell and sum(where.startswith("after") for where in fell) >= 3, fell


def test_a_killed_run_goes_on_at_once_though_a_process_it_forked_still_lives(tmp_path: Path) -> None:
    """A data loader's worker, say, holds every open file of the training: the log's lock must not live on in it."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        training = Killed("sgd", tmp_path)
        training.step()
        training.save()
        worker = os.fork()
        if worker:
            os.write(write, f"{worker}".encode())
        time.sleep(60)
        os._exit(1)
    worker = int(os.read(read, 100))
    try:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        training = Killed("sgd", tmp_path)
        training.step()
        assert read_log(tmp_path / "run.jsonl").column("step") == [1, 2]
    finally:
        os.kill(worker, signal.SIGKILL)
