"""Promise: under DistributedDataParallel every rank measures the curvature of the whole batch, and all decide alike.

Oracle: one process on the whole batch, in float64, and the explicit Jacobian. One spawn of two processes runs all of
it; the tests look at what it brought back.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import batch, network, part, run
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from training import FACES, Base, Training

from catapult_opt import CatapultMonitor, CatapultSGD, critical_lr, observer, read_log, schedule

STEPS = 12


BASES: dict[str, Base] = {
    "CatapultLR": lambda params: torch.optim.Adam(params, lr=0.001),
    "CatapultMonitor": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
}


def train(kind: str, rank: int, ranks: int, model: nn.Module, **settings: Any) -> dict[str, Any]:
    """A training on the rank's part of each batch; critical rates, rates applied and weights at the end."""
    more = {"momentum": 0.5} if kind == "CatapultSGD" else {"base": BASES[kind]}
    batches = [part(rank, ranks, step) for step in range(STEPS)]
    training = Training(kind, model, batches, **more, **settings)
    watch, optimizer = training.watch, training.optimizer
    found, rates = [], []
    for _ in range(STEPS):
        training.step()
        found.append(watch.last.eta_crit)
        rates.append(optimizer.param_groups[0].get("effective_lr", 0.0))
    return {
        "eta_crit": found,
        "rates": rates,
        "ntk": watch.last.ntk_lambda_max,
        "weights": [p.detach().clone() for p in model.parameters()],
        "averaged": averaged_of(kind, watch, model),
        "super_critical": watch.super_critical_steps,
        "state": optimizer.state_dict()["param_groups"][0].get("catapult_state"),
    }


def averaged_of(kind: str, watch: Any, model: nn.Module) -> list[Tensor]:
    if kind == "CatapultMonitor":
        return []
    with watch.averaged():
        return [p.detach().clone() for p in model.parameters()]


def everything(rank: int, folder: str) -> dict[str, Any]:
    ranks = dist.get_world_size()
    ours: dict[str, Any] = {}
    for kind in FACES:
        model = DistributedDataParallel(network())
        ours[kind] = train(kind, rank, ranks, model, log=Path(folder) / f"{kind}.jsonl", every=2)
    unused = DistributedDataParallel(network(), find_unused_parameters=True)  # its outputs pass through a sink
    ours["find_unused"] = train("CatapultSGD", rank, ranks, unused, every=2)
    inner = network()
    reducer = DistributedDataParallel(inner)
    ours["inner"] = through(rank, ranks, reducer, inner)
    ours["collectives"] = collectives(rank, ranks)
    ours["uneven"] = uneven(rank, ranks)
    ours["no data"] = no_data(rank, ranks)
    ours["untouched"] = untouched(rank, ranks)
    ours["accumulated"] = accumulated(rank, ranks)
    ours["overhead"] = by_the_clock(rank, ranks)
    ours["errors"] = errors(rank)
    return ours


def through(rank: int, ranks: int, called: nn.Module, inner: nn.Module) -> float:
    """A framework wraps the model: given are the module inside and the group."""
    criterion = nn.MSELoss()
    optimizer = CatapultSGD(inner.parameters(), model=inner, criterion=criterion, process_group=dist.group.WORLD)
    x, y = part(rank, ranks, 0)
    criterion(called(x), y).backward()
    optimizer.step()
    assert optimizer.last is not None
    return optimizer.last.lambda_max


def collectives(rank: int, ranks: int) -> dict[str, Any]:
    """Numbers exchanged in a step that measures and in one that does not, beside DDP's own (in C++)."""
    sizes: list[int] = []
    plain = dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel())
        return plain(tensor, *args, **kwargs)

    model, criterion = DistributedDataParallel(network()), nn.MSELoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = CatapultMonitor(optimizer, model=model, criterion=criterion, every=2)
    seen = []
    for step in range(4):
        x, y = part(rank, ranks, step)
        criterion(model(x), y).backward()
        sizes.clear()
        dist.all_reduce = counted
        try:
            optimizer.step()
        finally:
            dist.all_reduce = plain
        assert monitor.last is not None
        seen.append((monitor.last.matvecs, list(sizes)))
    return {"seen": seen, "parameters": sum(p.numel() for p in model.parameters())}


def uneven(rank: int, ranks: int) -> dict[str, float]:
    """9 samples against 3."""
    model, criterion = DistributedDataParallel(network()), nn.MSELoss()
    optimizer = CatapultSGD(model.parameters(), model=model, criterion=criterion)
    x, y = batch(0)
    mine = slice(0, 9) if rank == 0 else slice(9, 12)
    criterion(model(x[mine]), y[mine]).backward()
    optimizer.step()
    assert optimizer.last is not None
    return {"lambda": optimizer.last.lambda_max, "ntk": optimizer.last.ntk_lambda_max or math.nan}


def no_data(rank: int, ranks: int) -> list[float]:
    """The last batch is too small for all: rank 1 only takes part in DDP's gradients."""
    model, criterion = DistributedDataParallel(network()), nn.MSELoss()
    optimizer = CatapultSGD(model.parameters(), model=model, criterion=criterion, every=1)
    found = []
    for step in range(3):
        optimizer.zero_grad()
        x, y = batch(step)
        if step == 1 and rank == 1:
            (0.0 * model(x).sum()).backward()
        else:
            criterion(model(x), y).backward()
        optimizer.step()
        assert optimizer.last is not None
        found.append(optimizer.last.lambda_max)
    return [*found, optimizer.param_groups[0]["effective_lr"]]


def untouched(rank: int, ranks: int) -> bool:
    """A training with a monitor is the one without, BatchNorm's statistics and DDP's own step included."""
    ends = []
    for watched in (False, True):
        model, criterion = DistributedDataParallel(network(norm=True)), nn.MSELoss()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        monitor = CatapultMonitor(optimizer, model=model, criterion=criterion) if watched else None
        for step in range(4):
            x, y = part(rank, ranks, step)
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            optimizer.step()
            assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
        assert monitor is None or monitor.measured_steps == 4
        ends.append({k: v.clone() for k, v in model.state_dict().items()})
    return all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


def accumulated(rank: int, ranks: int) -> float:
    """Two micro-batches a rank, the first under no_sync."""
    model, criterion = DistributedDataParallel(network()), nn.MSELoss()
    optimizer = CatapultSGD(model.parameters(), model=model, criterion=criterion)
    x, y = part(rank, ranks, 0)
    with model.no_sync():
        (criterion(model(x[:3]), y[:3]) / 2).backward()
    (criterion(model(x[3:]), y[3:]) / 2).backward()
    optimizer.step()
    assert optimizer.last is not None
    return optimizer.last.lambda_max


class OwnTime:
    """A clock of the rank's own: every look at it takes another time."""

    def __init__(self, rank: int) -> None:
        self._random, self._now = random.Random(rank), 0.0

    def perf_counter(self) -> float:
        self._now += self._random.random()
        return self._now


def by_the_clock(rank: int, ranks: int) -> list[int]:
    """overhead= goes by the wall clock, which no two processes share: how many steps were measured until each?"""
    plain, own = observer.time, OwnTime(rank)
    observer.time = schedule.time = own
    try:
        model, criterion = DistributedDataParallel(network()), nn.MSELoss()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        monitor = CatapultMonitor(optimizer, model=model, criterion=criterion, overhead=0.1)
        measured = []
        for step in range(30):
            x, y = part(rank, ranks, step)
            criterion(model(x), y).backward()
            optimizer.step()
            measured.append(monitor.measured_steps)
        return measured
    finally:
        observer.time = schedule.time = plain


def errors(rank: int) -> dict[str, str]:
    model, criterion = network(), nn.MSELoss()
    found = {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for name, given in {
        "said nothing": model,
        "inside": nn.Sequential(DistributedDataParallel(model)),
    }.items():
        with pytest.raises(ValueError, match="DistributedDataParallel") as caught:
            CatapultMonitor(optimizer, model=given, criterion=criterion)
        found[name] = str(caught.value)
    wrapped = DistributedDataParallel(model)
    monitor = CatapultMonitor(optimizer, model=wrapped, criterion=criterion)
    x, y = batch(0)
    outputs = wrapped(x)
    criterion(outputs, y).backward()
    if rank == 1:
        x.add_(1)  # the batch of one rank only: both must stop
    with pytest.raises(RuntimeError) as stopped:
        optimizer.step()
    found["in place"] = str(stopped.value)
    monitor.detach()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ddp")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return run(everything, 2, str(folder))


@pytest.mark.parametrize("kind", FACES)
def test_ranks_agree_to_the_bit(ranks: list[dict[str, Any]], kind: str) -> None:
    a, b = ranks[0][kind], ranks[1][kind]
    assert a["eta_crit"] == b["eta_crit"] and a["rates"] == b["rates"] and a["state"] == b["state"]
    assert all(torch.equal(p, q) for p, q in zip(a["weights"], b["weights"], strict=True))
    assert all(torch.equal(p, q) for p, q in zip(a["averaged"], b["averaged"], strict=True))


@pytest.mark.parametrize("kind", FACES)
def test_ranks_measure_what_one_process_does(ranks: list[dict[str, Any]], kind: str) -> None:
    one = train(kind, 0, 1, network(), every=2, engine="finite-difference")
    together = ranks[0][kind]
    assert together["eta_crit"] == pytest.approx(one["eta_crit"], rel=1e-4)
    assert together["rates"] == pytest.approx(one["rates"], rel=1e-4)
    assert together["super_critical"] == one["super_critical"]
    for p, q in zip(together["averaged"], one["averaged"], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)
    if kind != "CatapultLR":
        assert together["ntk"] == pytest.approx(one["ntk"], rel=1e-4)


@pytest.mark.parametrize("name", ["find_unused"])
def test_outputs_that_pass_through_a_sink(ranks: list[dict[str, Any]], name: str) -> None:
    assert ranks[0][name]["eta_crit"] == pytest.approx(ranks[0]["CatapultSGD"]["eta_crit"], rel=1e-6)


def whole_batch() -> float:
    return critical_lr(network(), nn.MSELoss(), *batch(0), tol=1e-6).lambda_max


def test_process_group_given_with_the_module_inside(ranks: list[dict[str, Any]]) -> None:
    assert [r["inner"] for r in ranks] == pytest.approx([whole_batch()] * 2, rel=1e-3)


def test_accumulated_micro_batches(ranks: list[dict[str, Any]]) -> None:
    assert [r["accumulated"] for r in ranks] == pytest.approx([whole_batch()] * 2, rel=1e-3)


def test_one_all_reduce_a_product(ranks: list[dict[str, Any]]) -> None:
    p = ranks[0]["collectives"]["parameters"]
    for (matvecs, sizes), measured in zip(ranks[0]["collectives"]["seen"], (True, False, True, False), strict=True):
        assert sizes.count(p) == (matvecs if measured else 0) or sizes.count(p) == matvecs
        assert all(size <= 2 for size in sizes if size != p)
        if not measured:
            assert sizes == [1, 2] or sizes == [2]  # the loss, and whether all have one


def mean_of_means(parts: list[tuple[Tensor, Tensor]]) -> float:
    """Top eigenvalue of the GGN of the mean of the parts' mean losses, from explicit Jacobians."""
    model = network()
    params = dict(model.named_parameters())
    total: Tensor | float = 0.0
    for x, _ in parts:

        def outputs(values: dict[str, Tensor], x: Tensor = x) -> Tensor:
            return torch.func.functional_call(model, values, (x,)).flatten()

        jacobian = torch.cat([j.flatten(1) for j in torch.func.jacrev(outputs)(params).values()], 1).detach()
        total = total + jacobian.T @ jacobian * 2 / len(jacobian) / len(parts)
    assert isinstance(total, Tensor)
    return float(torch.linalg.eigvalsh(total)[-1])


def test_uneven_parts_are_a_mean_of_means(ranks: list[dict[str, Any]]) -> None:
    x, y = batch(0)
    expected = mean_of_means([(x[:9], y[:9]), (x[9:], y[9:])])
    for r in ranks:
        assert r["uneven"]["lambda"] == pytest.approx(expected, rel=1e-3)
        assert math.isnan(r["uneven"]["ntk"])  # no multiple of the NTK of all samples
    assert abs(expected - whole_batch()) > 0.01 * expected  # it does matter


def test_a_rank_without_data_counts_as_no_loss(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["no data"] == ranks[1]["no data"]
    assert ranks[0]["no data"][0] == pytest.approx(whole_batch(), rel=1e-3)
    # The same in one process: in the second step half the loss, as DDP averages a zero gradient in.
    model, criterion = network(), nn.MSELoss()
    optimizer = CatapultSGD(model.parameters(), model=model, criterion=criterion, every=1, engine="finite-difference")
    for step in range(2):
        optimizer.zero_grad()
        x, y = batch(step)
        (criterion(model(x), y) * (0.5 if step == 1 else 1.0)).backward()
        optimizer.step()
    assert optimizer.last is not None
    assert ranks[0]["no data"][1] == pytest.approx(optimizer.last.lambda_max, rel=1e-3)


def test_training_with_a_monitor_is_the_one_without(ranks: list[dict[str, Any]]) -> None:
    assert all(r["untouched"] for r in ranks)


def test_the_clock_measures_on_the_same_steps_everywhere(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["overhead"] == ranks[1]["overhead"]
    assert 1 < ranks[0]["overhead"][-1] < 30


def test_one_log_of_the_whole_batch(ranks: list[dict[str, Any]], folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == sorted(f"{kind}.jsonl" for kind in FACES)
    log = read_log(folder / "CatapultSGD.jsonl")
    assert log.header["batch_size"] == 12
    model, criterion = network(), nn.MSELoss()
    x, y = batch(0)
    assert log.column("loss")[0] == pytest.approx(float(criterion(model(x), y).detach()), rel=1e-12)


def test_errors_say_what_to_do_and_stop_all(ranks: list[dict[str, Any]]) -> None:
    for r in ranks:
        assert "process_group" in r["errors"]["said nothing"] and "group.WORLD" in r["errors"]["said nothing"]
        assert "contains a DistributedDataParallel" in r["errors"]["inside"]
    assert "another process" in ranks[0]["errors"]["in place"]
    assert "modified in place" in ranks[1]["errors"]["in place"]


@pytest.mark.slow
def test_four_processes() -> None:
    one = train("CatapultSGD", 0, 1, network(), every=2, engine="finite-difference")
    for r in run(four, 4):
        assert r["eta_crit"] == pytest.approx(one["eta_crit"], rel=1e-4)


def four(rank: int) -> dict[str, Any]:
    return train("CatapultSGD", rank, 4, DistributedDataParallel(network()), every=2)
