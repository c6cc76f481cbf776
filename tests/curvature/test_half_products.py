"""Promise: v.A v, had before A v at a part of its price, ends an estimate sooner and never spoils it.

Oracles: an explicit float64 Jacobian for the quadratic form of the GGN; numpy's eigenvalues for the solver.
"""

from __future__ import annotations

import copy

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor, nn

from catapult_opt.capture import Capture
from catapult_opt.curvature.eigensolver import top_eigenvalue
from catapult_opt.curvature.engines import ENGINES, StepSize
from catapult_opt.curvature.operators import GGN
from catapult_opt.link import LossCall
from catapult_opt.replay import preserved
from catapult_opt.vectors import random_unit

F64 = torch.float64


def network() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    return model, torch.randn(12, 5, dtype=F64), torch.randint(3, (12,))


def captured(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, parts: int = 1) -> list[LossCall]:
    capture = Capture(model, criterion, lambda: list(model.parameters()))
    capture.arm()
    for part, target in zip(x.chunk(parts), y.chunk(parts), strict=True):
        (criterion(model(part), target) / parts).backward()
    calls = capture.take()
    capture.detach()
    return calls


def flat(v: list[Tensor]) -> np.ndarray:
    return torch.cat([x.flatten() for x in v]).numpy()


@pytest.mark.parametrize("engine", list(ENGINES))
@pytest.mark.parametrize("parts", [1, 3])
def test_quadratic_is_that_of_the_explicit_jacobian(engine: str, parts: int) -> None:
    """And the product that follows is the whole one, whether it goes on from the half or starts anew."""
    (model, x, y), criterion = network(), nn.CrossEntropyLoss()
    ggn = oracle.dense(copy.deepcopy(model), criterion, x, y).ggn
    calls = captured(model, criterion, x, y, parts)
    with preserved(model, criterion, list(model.parameters())):
        operator = GGN(model, list(model.parameters()), calls, StepSize(), engine=engine)
        for seed in range(3):
            v, other = random_unit(list(model.parameters()), seed), random_unit(list(model.parameters()), seed + 10)
            truth = flat(v) @ ggn @ flat(v)
            assert operator.quadratic(v) == pytest.approx(truth, rel=1e-5)
            np.testing.assert_allclose(flat(operator.matvec(v)), ggn @ flat(v), atol=1e-5 * np.abs(ggn).max())
            operator.quadratic(v)
            np.testing.assert_allclose(flat(operator.matvec(other)), ggn @ flat(other), atol=1e-5 * np.abs(ggn).max())


def test_quadratic_is_a_forward_pass_and_the_product_goes_on_from_it() -> None:
    (model, x, y), criterion = network(), nn.CrossEntropyLoss()
    calls, passes = captured(model, criterion, x, y), []
    model[0].register_forward_hook(lambda *_: passes.append("forward"))
    model[0].weight.register_hook(lambda _: passes.append("backward"))
    with preserved(model, criterion, list(model.parameters())):
        operator = GGN(model, list(model.parameters()), calls, StepSize())
        v = random_unit(list(model.parameters()))
        operator.quadratic(v)  # may fit the step of the difference
        operator.matvec(v)
        passes.clear()
        operator.quadratic(v)
        assert passes == ["forward"]
        operator.matvec(v)
        assert passes == ["forward", "backward"]


def spectrum(kind: str, n: int = 200) -> np.ndarray:
    if kind == "gap":
        return np.concatenate([[1.0, 0.6], np.linspace(0, 0.4, n - 2)])
    if kind == "decay":
        return 0.7 ** np.arange(n)
    return np.concatenate([[1.0, 0.95, 0.9], np.linspace(0, 0.5, n - 3)])


@pytest.mark.parametrize("kind", ["gap", "decay", "cluster"])
@pytest.mark.parametrize("tol", [0.05, 0.01])
def test_fewer_products_for_the_same_accuracy(kind: str, tol: float) -> None:
    """Over many starts: never above the truth, no more products, and not further off than asked."""
    values = torch.tensor(spectrum(kind), dtype=F64)
    plain, halved, off = 0, 0, []
    for seed in range(40):
        start = [torch.randn(len(values), generator=torch.Generator().manual_seed(seed), dtype=F64)]
        without = top_eigenvalue(lambda v: [values * v[0]], start, tol=tol, max_matvecs=100)
        found = top_eigenvalue(
            lambda v: [values * v[0]],
            start,
            tol=tol,
            max_matvecs=100,
            quadratic=lambda v: float(v[0] @ (values * v[0])),
        )
        assert found.converged
        assert found.value <= 1 + 1e-12
        assert found.matvecs <= without.matvecs
        assert float(found.vector[0].norm()) == pytest.approx(1.0)
        plain, halved = plain + without.matvecs, halved + found.matvecs
        off.append(1 - found.value)
    assert halved < plain
    assert np.median(off) <= tol


def test_a_fine_tolerance_takes_whole_products_only() -> None:
    values = torch.tensor(spectrum("decay"), dtype=F64)

    def refuse(v: list[Tensor]) -> float:
        raise AssertionError("asked for a quadratic form")

    start = [torch.randn(len(values), generator=torch.Generator().manual_seed(0), dtype=F64)]
    found = top_eigenvalue(lambda v: [values * v[0]], start, tol=1e-3, max_matvecs=100, quadratic=refuse)
    assert found.value == pytest.approx(1.0, rel=1e-4)


def test_vector_of_a_half_product_is_the_ritz_vector_of_the_larger_space() -> None:
    """Its Rayleigh quotient is the Ritz value found: a better start for the next estimate than the whole products'."""
    values = torch.tensor(spectrum("gap"), dtype=F64)
    asked: list[float] = []

    def quadratic(v: list[Tensor]) -> float:
        asked.append(float(v[0] @ (values * v[0])))
        return asked[-1]

    start = [torch.randn(len(values), generator=torch.Generator().manual_seed(3), dtype=F64)]
    found = top_eigenvalue(lambda v: [values * v[0]], start, tol=0.05, max_matvecs=100, quadratic=quadratic)
    quotient = float(found.vector[0] @ (values * found.vector[0]))
    assert asked
    assert quotient <= found.value * (1 + 1e-12)
    whole = top_eigenvalue(lambda v: [values * v[0]], start, tol=0.0, max_matvecs=found.matvecs)
    assert quotient > float(whole.vector[0] @ (values * whole.vector[0]))
