"""Two-layer convolutional networks and their kernel in closed form, and data in the space it spans (Appendix B.14)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..networks import NTKLinear
from ..tasks import Split

if TYPE_CHECKING:
    pass

__all__ = ["cnn_kernel", "in_span", "two_layer_cnn"]


class _Patches(nn.Module):
    """(n, channels, h, w) -> (n, h w, 9 channels): what a 3 x 3 convolution with padding 1 sees at every place."""

    def forward(self, x: Tensor) -> Tensor:
        return F.unfold(x, 3, padding=1).mT


def two_layer_cnn(
    channels_in: int, side: int, width: int, d_out: int, activation: Callable[[], nn.Module], generator: torch.Generator
) -> nn.Sequential:
    """A 3 x 3 convolution of `width` channels and a linear layer on all of its outputs, in NTK parameterisation.

    The thesis names "two-layer convolutional neural network" and its width only.
    """
    first = NTKLinear(9 * channels_in, width, generator=generator)
    last = NTKLinear(width * side * side, d_out, generator=generator)
    return nn.Sequential(_Patches(), first, activation(), nn.Flatten(), last)


def in_span(train: Split, test: Split) -> list[Split]:
    """The same inputs in coordinates of the space that they span, where that has fewer dimensions.

    To a network whose first layer is N(0, 1), without biases, this is only another draw of its weights: the coordinates
    are scaled so that its division by the root of the dimension comes out the same. Training is as much faster.
    """
    flat = torch.cat([train.inputs, test.inputs]).flatten(1)
    d = flat.shape[1]
    if len(flat) < d:
        basis = torch.linalg.qr(flat.double().T)[0]
        flat = (flat.double() @ basis * math.sqrt(basis.shape[1] / d)).to(flat.dtype)
    inputs = torch.split(flat, [len(train), len(test)])
    return [Split(x, part.targets) for x, part in zip(inputs, (train, test), strict=True)]


@torch.no_grad()
def cnn_kernel(patches: Tensor, first: Tensor, last: Tensor, pattern: Tensor) -> Tensor:
    """The tangent kernel (n, n) of a `two_layer_cnn` of ReLUs and one output, or of its NQM, in closed form.

    As for `TwoLayerNQM`, the NQM is the net with its activation pattern held: that of the weights ``pattern`` of its
    first layer. Shapes: patches (n, places, 9 channels_in), first (channels, 9 channels_in), last (1, places channels).
    """
    n, places, size = patches.shape
    active = patches @ pattern.T > 0
    scale = math.sqrt(size * last.numel())
    by_last = (active * (patches @ first.T)).reshape(n, -1) / scale
    outer = active * last.reshape(places, -1)
    by_first = torch.einsum("nlc,nlp->ncp", outer, patches).reshape(n, -1) / scale
    return by_last @ by_last.T + by_first @ by_first.T
