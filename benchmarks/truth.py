"""Top curvature of one batch in float64: Lanczos on products by double backward. Uses nothing of catapult_opt."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Array = np.ndarray


def ggn_lambda_max(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor) -> float:
    """Largest eigenvalue of J^T H_out J, the criterion's reduction contained, in the model's present mode."""
    model, params, x, y = _double(model, x, y)
    # The fused attention kernels have no second derivative; the composed one computes the same function.
    with sdpa_kernel(SDPBackend.MATH):
        outputs = model(x)
        u = torch.zeros_like(outputs, requires_grad=True)
        pulled = torch.autograd.grad(outputs, params, u, create_graph=True)
        z = outputs.detach().requires_grad_()
        (slope,) = torch.autograd.grad(criterion(z, y), z, create_graph=True)

        def product(v: list[Tensor]) -> Sequence[Tensor]:
            (tangent,) = torch.autograd.grad(pulled, u, v, retain_graph=True)
            (curved,) = torch.autograd.grad(slope, z, tangent, retain_graph=True)
            return torch.autograd.grad(outputs, params, curved, retain_graph=True)

        return _top(product, params)


def hessian_lambda_max(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor) -> float:
    """Largest eigenvalue in absolute value of the full Hessian of the loss, in the model's present mode."""
    model, params, x, y = _double(model, x, y)
    with sdpa_kernel(SDPBackend.MATH):
        slope = torch.autograd.grad(criterion(model(x), y), params, create_graph=True)
        return _top(lambda v: torch.autograd.grad(slope, params, v, retain_graph=True), params, which="LM")


def _double(model: nn.Module, x: Tensor, y: Tensor) -> tuple[nn.Module, list[Tensor], Tensor, Tensor]:
    model = copy.deepcopy(model).double()
    x, y = (t.double() if t.is_floating_point() else t for t in (x, y))
    return model, [p for p in model.parameters() if p.requires_grad], x, y


def _top(product: Callable[[list[Tensor]], Sequence[Tensor]], params: list[Tensor], which: str = "LA") -> float:
    sizes = [p.numel() for p in params]

    def matvec(flat: Array) -> Array:
        parts = torch.from_numpy(np.ascontiguousarray(flat.reshape(-1))).split(sizes)
        v = [part.view_as(p) for part, p in zip(parts, params, strict=True)]
        return torch.cat([g.reshape(-1) for g in product(v)]).numpy()

    n = sum(sizes)
    start = np.random.default_rng(0).standard_normal(n)
    if not matvec(start).any():
        return 0.0  # dead or saturated everywhere: ARPACK would refuse
    operator = LinearOperator((n, n), matvec=matvec, dtype=np.float64)
    # A residual of 1e-3 leaves an error of the eigenvalue of 1e-6 or less where the top is not degenerate.
    return float(eigsh(operator, k=1, which=which, tol=1e-3, ncv=12, v0=start, return_eigenvectors=False)[0])
