"""The NTK of a scalar-output network of linear layers, from activations and output gradients: no products at all.

For a layer z = s W a + b the gradient of f_i with respect to W is s B_i A_i^T, with A_i the layer's input and B_i the
gradient of f_i with respect to z, so that its share of the NTK is s^2 (A A^T) o (B B^T), and that of the bias B B^T.
One forward and one backward pass give the exact matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..link import LossCall
from ..replay import ForwardCall, replay
from .engines import Scale, selected
from .output_hessian import OutputHessian, output_hessian

# Forming and decomposing an n x n matrix beats a few products up to about this many samples.
LARGEST_BATCH = 256


class NotLayerwise(ValueError):
    """The network is not made of linear layers with one scalar output a sample; says why."""


def gram_lambda_max(
    model: nn.Module, params: Sequence[Tensor], calls: Sequence[LossCall], scale: Scale = None
) -> tuple[float, OutputHessian]:
    """Top eigenvalue of D^(1/2) G D^(1/2) for a loss of one scalar output per sample, and the H_out it was found with.

    Only inside `preserved`. Samples must not influence each other (no batch statistics): this is not checked here.

    Raises:
        NotLayerwise: a parameter does not belong to a linear layer used once on a (n, features) input, an output is not
            one scalar per sample, several forward passes, or a rate that differs within a parameter.
    """
    call = _only(calls)
    kernel = gram_kernel(model, params, call.forwards[0], scale)
    hessian = output_hessian(call)
    root = _per_sample(hessian, call, len(kernel)).clamp_min(0).sqrt()
    return float(torch.linalg.eigvalsh((root[:, None] * kernel * root).double())[-1]), hessian


def gram_kernel(model: nn.Module, params: Sequence[Tensor], forward: ForwardCall, scale: Scale = None) -> Tensor:
    """The NTK J J^T (n, n) of a forward pass, each parameter's share weighted by ``scale``.

    Only inside `preserved`, and under the conditions of `gram_lambda_max`.

    Raises:
        NotLayerwise: as there.
    """
    rates = _rates(params, scale)
    f, layers = _run(model, forward, {id(p) for p in params})
    wanted = [t for _, z, module in layers for t in (z, *_trained(module, rates))]
    if not all(t.requires_grad for t in wanted):
        raise NotLayerwise("a layer runs inside a transform of torch.func, which hides its outputs from autograd")
    gradients = iter(torch.autograd.grad(f.sum(), wanted))
    kernel = f.new_zeros(f.numel(), f.numel())
    for a, _, module in layers:
        b = next(gradients)
        pulled = {id(p): next(gradients) for p in _trained(module, rates)}
        kernel += _share(module, a, b, pulled, rates)
    return kernel


def _only(calls: Sequence[LossCall]) -> LossCall:
    if len(calls) != 1 or len(calls[0].forwards) != 1 or len(calls[0].inputs) != 1 or calls[0].link is not None:
        raise NotLayerwise("more than one forward pass, or code between model and criterion")
    return calls[0]


def _rates(params: Sequence[Tensor], scale: Scale) -> dict[int, float]:
    if scale is not None and any(isinstance(s, Tensor) for s in scale):
        raise NotLayerwise("the rate differs within a parameter")
    return {id(p): 1.0 if scale is None else float(scale[i]) for i, p in enumerate(params)}


def _trained(module: nn.Module, rates: dict[int, float]) -> list[Tensor]:
    return [p for p in module.parameters(recurse=False) if id(p) in rates]


def _run(
    model: nn.Module, forward: ForwardCall, wanted: set[int]
) -> tuple[Tensor, list[tuple[Tensor, Tensor, nn.Module]]]:
    """The outputs and, for every layer with trained parameters, its input and output."""
    seen: list[tuple[Tensor, Tensor, nn.Module]] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if len(args) != 1 or not isinstance(args[0], Tensor) or args[0].dim() != 2 or not isinstance(output, Tensor):
            raise NotLayerwise(f"{type(module).__name__} does not map one (n, features) input")
        seen.append((args[0].detach(), output, module))

    owners = [m for m in model.modules() if any(id(p) in wanted for p in m.parameters(recurse=False))]
    handles = [m.register_forward_hook(keep) for m in owners]
    try:
        outputs = selected(replay(model, forward), forward)
    finally:
        for handle in handles:
            handle.remove()
    used = [module for _, _, module in seen]
    if not used:
        raise NotLayerwise("no layer was seen: compiled code calls no hooks")
    if len(used) != len({id(m) for m in used}) or len(outputs) != 1:
        raise NotLayerwise("a layer is used twice, or there are several outputs")
    n = outputs[0].numel()
    if outputs[0].shape[0] != n or any(a.shape[0] != n for a, _, _ in seen):
        raise NotLayerwise("not one scalar output per sample")
    return outputs[0], seen


def _per_sample(hessian: OutputHessian, call: LossCall, n: int) -> Tensor:
    """The diagonal of H_out, which has to be diagonal: no sample's loss depends on another's output."""
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(call.inputs[0].shape, generator=generator).to(call.inputs[0])
    (diagonal,) = hessian([torch.ones_like(probe)])
    (product,) = hessian([probe])
    if not torch.allclose(product, diagonal * probe, rtol=1e-4, atol=1e-6 * float(diagonal.abs().max())):
        raise NotLayerwise("the loss of one sample depends on the output of another")
    return diagonal.reshape(n)


def _share(module: nn.Module, a: Tensor, b: Tensor, pulled: dict[int, Tensor], rates: dict[int, float]) -> Tensor:
    """A layer's share of the NTK; its scale s is read off, and its linearity checked, by the gradient of sum f."""
    b = b.reshape(len(a), -1)
    share = b.new_zeros(len(a), len(a))
    for name, p in module.named_parameters(recurse=False):
        if id(p) not in rates:
            continue
        expected = b.T @ a if name == "weight" and p.dim() == 2 else b.sum(0)
        gradient = pulled[id(p)]
        if expected.shape != gradient.shape:
            raise NotLayerwise(f"{type(module).__name__}.{name} is not the weight or bias of a linear layer")
        s = float((gradient * expected).sum() / expected.square().sum().clamp_min(1e-30))
        if float((gradient - s * expected).norm()) > 1e-3 * float(gradient.norm()):
            raise NotLayerwise(f"{type(module).__name__} is not linear in its {name}")
        inner = a @ a.T if expected.dim() == 2 else 1.0
        share = share + rates[id(p)] * s**2 * inner * (b @ b.T)
    return share
