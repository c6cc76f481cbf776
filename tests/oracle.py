"""Dense float64 reference for the curvature of one batch, by plain autograd loops. Uses nothing of the package.

With f the flattened first argument of the criterion (N_out numbers), w the P trainable parameters and L the loss:

* ``jacobian``  J = df/dw                        [N_out, P]  one backward pass per output
* ``h_out``     H_out = d2L/df2                  [N_out, N_out]  with the reduction factor of the criterion
* ``ggn``       G = J^T H_out J                  [P, P]
* ``ntk``       K = J J^T                        [N_out, N_out]  no reduction factor
* ``hessian``   H = d2L/dw2                      [P, P]  one double-backward pass per parameter

Samples are never separated, so BatchNorm couples them as in the training step; a dropout mask is whatever the global
RNG state at the call gives, so seed before the call. The global RNG state is left as it was found.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True)
class Truth:
    """Dense curvature of one batch in float64."""

    loss: float
    jacobian: np.ndarray  # [N_out, P]
    h_out: np.ndarray  # [N_out, N_out]

    @property
    def ggn(self) -> np.ndarray:  # [P, P]
        return self.jacobian.T @ self.h_out @ self.jacobian

    @property
    def ntk(self) -> np.ndarray:  # [N_out, N_out]
        return self.jacobian @ self.jacobian.T

    @property
    def lambda_max(self) -> float:
        return top_eigenvalue(self.ggn)

    @property
    def second(self) -> float:
        """The second largest eigenvalue over the largest: near 1 the top one is hard to find."""
        n = len(self.ggn)
        below, top = scipy.linalg.eigh(self.ggn, eigvals_only=True, subset_by_index=[n - 2, n - 1])
        return float(below / top)

    @property
    def eta_crit(self) -> float:
        return 2.0 / self.lambda_max

    @property
    def ntk_lambda_max(self) -> float:
        return top_eigenvalue(self.ntk)


def top_eigenvalue(matrix: np.ndarray) -> float:
    """Largest algebraic eigenvalue of a symmetric matrix."""
    n = len(matrix)
    symmetric = (matrix + matrix.T) / 2
    return float(scipy.linalg.eigh(symmetric, eigvals_only=True, subset_by_index=[n - 1, n - 1])[0])


def to_double(value: Any) -> Any:
    """Floating tensors of a tensor, tuple, list or dict as detached float64 copies."""
    if isinstance(value, Tensor):
        value = value.detach().clone()
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: to_double(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(to_double(item) for item in value)
    return value


def call(model: nn.Module, inputs: Any) -> Any:
    """A tensor is the one argument, a tuple the positional arguments, a dict the keyword arguments."""
    if isinstance(inputs, dict):
        return model(**inputs)
    if isinstance(inputs, tuple):
        return model(*inputs)
    return model(inputs)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Each trainable parameter once, however often it is tied."""
    return [p for p in model.parameters() if p.requires_grad]


class _DoubleCopy:
    """Float64 copy of (model, criterion, batch); the original is not touched, the RNG is given back."""

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[[Tensor, Tensor], Tensor],
        inputs: Any,
        targets: Tensor,
        outputs: Callable[[Any], Tensor] | None,
        parameters: list[str] | None = None,
    ) -> None:
        self.model = copy.deepcopy(model).double()
        self.criterion = copy.deepcopy(criterion).double() if isinstance(criterion, nn.Module) else criterion
        self.inputs, self.targets = to_double(inputs), to_double(targets)
        self.select = outputs or (lambda value: value)
        self.parameters = trainable(self.model)
        if parameters is not None:
            named = dict(self.model.named_parameters())
            self.parameters = [named[name] for name in parameters]

    def forward(self) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # the CPU flash kernel has no double-backward
            return self.select(call(self.model, self.inputs))

    def loss(self) -> Tensor:
        return self.criterion(self.forward(), self.targets)

    def gradient(self) -> Tensor:
        state = torch.get_rng_state()
        flat = _flat(torch.autograd.grad(self.loss(), self.parameters, allow_unused=True), self.parameters)
        torch.set_rng_state(state)
        return flat.detach()


def _flat(grads: tuple[Tensor | None, ...], like: list[nn.Parameter]) -> Tensor:
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in zip(grads, like, strict=True)]
    )


def dense(
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    inputs: Any,
    targets: Tensor,
    outputs: Callable[[Any], Tensor] | None = None,
    parameters: list[str] | None = None,
) -> Truth:
    """J and H_out of one batch. ``parameters``: names to differentiate by (default: all trainable ones)."""
    state = torch.get_rng_state()
    try:
        twin = _DoubleCopy(model, criterion, inputs, targets, outputs, parameters)
        with torch.enable_grad():
            out = twin.forward()
            rows = [
                _flat(
                    torch.autograd.grad(entry, twin.parameters, retain_graph=True, allow_unused=True), twin.parameters
                )
                for entry in out.flatten()
            ]
            leaf = out.detach().clone()
            loss = twin.criterion(leaf, twin.targets)
            h_out = torch.autograd.functional.hessian(lambda o: twin.criterion(o, twin.targets), leaf)
        n = leaf.numel()
        return Truth(float(loss), torch.stack(rows).numpy(), h_out.reshape(n, n).numpy())
    finally:
        torch.set_rng_state(state)


def hessian(
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    inputs: Any,
    targets: Tensor,
    outputs: Callable[[Any], Tensor] | None = None,
) -> np.ndarray:
    """Full Hessian [P, P] of the loss; by double-backward where all operations have one, else by differences."""
    state = torch.get_rng_state()
    try:
        twin = _DoubleCopy(model, criterion, inputs, targets, outputs)
        with torch.enable_grad():
            try:
                matrix = _hessian_by_double_backward(twin)
            except RuntimeError as error:
                if "not implemented" not in str(error):  # torch.nn.EmbeddingBag has no double-backward
                    raise
                matrix = None
            # torch 2.13's fused weight_norm has a wrong one (gradgradcheck fails): the result is not even symmetric.
            if matrix is None or not np.allclose(matrix, matrix.T, rtol=0, atol=1e-8 * np.abs(matrix).max()):
                torch.set_rng_state(state)
                twin = _DoubleCopy(model, criterion, inputs, targets, outputs)
                matrix = _hessian_by_differences(twin)
        return matrix
    finally:
        torch.set_rng_state(state)


def _hessian_by_double_backward(twin: _DoubleCopy) -> np.ndarray:
    grads = torch.autograd.grad(twin.loss(), twin.parameters, create_graph=True, allow_unused=True)
    flat = _flat(grads, twin.parameters)
    rows = []
    for entry in flat:
        if entry.requires_grad:
            second = torch.autograd.grad(entry, twin.parameters, retain_graph=True, allow_unused=True)
            rows.append(_flat(second, twin.parameters))
        else:  # an unused parameter, or one the loss is linear in
            rows.append(torch.zeros_like(flat))
    return torch.stack(rows).detach().numpy()


def _hessian_by_differences(twin: _DoubleCopy, step: float = 1e-5) -> np.ndarray:
    rows = []
    for p in twin.parameters:
        entries = p.data.view(-1)
        for i in range(entries.numel()):
            value = entries[i].item()
            entries[i] = value + step
            up = twin.gradient()
            entries[i] = value - step
            down = twin.gradient()
            entries[i] = value
            rows.append((up - down) / (2 * step))
    return torch.stack(rows).numpy()
