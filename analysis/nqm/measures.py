"""Jacobian and Hessians of a module's outputs with respect to its weights, dense: for small models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from catapult_opt.replay import preserved

from .written_out import twice_differentiable

__all__ = ["jacobian", "output_hessians"]


def jacobian(model: nn.Module, inputs: Tensor) -> Tensor:
    """``df/dw`` at the present weights, (n c, p): n samples, c outputs each, p weights that require gradients.

    Rows are ordered by sample, then output, columns as ``model.parameters()``. The model runs in the mode it is in.
    Weights, their ``.grad``, buffers, random number generators and modes are left bit for bit as they were.

    Raises:
        ValueError: the outputs do not depend on any parameter through autograd.

    >>> jacobian(nn.Linear(2, 1), torch.tensor([[3.0, 4.0]]))
    tensor([[3., 4., 1.]])
    """
    with _outputs(model, inputs) as (outputs, parameters):
        return _rows(outputs, parameters)


def output_hessians(model: nn.Module, inputs: Tensor) -> Tensor:
    """The Hessian H_f of every output with respect to the weights, (n c, p, p).

    Its memory grows with p squared: for models of some hundred weights. The order is that of `jacobian`. A quadratic
    model's does not depend on the weights.

    Source: thesis Eq. 3.2.

    >>> output_hessians(nn.Linear(1, 1), torch.ones(1, 1)).shape
    torch.Size([1, 2, 2])
    """
    with _outputs(model, inputs) as (outputs, parameters):
        found = []
        for output in outputs:
            got = torch.autograd.grad(output, parameters, create_graph=True, allow_unused=True)
            found.append(_rows(_flat(got, parameters), parameters))
    return torch.stack(found)


@contextmanager
def _outputs(model: nn.Module, inputs: Tensor) -> Iterator[tuple[Tensor, list[nn.Parameter]]]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.inference_mode(False), torch.enable_grad(), preserved(model, None, list(model.parameters())):
        with twice_differentiable():
            outputs = model(inputs.detach())
        if not isinstance(outputs, Tensor) or not outputs.requires_grad:
            raise ValueError("model's outputs do not depend on a parameter through autograd: are all of them frozen?")
        yield outputs.reshape(-1), parameters


def _rows(values: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """Gradients of each of the values (k,), as rows (k, p)."""
    if not values.requires_grad:  # second derivatives of a model that is linear in its weights
        return values.new_zeros(len(values), sum(p.numel() for p in parameters))
    rows = [torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True) for value in values]
    return torch.stack([_flat(row, parameters).detach() for row in rows])


def _flat(gradients: tuple[Tensor | None, ...], parameters: list[nn.Parameter]) -> Tensor:
    parts = zip(gradients, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in parts])
