"""The neural tangent kernel of a model, exactly; its eigenspaces, and the loss in them (thesis Section 4.2)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from catapult_opt import critical_lr
from catapult_opt.catapults import is_super_critical
from catapult_opt.checks import check_whole_number
from catapult_opt.parameters import trainable
from catapult_opt.replay import preserved

from .infinite_width import infinite_cnn_ntk, infinite_fcn_ntk
from .layers import NTKConv2d, NTKLinear

__all__ = [
    "Eigenspaces",
    "critical_rate",
    "critical_rates",
    "eigenspaces",
    "infinite_cnn_ntk",
    "infinite_fcn_ntk",
    "loss_in_eigenspace",
    "match_rate",
    "ntk",
]


def ntk(model: nn.Module, inputs: Tensor, *, memory: float = 1e9) -> Tensor:
    """The tangent kernel ``J J^T`` of a model at its present weights, (nk, nk) for n samples and k outputs.

    ``J`` is the Jacobian of all outputs with respect to all parameters that require gradients; its rows are ordered by
    sample, then by output, as ``model(inputs).flatten()`` is. No reduction factor: ``J J^T`` itself.

    Networks of linear layers and convolutions are done layer by layer from activations and output gradients, linear
    layers without forming J. All others by rows of J, a group of parameters and, where one parameter's rows of all
    samples are still too many, a block of samples at a time. The mode (train or eval) is the model's present one:
    BatchNorm in train mode makes outputs depend on all samples, and so does then J. Put models with dropout in eval
    mode.

    Parameters, gradients, buffers, random state and modes are left as they were.

    Args:
        model: maps (n, ...) to a tensor (n, ...).
        inputs: (n, ...).
        memory: bytes that rows of J may take, about; the kernel itself and one sample's graph come on top. It does not
            change the result.

    Raises:
        ValueError: no samples, no trainable parameters, or outputs that do not keep one row per sample.
        TypeError: the model does not return a floating-point tensor.

    Source: thesis Definition 4.2.1; for k outputs Appendix C.2.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> ntk(model, torch.tensor([[1.0, 0.0], [1.0, 2.0]]))
    tensor([[1., 1.],
            [1., 5.]])
    """
    if not isinstance(inputs, Tensor):
        raise TypeError(f"inputs must be a tensor (n, ...), got {type(inputs).__name__}")
    if inputs.ndim == 0 or not len(inputs):
        raise ValueError(f"inputs must have at least one sample, got shape {tuple(inputs.shape)}")
    if not memory > 0:
        raise ValueError(f"memory must be a positive number of bytes, got {memory!r}")
    params = trainable(model)
    with torch.inference_mode(False), preserved(model, None, params):
        joint = _batch_statistics(model)
        if not joint:
            try:
                return _layerwise(model, inputs, params, memory)
            except _NotLayerwise:
                pass
        rows = _Rows(model, inputs, joint)
        return _by_rows(rows, params, memory)


def _batch_statistics(model: nn.Module) -> bool:
    """Whether outputs depend on the other samples of the batch."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    return any(isinstance(m, kinds) and (m.training or m.running_mean is None) for m in model.modules())


class _NotLayerwise(Exception):
    """The model does not consist of linear layers and convolutions that are each used once."""


def _layerwise(model: nn.Module, inputs: Tensor, params: Sequence[Tensor], memory: float) -> Tensor:
    """With layers z = s W a + b and B the gradient of an output with respect to z, a layer's share is <B a^T, B a^T>.

    One forward pass and one backward pass for each output of a sample, all samples together. For linear layers the
    share is the product of the inputs' and the gradients' inner products, and no row of J is formed; for convolutions
    rows are formed, for some channels at a time.
    """
    wanted = {id(p) for p in params}
    owners = [m for m in model.modules() if any(id(p) in wanted for p in m.parameters(recurse=False))]
    owned = [id(p) for m in owners for p in m.parameters(recurse=False)]
    if not all(_is_plain(m) for m in owners) or len(set(owned)) < len(owned):
        raise _NotLayerwise
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...], z: Tensor) -> None:
        seen.append((module, args[0].detach(), z))

    handles = [m.register_forward_hook(keep) for m in owners]
    try:
        with torch.enable_grad():
            outputs = _checked(model(inputs), inputs).flatten(1)
    finally:
        for handle in handles:
            handle.remove()
    dims = {2: (nn.Linear, NTKLinear), 4: (nn.Conv2d, NTKConv2d)}
    # A layer that torch.func runs hides its outputs from autograd.
    usual = [isinstance(m, dims.get(a.ndim, ())) and len(a) == len(inputs) and z.requires_grad for m, a, z in seen]
    if len(seen) != len(owners) or not all(usual):
        raise _NotLayerwise
    n, k = outputs.shape
    zs = [z for *_, z in seen]
    pulled = [
        torch.autograd.grad(outputs[:, c].sum(), zs, retain_graph=True, allow_unused=True, materialize_grads=True)
        for c in range(k)
    ]
    kernel = outputs.new_zeros(n * k, n * k)
    for (module, a, _), *gradients in zip(seen, *pulled, strict=True):
        b = torch.stack(gradients, 1).flatten(0, 1)  # (n k, ...): rows by sample, then output
        trained = {name: id(p) in wanted for name, p in module.named_parameters(recurse=False)}
        if trained.get("bias"):
            sums = b if b.ndim == 2 else b.sum((2, 3))
            kernel += sums @ sums.T
        if trained["weight"]:
            kernel += _of_weights(module, a, b, k, memory)
    return kernel.detach()


def _of_weights(module: nn.Module, a: Tensor, b: Tensor, k: int, memory: float) -> Tensor:
    if isinstance(module, (nn.Linear, NTKLinear)):
        scale = 1.0 if isinstance(module, nn.Linear) else 1 / module.in_features
        inner = (a @ a.T * scale).repeat_interleave(k, 0).repeat_interleave(k, 1)
        return inner * (b @ b.T)
    assert isinstance(module, (nn.Conv2d, NTKConv2d))
    scale = 1.0 if isinstance(module, nn.Conv2d) else module.scale
    assert not isinstance(module.padding, str)
    patches = F.unfold(a, module.kernel_size, padding=module.padding, stride=module.stride) * scale  # (n, 9 c, places)
    b = b.reshape(len(a), k, b.shape[1], -1)
    step = max(1, int(memory / (b.element_size() * len(a) * k * patches.shape[1])))
    kernel = b.new_zeros(len(a) * k, len(a) * k)
    for part in torch.split(b, step, dim=2):
        rows = torch.einsum("nkcl,nfl->nkcf", part, patches).reshape(len(kernel), -1)
        kernel.addmm_(rows, rows.T)
    return kernel


def _is_plain(module: nn.Module) -> bool:
    """A linear layer or a convolution whose patches `unfold` gives."""
    if type(module) is nn.Conv2d:
        usual = module.padding_mode == "zeros" and not isinstance(module.padding, str)
        return usual and module.groups == 1 and set(module.dilation) == {1}
    return type(module) in (nn.Linear, NTKLinear, NTKConv2d)


def _checked(outputs: object, inputs: Tensor) -> Tensor:
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        raise TypeError("model must return a floating-point tensor: wrap it in a module that does")
    if outputs.ndim == 0 or len(outputs) != len(inputs):
        raise ValueError(
            f"model must return one row per sample, got shape {tuple(outputs.shape)} for {len(inputs)} samples"
        )
    return outputs


class _Rows:
    """Rows of the Jacobian of some samples with respect to some parameters."""

    def __init__(self, model: nn.Module, inputs: Tensor, joint: bool) -> None:
        self.model, self.inputs = model, inputs
        self.joint = self._outputs(inputs) if joint else None
        first = self.joint[:1] if self.joint is not None else self._outputs(inputs[:1])
        self.k = first.numel()

    def _outputs(self, x: Tensor) -> Tensor:
        return _checked(self.model(x), x)

    def __call__(self, samples: range, group: Sequence[Tensor]) -> Tensor:
        """(len(samples) k, number of parameters in the group)."""
        width = sum(p.numel() for p in group)
        jacobian = group[0].new_empty(len(samples) * self.k, width)
        for row, output in enumerate(self._each_output(samples)):
            pulled = torch.autograd.grad(output, group, retain_graph=True, allow_unused=True)
            parts = [torch.zeros_like(p) if g is None else g for g, p in zip(pulled, group, strict=True)]
            torch.cat([part.flatten() for part in parts], out=jacobian[row])
        return jacobian

    def _each_output(self, samples: range) -> Iterator[Tensor]:
        for i in samples:
            outputs = self._outputs(self.inputs[i : i + 1]) if self.joint is None else self.joint[i : i + 1]
            yield from outputs.flatten()


def _by_rows(rows: _Rows, params: Sequence[Tensor], memory: float) -> Tensor:
    n, k = len(rows.inputs), rows.k
    kernel = params[0].new_zeros(n * k, n * k)
    for group in _groups(params, n * k, memory):
        per_sample = k * sum(p.numel() * p.element_size() for p in group)
        # Two blocks are in memory at once, unless one holds everything.
        size = n if n * per_sample <= memory else max(1, int(memory / 2 / per_sample))
        blocks = [range(start, min(start + size, n)) for start in range(0, n, size)]
        for i, block in enumerate(blocks):
            jacobian = rows(block, group)
            here = slice(block.start * k, block.stop * k)
            kernel[here, here].addmm_(jacobian, jacobian.T)
            for other in blocks[:i]:
                there = slice(other.start * k, other.stop * k)
                share = jacobian @ rows(other, group).T
                kernel[here, there] += share
                kernel[there, here] += share.T
    return kernel


def _groups(params: Sequence[Tensor], count: int, memory: float) -> Iterator[list[Tensor]]:
    """Parameters in order, as many at a time as their rows fit into memory, and at least one."""
    group: list[Tensor] = []
    size = 0
    for p in params:
        needed = count * p.numel() * p.element_size()
        if group and size + needed > memory:
            yield group
            group, size = [], 0
        group.append(p)
        size += needed
    yield group


@dataclass(frozen=True, eq=False)
class Eigenspaces:
    """Eigenvalues and eigenvectors of a kernel, largest first."""

    values: Tensor  # (N,) float64
    vectors: Tensor  # (N, N) float64, a column each


def eigenspaces(kernel: Tensor) -> Eigenspaces:
    """All eigenpairs of a symmetric kernel, in float64.

    Raises:
        ValueError: the kernel is not square or not finite.

    >>> eigenspaces(torch.diag(torch.tensor([1.0, 3.0]))).values
    tensor([3., 1.], dtype=torch.float64)
    """
    if kernel.ndim != 2 or kernel.shape[0] != kernel.shape[1]:
        raise ValueError(f"kernel must be square, got shape {tuple(kernel.shape)}")
    if not bool(kernel.isfinite().all()):
        raise ValueError("kernel must be finite: has the training diverged?")
    values, vectors = torch.linalg.eigh(kernel.double())
    return Eigenspaces(values.flip(0), vectors.flip(1))


def loss_in_eigenspace(residual: Tensor, spaces: Eigenspaces, s: int) -> tuple[float, float]:
    """The mean squared error (1/n) |f - y|^2 in the top-s eigenspace of the kernel, and in its complement.

    ``L = L_<=s + L_>s``. The factor is 1/n for n samples, whatever the number k of outputs; for k outputs the thesis
    takes the top-ks eigenspace, which is for the caller to multiply.

    Args:
        residual: f - y, (n,) or (n, k).
        spaces: of the kernel of the same outputs.
        s: dimension of the top eigenspace, 0 to nk.

    Raises:
        ValueError: sizes that do not fit, or s out of range.

    Source: thesis Eq. 4.2 and Appendix C.2.

    >>> spaces = eigenspaces(torch.diag(torch.tensor([1.0, 3.0])))
    >>> loss_in_eigenspace(torch.tensor([4.0, 2.0]), spaces, 1)
    (2.0, 8.0)
    """
    if residual.numel() != len(spaces.values):
        raise ValueError(f"residual has {residual.numel()} entries, the kernel {len(spaces.values)} rows")
    if not 0 <= s <= residual.numel():
        raise ValueError(f"s must be in 0 ... {residual.numel()}, got {s}")
    parts = (spaces.vectors.T @ residual.detach().flatten().double()).square() / len(residual)
    return float(parts[:s].sum()), float(parts[s:].sum())


def critical_rate(kernel: Tensor, samples: int | None = None) -> float:
    """n / lambda_max(K): the critical rate of gradient descent on (1/n) |f - y|^2, infinite for a kernel of zeros.

    Args:
        kernel: of a batch.
        samples: n, where the model has several outputs; without it the kernel's size.

    Source: thesis Section 4.2 and Appendix C.1.

    >>> critical_rate(torch.diag(torch.tensor([1.0, 4.0])))
    0.5
    """
    if samples is not None:
        check_whole_number("samples", samples)
    top = float(torch.linalg.eigvalsh(kernel.double())[-1])
    return (len(kernel) if samples is None else samples) / top if top > 0 else math.inf


def critical_rates(model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[float, float]:
    """2 / lambda_max of the Hessian of (1/n) |f - y|^2, and n / lambda_max(K), which is close to it for wide networks.

    Source: thesis Appendix C.1, Figure C.1.

    >>> model, x = nn.Linear(1, 1, bias=False), torch.tensor([[1.0], [2.0]])
    >>> [round(rate, 4) for rate in critical_rates(model, x, x)]
    [0.4, 0.4]
    """
    n = len(inputs)

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        if outputs.shape != y.shape:
            raise ValueError(
                f"targets must have the shape of the outputs, {tuple(outputs.shape)}, got {tuple(y.shape)}"
            )
        return (outputs - y).square().sum() / n

    hessian = critical_lr(model, loss, inputs, targets, curvature="hessian")
    return hessian.eta_crit, critical_rate(ntk(model, inputs), n)


def match_rate(losses: Sequence[float], rates: Sequence[float], lr: float | Sequence[float]) -> float:
    """Of the steps after which the loss is higher, the share with ``lr`` above the critical rate of their batch.

    Args:
        losses: training loss before every step, and after the last: one more than there are rates.
        rates: eta_crit of every step's batch, before the step.
        lr: the constant learning rate, or that of every step.

    Returns:
        A share in [0, 1]; NaN where the loss never rises.

    Raises:
        ValueError: not one loss more than there are rates, or not as many learning rates.

    Source: thesis Table 4.2.

    >>> match_rate([1.0, 2.0, 1.0, 3.0], [0.5, 9.0, 2.0], lr=1.0)
    0.5
    """
    if len(losses) != len(rates) + 1:
        raise ValueError(f"losses must be one more than rates, got {len(losses)} and {len(rates)}")
    applied = [lr] * len(rates) if isinstance(lr, (int, float)) else lr
    if len(applied) != len(rates):
        raise ValueError(f"lr must be one number or one for each of the {len(rates)} rates, got {len(applied)}")
    above = [is_super_critical(*pair) for pair in zip(applied, rates, strict=True)]
    rising = [flag for flag, before, after in zip(above, losses, losses[1:], strict=False) if after > before]
    return sum(rising) / len(rising) if rising else math.nan
