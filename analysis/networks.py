"""Networks in the NTK parameterisation of the thesis (Appendix C.6): N(0, 1) weights, scaled in the forward pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["NTKLinear", "ntk_mlp"]


class NTKLinear(nn.Module):
    """A linear layer in NTK parameterisation: ``x -> x W^T / sqrt(in_features) + b``.

    Every entry of ``weight`` (out_features, in_features) is drawn from N(0, 1): the scale that other parameterisations
    put into the initial weights stands in the forward pass, so it also scales the gradient, and the critical learning
    rate does not vanish as the layer is widened. ``bias`` (out_features,) is absent by default and starts at zero where
    asked for: Appendix C.6 writes ``+ b`` but draws only the *weights* from N(0, 1), and the numbers of Table 4.1
    come out without biases.

    Args:
        in_features, out_features: sizes, at least 1.
        bias: add a trainable bias.
        generator: source of the weights; the global generator without one.

    Raises:
        TypeError, ValueError: a size is not an integer of at least 1.

    Source: thesis Appendix C.6, "NTK parameterization".

    >>> layer = NTKLinear(4, 3, generator=torch.Generator().manual_seed(0))
    >>> x = torch.ones(2, 4)
    >>> torch.equal(layer(x), x @ layer.weight.T / 2)
    True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.in_features = _size("in_features", in_features)
        self.out_features = _size("out_features", out_features)
        self.weight = nn.Parameter(torch.randn(out_features, in_features, generator=generator))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        # The scale goes where there are fewer numbers to multiply: on wide layers it would cost a tenth of a step.
        scale = 1.0 / math.sqrt(self.in_features)
        if self.in_features <= self.out_features:
            outputs = F.linear(x * scale, self.weight)
        else:
            outputs = F.linear(x, self.weight) * scale
        return outputs if self.bias is None else outputs + self.bias

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


def ntk_mlp(
    d_in: int,
    width: int,
    depth: int,
    d_out: int = 1,
    *,
    bias: bool = False,
    activation: Callable[[], nn.Module] = nn.ReLU,
    generator: torch.Generator | None = None,
) -> nn.Sequential:
    """A fully connected network in NTK parameterisation, (n, d_in) -> (n, d_out).

    ``depth`` counts the weight layers, as the thesis does: its "2-layer FCN" has one hidden layer. The activation
    follows every layer but the last, and no sqrt(2) gain is applied, so a ReLU halves the second moment of what passes.

    Args:
        d_in, width, depth, d_out: integers of at least 1; with ``depth=1`` there is no hidden layer.
        bias: biases in every layer, zero at the start (see `NTKLinear`).
        activation: makes one activation module.
        generator: source of the weights; the global generator without one.

    Raises:
        TypeError, ValueError: a size is not an integer of at least 1, or ``activation`` cannot be called.

    Source: thesis Appendix C.6, "NTK parameterization".

    >>> model = ntk_mlp(100, 1024, depth=2)
    >>> [type(layer).__name__ for layer in model], model(torch.zeros(5, 100)).shape
    (['NTKLinear', 'ReLU', 'NTKLinear'], torch.Size([5, 1]))
    """
    sizes = [_size("d_in", d_in)] + [_size("width", width)] * (_size("depth", depth) - 1) + [_size("d_out", d_out)]
    if not callable(activation) or isinstance(activation, nn.Module):
        raise TypeError(f"activation must make a module (nn.ReLU, not nn.ReLU()), got {activation!r}")
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [NTKLinear(fan_in, fan_out, bias, generator=generator), activation()]
    return nn.Sequential(*layers[:-1])


def _size(name: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value
