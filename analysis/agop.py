"""The average gradient outer product of a model (AGOP), and its alignment with another (thesis Eq. 4.5 and 4.6)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from catapult_opt.replay import preserved

__all__ = ["agop", "alignment"]


def agop(model: nn.Module, inputs: Tensor, *, batch_size: int = 1024) -> Tensor:
    """The average gradient outer product ``(1/n) sum_i J(x_i)^T J(x_i)``, a (d, d) matrix.

    ``J(x_i)`` (c, d) is the Jacobian of the model's c outputs for sample i with respect to that sample; for one output
    this is ``(1/n) sum_i grad f(x_i) grad f(x_i)^T``. It is a mean over samples and a sum over outputs.

    The model runs in eval mode and without autocast, on chunks of ``batch_size``: outputs have to depend on their own
    sample alone, which BatchNorm in train mode breaks. Parameters, their ``.grad``, buffers, random number generators
    and train/eval modes are left bit for bit as they were. The model's forward hooks run, but `CatapultMonitor` and
    `CatapultSGD` take no notice, so that it may be called anywhere in a training loop.

    Args:
        model: maps (n, ...) to a tensor (n, ...), on the inputs' device; any module that autograd can differentiate.
        inputs: floating-point, (n, ...); with more than 2 dimensions a sample is flattened to d entries.
        batch_size: samples per chunk, at least 1. It bounds the memory and does not change the result.

    Returns:
        (d, d), symmetric positive semi-definite, of the inputs' dtype and device.

    Raises:
        TypeError: inputs or outputs are not floating-point tensors.
        ValueError: no samples, a batch size below 1, outputs that do not keep one row per sample, or outputs that
            autograd cannot follow back to the inputs.

    Source: thesis Eq. 4.5 and its footnote 2.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 2.0]]))
    >>> agop(model, torch.randn(8, 2))
    tensor([[1., 2.],
            [2., 4.]])
    """
    _check_inputs(inputs, batch_size)
    d = inputs[0].numel()
    with torch.inference_mode(False), preserved(model, None, list(model.parameters())):
        model.eval()
        total = inputs.new_zeros(d, d)
        for chunk in torch.split(inputs.detach(), batch_size):
            for gradients in _output_gradients(model, chunk):
                total.addmm_(gradients.T, gradients)
    return total.div_(len(inputs))


def alignment(g: Tensor, g_star: Tensor) -> float:
    """AGOP alignment: the cosine ``Tr(G^T G*) / (|G|_F |G*|_F)`` of two matrices of the same shape.

    It lies in [-1, 1], and in [0, 1] for positive semi-definite matrices such as AGOPs; 1 means equal up to a positive
    factor. Computed in float64.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: not two square matrices of one shape, or one of them is zero or not finite.

    Source: thesis Eq. 4.6.

    >>> alignment(torch.eye(2), torch.tensor([[3.0, 0.0], [0.0, 4.0]])) == 7 / (50 ** 0.5)
    True
    """
    a, b = _unit("g", g), _unit("g_star", g_star)
    if a.shape != b.shape:
        raise ValueError(f"g and g_star must have the same shape, got {tuple(g.shape)} and {tuple(g_star.shape)}")
    return max(-1.0, min(1.0, float((a * b.to(a.device)).sum())))


def _output_gradients(model: nn.Module, chunk: Tensor) -> Iterator[Tensor]:
    """For each output of the model, its gradient (b, d) with respect to each sample of the chunk."""
    x = chunk.clone().requires_grad_()
    outputs = model(x)
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        kind = outputs.dtype if isinstance(outputs, Tensor) else type(outputs).__name__
        raise TypeError(f"model must return a floating-point tensor, got {kind}: wrap it in a module that does")
    if outputs.ndim == 0 or len(outputs) != len(x):
        raise ValueError(f"model must return one row per sample, got shape {tuple(outputs.shape)} for {len(x)} samples")
    if not outputs.requires_grad:
        raise ValueError("model's outputs do not depend on inputs through autograd: does it detach them?")
    # Outputs depend on their own sample alone, so the gradient of their sum over the chunk holds every sample's own.
    columns = outputs.reshape(len(x), -1).sum(dim=0)
    for column in columns:
        (gradient,) = torch.autograd.grad(column, x, retain_graph=True, allow_unused=True)
        if gradient is None:
            raise ValueError("model's outputs do not depend on inputs through autograd: does it detach them?")
        yield gradient.reshape(len(x), -1)


def _check_inputs(inputs: Tensor, batch_size: int) -> None:
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        kind = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
        raise TypeError(f"inputs must be a floating-point tensor, got {kind}")
    if inputs.ndim < 2 or inputs.numel() == 0:
        raise ValueError(f"inputs must have shape (n, ...) with at least one sample, got {tuple(inputs.shape)}")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}")


def _unit(name: str, matrix: Tensor) -> Tensor:
    """The matrix over its Frobenius norm, in float64; first over its largest entry, against under- and overflow."""
    if not isinstance(matrix, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(matrix).__name__}")
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.numel() == 0:
        raise ValueError(f"{name} must be a square matrix, got shape {tuple(matrix.shape)}")
    values = matrix.detach().double()
    largest = float(values.abs().max())
    if not 0 < largest < float("inf"):
        raise ValueError(f"{name} must be finite and not all zero (its largest entry is {largest})")
    values = values.div(largest)
    return values.div(values.norm())
