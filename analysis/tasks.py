"""Synthetic regression tasks of the thesis: functions of Gaussian inputs, with their exact EGOP."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["RegressionTask", "Split", "full_rank", "rank"]


@dataclass(frozen=True, eq=False)
class Split:
    """Inputs and targets of one split."""

    inputs: Tensor  # (n, d)
    targets: Tensor  # (n, 1), with the noise

    def __len__(self) -> int:
        return len(self.inputs)

    def to(self, device: torch.device | str) -> Split:
        """The same split on another device."""
        return Split(self.inputs.to(device), self.targets.to(device))


@dataclass(frozen=True, eq=False)
class RegressionTask:
    """A regression task whose true function, and therefore the features it depends on, are known."""

    name: str
    target: Callable[[Tensor], Tensor]  # f*: (n, d) -> (n, 1), without noise; differentiable
    noise: float  # standard deviation of the noise on all targets
    train: Split
    val: Split
    test: Split
    egop: Tensor  # (d, d), E[grad f* grad f*^T] over the inputs' distribution

    def to(self, device: torch.device | str) -> RegressionTask:
        """The same task on another device."""
        train, val, test = (split.to(device) for split in (self.train, self.val, self.test))
        return replace(self, train=train, val=val, test=test, egop=self.egop.to(device))


def rank(
    k: int,
    n_train: int = 2000,
    n_val: int = 5000,
    n_test: int = 5000,
    d: int = 100,
    noise: float = 0.1,
    seed: int = 0,
    *,
    unit_variance: bool = True,
) -> RegressionTask:
    """The thesis' rank-k regression task, with inputs x ~ N(0, I_d) and targets f*(x) + N(0, noise^2).

    ======  ==================================  ========
    k       f*(x)                               variance
    ======  ==================================  ========
    2       x1 x2                               1
    3       x1 x2 (x1 + ... + x10)              14
    4       x1 + x1 x2 + x1 x2 x3 + x1 x2 x3 x4  4
    ======  ==================================  ========

    The noise is on the targets of all three splits, as Appendix C.6 defines the data; a perfect predictor therefore has
    the test loss (mean squared error) ``noise**2``. ``unit_variance`` divides f* by its standard deviation before the
    noise is added. The thesis does not say that it does so; it puts the losses of the three tasks on one scale (1 is
    what predicting the mean gets) and changes nothing for k = 2.

    Args:
        k: 2, 3 or 4.
        n_train, n_val, n_test: samples in each split, at least 1.
        d: dimension of the inputs, at least the number of coordinates that f* uses (2, 10 or 4).
        noise: standard deviation of the noise, at least 0.
        seed: seed of the task's own generator. The global generators are neither read nor advanced.
        unit_variance: scale f* to variance 1.

    Returns:
        `RegressionTask`, float32, on the CPU: inputs (n, d), targets (n, 1), EGOP (d, d).

    Raises:
        TypeError: a count or the seed is not an integer.
        ValueError: no such k, or a number out of range.

    Source: thesis Section 4.4 "Experimental settings", Appendix C.6 "Dataset" and "EGOP".

    >>> task = rank(2, n_train=8, d=3)
    >>> task.train.inputs.shape, task.train.targets.shape
    (torch.Size([8, 3]), torch.Size([8, 1]))
    >>> task.egop
    tensor([[1., 0., 0.],
            [0., 1., 0.],
            [0., 0., 0.]])
    """
    if k not in _POLYNOMIALS:
        raise ValueError(f"k must be one of {sorted(_POLYNOMIALS)}, got {k!r}")
    polynomial, variance, core = _POLYNOMIALS[k]
    scale = math.sqrt(variance) if unit_variance else 1.0

    def target(x: Tensor) -> Tensor:
        return polynomial(x) / scale

    train, val, test = _splits(f"rank-{k}", len(core), target, n_train, n_val, n_test, d, noise, seed)
    egop = torch.zeros(d, d)
    egop[: len(core), : len(core)] = torch.tensor(core) / scale**2
    return RegressionTask(f"rank-{k}", target, noise, train, val, test, egop)


def full_rank(
    n_train: int = 128, n_val: int = 2000, n_test: int = 2000, d: int = 100, noise: float = 0.1, seed: int = 0
) -> RegressionTask:
    """The thesis' task without low-dimensional structure: x ~ N(0, I_d), targets |x| / sqrt(d) + N(0, noise^2).

    Its gradient is x / (sqrt(d) |x|), a random direction of length 1/sqrt(d), so that the EGOP is I / d^2. The values
    lie close to their mean, 1 - 1/(4 d), with variance 1/(2 d), less than that of the noise.

    Args, returns, raises: as for `rank`.

    Source: thesis Appendix C.4, Figure C.17.

    >>> full_rank(n_train=8, d=2).egop
    tensor([[0.2500, 0.0000],
            [0.0000, 0.2500]])
    """

    def target(x: Tensor) -> Tensor:
        return x.square().sum(dim=1, keepdim=True).div(d).sqrt()

    train, val, test = _splits("full-rank", 1, target, n_train, n_val, n_test, d, noise, seed)
    return RegressionTask("full-rank", target, noise, train, val, test, torch.eye(d) / d**2)


def _splits(
    name: str,
    least_d: int,
    target: Callable[[Tensor], Tensor],
    n_train: int,
    n_val: int,
    n_test: int,
    d: int,
    noise: float,
    seed: int,
) -> tuple[Split, Split, Split]:
    """Training, validation and test split of Gaussian inputs with noisy targets; checks all arguments."""
    counts = {"n_train": (n_train, 1), "n_val": (n_val, 1), "n_test": (n_test, 1), "d": (d, least_d)}
    for argument, (value, least) in counts.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{argument} must be an integer, got {value!r}")
        if value < least:
            raise ValueError(f"{argument} must be at least {least} for the {name} task, got {value}")
    if not isinstance(seed, int):
        raise TypeError(f"seed must be an integer, got {seed!r}")
    if not (math.isfinite(noise) and noise >= 0):
        raise ValueError(f"noise must be a finite standard deviation of at least 0, got {noise!r}")
    generator = torch.Generator().manual_seed(seed)

    def split(n: int) -> Split:
        inputs = torch.randn(n, d, generator=generator)
        return Split(inputs, target(inputs) + noise * torch.randn(n, 1, generator=generator))

    return split(n_train), split(n_val), split(n_test)


def _rank2(x: Tensor) -> Tensor:
    return x[:, :1] * x[:, 1:2]


def _rank3(x: Tensor) -> Tensor:
    return x[:, :1] * x[:, 1:2] * x[:, :10].sum(dim=1, keepdim=True)


def _rank4(x: Tensor) -> Tensor:
    return x[:, :4].cumprod(dim=1).sum(dim=1, keepdim=True)


def _rank3_core() -> list[list[float]]:
    # With S = x1 + ... + x10 and T = x3 + ... + x10 ~ N(0, 8), for k, l in 3..10:
    #   df/dx1 = x2 (2 x1 + x2 + T),  df/dx2 = x1 (x1 + 2 x2 + T),  df/dxk = x1 x2.
    # Odd moments vanish and E x^4 = 3, hence
    #   E[(df/dx1)^2]      = 4 E[x1^2 x2^2] + E[x2^4] + E[x2^2] E[T^2] = 4 + 3 + 8 = 15
    #   E[df/dx1 df/dx2]   = E[x1 x2 (2 x1 + x2 + T)(x1 + 2 x2 + T)] = (4 + 1) E[x1^2 x2^2] = 5
    #   E[df/dx1 df/dxk]   = 2 E[x1^2 x2^2] = 2
    #   E[df/dxk df/dxl]   = E[x1^2 x2^2] = 1.
    core = [[1.0] * 10 for _ in range(10)]
    for i in (0, 1):
        for j in range(2, 10):
            core[i][j] = core[j][i] = 2.0
        core[i][i], core[i][1 - i] = 15.0, 5.0
    return core


# rank-4: with partial derivatives g1 = 1 + x2 + x2 x3 + x2 x3 x4, g2 = x1 (1 + x3 + x3 x4), g3 = x1 x2 (1 + x4) and
# g4 = x1 x2 x3, each a sum of different square-free monomials: E[gi^2] counts them. In gi gj with i < j, xi appears in
# gj alone, to the first power, so its expectation is 0.
_RANK4_CORE = [[4.0, 0.0, 0.0, 0.0], [0.0, 3.0, 0.0, 0.0], [0.0, 0.0, 2.0, 0.0], [0.0, 0.0, 0.0, 1.0]]

# k: (f*, its variance, E[grad f* grad f*^T] over the coordinates it uses). All three have mean 0. For k = 3 the
# variance is E[x1^2 x2^2 (x1 + x2 + T)^2] = 3 + 3 + 8 = 14 (the cross term 2 x1^3 x2^3 is odd).
_POLYNOMIALS: dict[int, tuple[Callable[[Tensor], Tensor], float, list[list[float]]]] = {
    2: (_rank2, 1.0, [[1.0, 0.0], [0.0, 1.0]]),
    3: (_rank3, 14.0, _rank3_core()),
    4: (_rank4, 4.0, _RANK4_CORE),
}
