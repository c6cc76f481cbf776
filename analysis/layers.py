"""Linear layers and convolutions in NTK parameterisation or PyTorch's own (thesis Appendix C.6)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Bias = bool | Literal["hidden"] | None

__all__ = ["Bias", "Layers", "NTKConv2d", "NTKLinear", "check_bias", "whole_size"]


class NTKLinear(nn.Module):
    """A linear layer in NTK parameterisation: ``x -> x W^T / sqrt(in_features) + b``.

    Every entry of ``weight`` (out_features, in_features) is drawn from N(0, 1): the scale that other parameterisations
    put into the initial weights is in the forward pass, so it also scales the gradient, and the critical learning
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
        self.in_features = whole_size("in_features", in_features)
        self.out_features = whole_size("out_features", out_features)
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


class NTKConv2d(nn.Module):
    """A square convolution in NTK parameterisation: ``conv(x, W) / sqrt(in_channels kernel_size^2) + b``.

    As `NTKLinear`: weights (out_channels, in_channels, kernel_size, kernel_size) from N(0, 1), no bias by default. Zero
    padding keeps height and width at stride 1 and an odd kernel_size. (The filter indices printed in Appendix C.6 run
    to (s+1)/2, with s^2 in the scale: taken as the s by s filter that the scale says.)

    Args:
        in_channels, out_channels, kernel_size, stride: integers of at least 1.
        bias: add a trainable bias, zero at the start.
        generator: source of the weights; the global generator without one.

    Raises:
        TypeError, ValueError: a size is not an integer of at least 1.

    Source: thesis Appendix C.6, "NTK parameterization".

    >>> NTKConv2d(3, 8)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 8, 32, 32])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        bias: bool = False,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = whole_size("in_channels", in_channels)
        self.out_channels = whole_size("out_channels", out_channels)
        self.kernel_size = whole_size("kernel_size", kernel_size)
        self.stride = whole_size("stride", stride)
        self.padding = (kernel_size - 1) // 2
        self.scale = 1.0 / math.sqrt(in_channels * kernel_size**2)
        shape = out_channels, in_channels, kernel_size, kernel_size
        self.weight = nn.Parameter(torch.randn(shape, generator=generator))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(n, in_channels, h, w) -> (n, out_channels, h', w')."""
        # Scaling the weights is cheapest here: they are far fewer than the pixels.
        return F.conv2d(x, self.weight * self.scale, self.bias, self.stride, self.padding)


class Layers:
    """Makes the layers of one parameterisation, "ntk" or "torch"; ``output`` marks the last one."""

    def __init__(self, parameterization: str, bias: Bias, generator: torch.Generator | None) -> None:
        if parameterization not in ("ntk", "torch"):
            raise ValueError(f"parameterization must be 'ntk' or 'torch', got {parameterization!r}")
        check_bias(bias)
        self.ntk = parameterization == "ntk"
        choice = not self.ntk if bias is None else bias
        self.bias, self.output_bias = bool(choice), choice is True
        self.generator = generator

    def linear(self, fan_in: int, fan_out: int, *, output: bool = False) -> nn.Module:
        bias = self.output_bias if output else self.bias
        if self.ntk:
            return NTKLinear(fan_in, fan_out, bias, generator=self.generator)
        return self._default(nn.Linear(fan_in, fan_out, bias))

    def conv(self, fan_in: int, fan_out: int, kernel_size: int = 3, stride: int = 1) -> nn.Module:
        if self.ntk:
            return NTKConv2d(fan_in, fan_out, kernel_size, stride, self.bias, generator=self.generator)
        padding = (kernel_size - 1) // 2
        return self._default(nn.Conv2d(fan_in, fan_out, kernel_size, stride, padding, bias=self.bias))

    def _default(self, layer: nn.Linear | nn.Conv2d) -> nn.Module:
        """PyTorch's default, U(-1/sqrt(fan_in), 1/sqrt(fan_in)) for weights and biases, from our generator."""
        bound = 1.0 / math.sqrt(layer.weight[0].numel())
        with torch.no_grad():
            for p in layer.parameters():
                p.uniform_(-bound, bound, generator=self.generator)
        return layer


def check_bias(bias: object) -> None:
    if not (bias is None or isinstance(bias, bool) or bias == "hidden"):
        raise ValueError(f"bias must be True, False, None or 'hidden', got {bias!r}")


def whole_size(name: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value
