"""The tangent kernels that networks have at infinite width, by recursion over their layers."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from catapult_opt.checks import check_whole_number

from .layers import Bias, check_bias

__all__ = ["infinite_cnn_ntk", "infinite_fcn_ntk"]


def infinite_fcn_ntk(inputs: Tensor, depth: int, *, bias: Bias = False) -> Tensor:
    """The tangent kernel (n, n) that `networks.mlp` in NTK parameterisation with one output has at infinite width.

    Networks of k outputs have it k times: theirs is this one times the identity (k, k).

    Args:
        inputs: (n, ...), flattened; in float64 for exact results.
        depth: weight layers, at least 1.
        bias: as for `networks.mlp`: zero at the start and trained, in all layers, in "hidden" ones only, or none.

    Raises:
        ValueError: depth below 1, or no such bias.

    Source: thesis Appendix C.6 for the network; Jacot, Gabriel and Hongler, "Neural tangent kernel", 2018, for the
    limit; Cho and Saul, "Kernel methods for deep learning", 2009, for the ReLU.

    >>> infinite_fcn_ntk(torch.eye(2), depth=2).round(decimals=4)  # on the diagonal |x|^2 / d
    tensor([[0.5000, 0.0796],
            [0.0796, 0.5000]])
    """
    check_whole_number("depth", depth)
    x = inputs.flatten(1)
    return _infinite(x @ x.T / x.shape[1], x.square().mean(1), depth, bias, lambda kernel: kernel)


def infinite_cnn_ntk(images: Tensor, depth: int, *, bias: Bias = False) -> Tensor:
    """As `infinite_fcn_ntk`, of `networks.cnn`: ``depth - 1`` 3x3 convolutions and a linear layer on all positions.

    As there is no pooling, only outputs at the same position correlate: n^2 h w numbers are kept.

    Args:
        images: (n, channels, h, w).
        depth, bias: as there; depth at least 2.

    Raises:
        ValueError: depth below 2, or no such bias.

    Source: thesis Appendix C.6; Arora et al., "On exact computation with an infinitely wide neural net", 2019.

    >>> infinite_cnn_ntk(torch.ones(1, 1, 1, 1), depth=2)  # one pixel: eight of nine weights see the padding
    tensor([[0.1111]])
    """
    check_whole_number("depth", depth)
    if depth < 2:
        raise ValueError(f"depth must be at least 2, got {depth}")
    n, channels, h, w = images.shape
    x = images.permute(2, 3, 0, 1).reshape(h * w, n, channels)

    def patches(kernel: Tensor) -> Tensor:
        """The mean over the 3x3 places that a filter sees, zero beyond the border, of (h w, ...)."""
        maps = kernel.reshape(h, w, -1).permute(2, 0, 1).unsqueeze(1)
        return F.avg_pool2d(maps, 3, 1, 1).squeeze(1).permute(1, 2, 0).reshape(kernel.shape)

    kernel = _infinite(x @ x.mT / channels, x.square().mean(2), depth, bias, patches)
    return kernel.mean(0)


def _infinite(kernel: Tensor, diagonal: Tensor, depth: int, bias: Bias, layer: Callable[[Tensor], Tensor]) -> Tensor:
    """Covariances of the layers' outputs and the tangent kernel, layer after layer; ``layer`` sums over its inputs.

    Args:
        kernel, diagonal: of the inputs, (..., n, n) and (..., n); the latter is exact where the norms are wanted.
    """
    check_bias(bias)
    tangent = torch.zeros_like(kernel)
    for _ in range(depth - 1):
        kernel, diagonal = layer(kernel), layer(diagonal)
        tangent = kernel + float(bool(bias)) + layer(tangent)
        norms = (diagonal.unsqueeze(-1) * diagonal.unsqueeze(-2)).sqrt()
        cosine = (kernel / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp(-1, 1)
        angle = cosine.arccos()
        active = (math.pi - angle) / (2 * math.pi)  # E of the product of the ReLUs' derivatives
        kernel = norms * ((1 - cosine.square()).sqrt() / (2 * math.pi) + active * cosine)
        diagonal, tangent = diagonal / 2, tangent * active
    return kernel + tangent + float(bias is True)
