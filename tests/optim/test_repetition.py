"""Promise: a batch counts as the same by all that the step was given, in any order of its samples, and by nothing less.

Oracle: batches that are the same by construction, or differ in one number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from catapult_opt import CatapultSGD, read_log
from catapult_opt.link import LossCall
from catapult_opt.repetition import batch_hash
from catapult_opt.replay import ForwardCall


def call_of(*args: Any, targets: Any = None, **kwargs: Any) -> LossCall:
    """A criterion call on what a model made of these arguments."""
    forward = ForwardCall(args, kwargs, [], [], [], [], False)
    outputs = torch.ones(3, requires_grad=True) * 2
    return LossCall(torch.zeros(()), args=(outputs, targets), inputs=[outputs], forwards=[forward])


def rows(n: int = 12, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 4, generator=generator), torch.randn(n, 2, generator=generator)
    if dtype.is_complex or not dtype.is_floating_point:
        return (10 * x).to(dtype), (10 * y).to(dtype)
    return x.to(dtype), y.to(dtype)


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.complex64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_of_samples_does_not_matter_and_each_number_does(dtype: torch.dtype) -> None:
    x, y = rows(dtype=dtype)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    found = batch_hash([call_of(x, targets=y)])
    assert batch_hash([call_of(x[order], targets=y[order])]) == found
    assert batch_hash([call_of(x[order], targets=y)]) != found, "targets of other samples"
    for place in ((0, 0), (5, 3), (11, 1)):
        other = x.clone()
        other[place] += 1
        assert batch_hash([call_of(other, targets=y)]) != found
    other = y.clone()
    other[7, 1] += 1
    assert batch_hash([call_of(x, targets=other)]) != found
    assert batch_hash([call_of(x[:-1], targets=y[:-1])]) != found
    assert batch_hash([call_of(torch.cat([x, x[:1]]), targets=torch.cat([y, y[:1]]))]) != found


def test_micro_batches_in_another_cut_are_the_same_batch() -> None:
    x, y = rows()
    whole = batch_hash([call_of(x, targets=y)])
    assert batch_hash([call_of(a, targets=b) for a, b in zip(x.split(5), y.split(5), strict=True)]) == whole
    assert batch_hash([call_of(a, targets=b) for a, b in zip(x[1:].split(5), y[1:].split(5), strict=True)]) != whole


@pytest.mark.parametrize("place", ["before", "after", "keyword"])
def test_a_constant_argument_does_not_make_two_batches_the_same(place: str) -> None:
    x, y = rows()
    prompt = torch.arange(7.0)

    def call(batch: Tensor, constant: Tensor = prompt) -> int | None:
        if place == "keyword":
            return batch_hash([call_of(batch, targets=y, mask=constant)])
        return batch_hash([call_of(*((constant, batch) if place == "before" else (batch, constant)), targets=y)])

    assert call(x) == call(x.clone(), prompt.clone())
    assert call(x) != call(x + 1e-6)
    assert call(x) != call(x, prompt.flip(0)), "its own order counts"


@pytest.mark.parametrize("other", [torch.zeros(3, device="meta"), torch.eye(3).to_sparse()], ids=["meta", "sparse"])
def test_values_that_cannot_be_read(other: Tensor) -> None:
    assert batch_hash([call_of(other)]) is None
    assert batch_hash([]) is None


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(-3, 3), min_size=4, max_size=12), st.lists(st.integers(-3, 3), min_size=4, max_size=12))
def test_the_same_exactly_for_the_same_samples(a: list[int], b: list[int]) -> None:
    first, second = (torch.tensor(v[: len(v) // 2 * 2]).reshape(-1, 2) for v in (a, b))
    same = sorted(first.tolist()) == sorted(second.tolist())
    assert (batch_hash([call_of(first)]) == batch_hash([call_of(second)])) == same


# ------------------------------------------------------------------------------------------------- what a training sees


class Masked(nn.Module):
    """A model with a constant first argument."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, mask: Tensor, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x * mask)
        return out


def windows(batch: Callable[[int], Tensor], tmp_path: Any, every: int = 1, steps: int = 6) -> bool:
    """Did a training on these batches see a repetition?"""
    torch.manual_seed(0)
    model, criterion = Masked(), nn.MSELoss()
    path = tmp_path / "run.jsonl"
    optimizer = CatapultSGD(model.parameters(), model=model, criterion=criterion, every=every, log=path)
    for t in range(steps):
        x = batch(t)
        optimizer.zero_grad()
        criterion(model(torch.ones(4), x), x[:, :1] ** 2).backward()
        optimizer.step()
    optimizer.detach()
    return "eta_crit_mean" not in read_log(path).measured[-1]  # logged where something is averaged


@pytest.mark.parametrize("period", [2, 3, 5])
def test_the_same_order_of_mini_batches_every_epoch_is_no_repetition(period: int, tmp_path: Any) -> None:
    """Measured every so many steps, it is the same batch that is seen each time."""
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(2))
    assert not windows(lambda t: x[t % period :: period], tmp_path, every=period, steps=4 * period + 1)
    (tmp_path / "run.jsonl").unlink()
    assert windows(lambda t: x, tmp_path, every=period, steps=4 * period + 1)


def test_a_shuffled_full_batch_repeats_and_mini_batches_beside_a_constant_do_not(tmp_path: Any) -> None:
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(2))
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    assert windows(lambda t: x[torch.randperm(20, generator=torch.Generator().manual_seed(t))], tmp_path / "a")
    assert not windows(lambda t: x[3 * t : 3 * t + 3], tmp_path / "b")
