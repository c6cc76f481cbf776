"""Other packages that estimate the top curvature of a batch, each asked for 1 % the way its users ask.

The exact versions, which work together with torch 2.13 (they ask for others, hence --no-deps):

    pip install --no-deps -r constraints-bench.txt

torchvision is needed by none of what is used here. Every package gets its best case: attention by the composed kernel
(theirs need second derivatives or forward mode), BatchNorm without running statistics where it cannot handle them.
"""

from __future__ import annotations

import copy
import importlib
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True)
class Peer:
    """One package's estimate of the largest eigenvalue to 1 %."""

    name: str
    module: str  # to import
    matrix: str  # what it takes the eigenvalue of: "ggn" in train mode, or "hessian" in eval mode
    estimate: Callable[[nn.Module, nn.Module, Tensor, Tensor], tuple[float, int]]  # -> eigenvalue, products spent

    def missing(self) -> str | None:
        """What to install, or None if the package is there."""
        try:
            importlib.import_module(self.module)
        except ImportError as error:
            return f"{self.name} is skipped ({error}): pip install --no-deps -r constraints-bench.txt"
        return None

    def __call__(self, model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor) -> tuple[float, int]:
        with sdpa_kernel(SDPBackend.MATH):
            return self.estimate(model, criterion, x, y)


def prepared(model: nn.Module) -> nn.Module:
    """A copy that no package can disturb; BatchNorm normalises by the batch, without running statistics."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return model


class _Counted:
    """A function that counts its calls."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        return self.function(*args)


def _curvlinops(ncv: int | None) -> Callable[[nn.Module, nn.Module, Tensor, Tensor], tuple[float, int]]:
    def estimate(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor) -> tuple[float, int]:
        from curvlinops import GGNLinearOperator

        params = [p for p in model.parameters() if p.requires_grad]
        operator = GGNLinearOperator(model, criterion, params, [(x, y)], check_deterministic=False)
        matvec = _Counted(operator.to_scipy(dtype=np.float32).matvec)
        scipy_operator = LinearOperator(operator.shape, matvec=matvec, dtype=np.float32)
        start = np.random.default_rng(0).standard_normal(operator.shape[0]).astype(np.float32)
        top = eigsh(scipy_operator, k=1, which="LA", tol=1e-2, ncv=ncv, v0=start, return_eigenvectors=False)
        return float(top[0]), matvec.calls

    return estimate


def _eigenthings(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor) -> tuple[float, int]:
    from hessian_eigenthings import GGNOperator, power_iteration_one

    operator = GGNOperator(
        model, [(x, y)], lambda m, batch: m(batch[0]), lambda outputs, batch: criterion(outputs, batch[1])
    )
    value, _, _, products, _ = power_iteration_one(operator, tol=1e-2, seed=0)
    return value, products


def _pyhessian(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor) -> tuple[float, int]:
    # The class pyhessian.hessian hides the module of that name.
    module = sys.modules[importlib.import_module("pyhessian").hessian.__module__]
    original = module.hessian_vector_product
    module.hessian_vector_product = counted = _Counted(original)
    state = torch.get_rng_state()
    try:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it keeps the graph of .grad alive, and torch says so
            values, _ = module.hessian(model, criterion, data=(x, y), cuda=False).eigenvalues(tol=1e-2)
    finally:
        module.hessian_vector_product = original
        torch.set_rng_state(state)
        model.zero_grad()
    return float(values[0]), counted.calls


PEERS: tuple[Peer, ...] = (
    Peer("curvlinops + eigsh", "curvlinops", "ggn", _curvlinops(None)),
    # scipy's default subspace of 20 vectors is made for more than one eigenvalue to 1 %.
    Peer("curvlinops + eigsh, ncv=4", "curvlinops", "ggn", _curvlinops(4)),
    Peer("hessian-eigenthings, GGN", "hessian_eigenthings", "ggn", _eigenthings),
    Peer("PyHessian, Hessian", "pyhessian", "hessian", _pyhessian),
)
