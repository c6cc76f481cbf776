"""The thesis' networks, in NTK parameterisation (N(0, 1) weights, scaled in the forward pass) or PyTorch's own.

Widths are free, so that what needs an accelerator at the thesis' size can be run small on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import Bias, Layers, NTKConv2d, NTKLinear, whole_size

__all__ = ["NTKConv2d", "NTKLinear", "cnn", "mlp", "myrtle5", "ntk_mlp", "scale_weights_", "vit", "wide_resnet"]


def mlp(
    d_in: int,
    width: int,
    depth: int,
    d_out: int = 1,
    *,
    parameterization: str = "ntk",
    bias: Bias = None,
    generator: torch.Generator | None = None,
) -> nn.Sequential:
    """A ReLU network of ``depth`` weight layers that flattens its inputs, (n, ...) of d_in entries -> (n, d_out).

    Args:
        d_in, width, depth, d_out: integers of at least 1; with ``depth=1`` there is no hidden layer.
        parameterization: "ntk", or "torch" for PyTorch's default.
        bias: by default PyTorch's layers have biases and those in NTK parameterisation none (see `NTKLinear`); "hidden"
            for all layers but the last, as the critical rates of thesis Section 4.3 suggest (artefact critical-rates).
        generator: source of the weights; the global generator without one.

    Raises:
        TypeError, ValueError: a size is not an integer of at least 1, or there is no such parameterisation.

    Source: thesis Appendix C.6.

    >>> mlp(12, 8, 3)(torch.zeros(5, 3, 2, 2)).shape
    torch.Size([5, 1])
    """
    make = Layers(parameterization, bias, generator)
    sizes = (
        [whole_size("d_in", d_in)]
        + [whole_size("width", width)] * (whole_size("depth", depth) - 1)
        + [whole_size("d_out", d_out)]
    )
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise(sizes[:-1]):
        layers += [make.linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers, make.linear(sizes[-2], sizes[-1], output=True))


def cnn(
    channels: int,
    width: int,
    depth: int,
    size: int,
    d_out: int = 1,
    *,
    parameterization: str = "ntk",
    bias: Bias = None,
    generator: torch.Generator | None = None,
) -> nn.Sequential:
    """A ReLU network of ``depth - 1`` 3x3 convolutions at stride 1 and a linear layer on the flattened image.

    Args:
        channels, size: of the inputs (n, channels, size, size).
        width: channels of every convolution (the thesis' 5-layer CNN has 512).
        depth: weight layers, at least 2.
        d_out, parameterization, bias, generator: as for `mlp`.

    Raises:
        TypeError, ValueError: as for `mlp`.

    Source: thesis Appendix C.6, "Figure 4.3".

    >>> cnn(3, 4, depth=5, size=8)(torch.zeros(2, 3, 8, 8)).shape
    torch.Size([2, 1])
    """
    make = Layers(parameterization, bias, generator)
    whole_size("size", size)
    if whole_size("depth", depth) < 2:
        raise ValueError(f"depth must be at least 2, got {depth}")
    layers: list[nn.Module] = []
    for fan_in in [channels] + [width] * (depth - 2):
        layers += [make.conv(fan_in, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), make.linear(width * size**2, d_out, output=True))


def myrtle5(
    channels: int,
    width: int,
    d_out: int = 1,
    *,
    parameterization: str = "ntk",
    bias: Bias = None,
    generator: torch.Generator | None = None,
) -> nn.Sequential:
    """The 5-layer Myrtle network: four 3x3 convolutions, halving after the second, third and fourth, mean, linear.

    Inputs are (n, channels, h, w) with h and w at least 8. Arguments as for `cnn`.

    Source: the thesis names it (Appendix C.6, Figures 4.9 and C.11) without saying more; the layers are those of
    Shankar et al., "Neural kernels without tangents", 2020.

    >>> myrtle5(3, 4, 10)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    make = Layers(parameterization, bias, generator)
    layers: list[nn.Module] = []
    for i, fan_in in enumerate([channels, width, width, width]):
        layers += [make.conv(fan_in, width), nn.ReLU(), *([nn.AvgPool2d(2)] if i else [])]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), make.linear(width, d_out, output=True))


class _ResidualBlock(nn.Module):
    """norm, ReLU, conv, norm, ReLU, conv; the shortcut is a 1x1 convolution where the shape changes."""

    def __init__(self, make: Layers, fan_in: int, width: int, stride: int, norm: bool) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(fan_in) if norm else nn.Identity()
        self.conv1 = make.conv(fan_in, width, 3, stride)
        self.norm2 = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.conv2 = make.conv(width, width)
        same = stride == 1 and fan_in == width
        self.shortcut: nn.Module | None = None if same else make.conv(fan_in, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(h)
        outputs: Tensor = shortcut + self.conv2(F.relu(self.norm2(self.conv1(h))))
        return outputs


def wide_resnet(
    channels: int,
    d_out: int = 1,
    *,
    depth: int = 10,
    widen: float = 10,
    norm: bool = True,
    parameterization: str = "ntk",
    bias: Bias = False,
    generator: torch.Generator | None = None,
) -> nn.Sequential:
    """A pre-activation Wide ResNet of ``depth`` = 6 N + 4 layers, (n, channels, h, w) -> (n, d_out).

    Three groups of N blocks with 16, 32 and 64 times ``widen`` channels, the second and third at stride 2.

    Args:
        channels, d_out: as for `cnn`.
        depth: 10, 16, 22, ...
        widen: 10 in the thesis; below 1 for a net smaller than the narrowest.
        norm: BatchNorm, in train mode at first.
        bias: as for `mlp`, but none by default.
        parameterization, generator: as for `mlp`.

    Raises:
        ValueError: no such depth or parameterisation.

    Source: thesis Section 4.3 (Wide ResNets 10-10); Zagoruyko and Komodakis, "Wide residual networks", 2016.

    >>> wide_resnet(3, widen=0.25)(torch.zeros(2, 3, 8, 8)).shape
    torch.Size([2, 1])
    """
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"depth must be 10, 16, 22, ..., got {depth}")
    make = Layers(parameterization, bias, generator)
    widths = [max(1, round(base * widen)) for base in (16, 32, 64)]
    layers: list[nn.Module] = [make.conv(channels, 16)]
    fan_in = 16
    for group, width in enumerate(widths):
        for block in range((depth - 4) // 6):
            layers.append(_ResidualBlock(make, fan_in, width, 2 if group and not block else 1, norm))
            fan_in = width
    last = nn.BatchNorm2d(fan_in) if norm else nn.Identity()
    return nn.Sequential(
        *layers, last, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), make.linear(fan_in, d_out, output=True)
    )


class _TransformerBlock(nn.Module):
    """Attention and a two-layer network, each after a LayerNorm and beside a shortcut."""

    def __init__(self, make: Layers, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = make.linear(width, 3 * width), make.linear(width, width)
        self.up, self.down = make.linear(width, 4 * width), make.linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        # Written out, because PyTorch's fused attention has no second derivative on the CPU.
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        x = x + self.proj((weights @ v).transpose(1, 2).reshape(n, tokens, width))
        outputs: Tensor = x + self.down(F.relu(self.up(self.norm2(x))))
        return outputs


class _VisionTransformer(nn.Module):
    def __init__(
        self, make: Layers, channels: int, size: int, patch: int, width: int, depth: int, heads: int, d_out: int
    ) -> None:
        super().__init__()
        self.patch = patch
        self.embed = make.linear(channels * patch**2, width)
        places = torch.randn(1, (size // patch) ** 2, width, generator=make.generator)
        self.places = nn.Parameter(places if make.ntk else 0.02 * places)
        self.blocks = nn.Sequential(*(_TransformerBlock(make, width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = make.linear(width, d_out, output=True)

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, self.patch, stride=self.patch).transpose(1, 2)
        tokens = self.blocks(self.embed(patches) + self.places)
        outputs: Tensor = self.head(self.norm(tokens).mean(1))
        return outputs


def vit(
    channels: int,
    size: int,
    d_out: int = 1,
    *,
    width: int = 192,
    depth: int = 4,
    heads: int = 3,
    patch: int = 4,
    parameterization: str = "ntk",
    bias: Bias = None,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """A vision transformer with ReLU, learned places and the mean over tokens, (n, channels, size, size) -> (n, d_out).

    Args:
        channels, size: of the inputs.
        width: of the tokens, a multiple of ``heads``.
        depth: blocks; 4 in the thesis.
        heads, patch: attention heads; side of a patch, which divides ``size``.
        d_out, parameterization, bias, generator: as for `mlp`.

    Raises:
        ValueError: sizes that do not divide.

    Source: thesis Section 4.3 names ViT-4 (Dosovitskiy et al. 2021) without its sizes; those here are ViT-Tiny's.

    >>> vit(3, 8, width=12)(torch.zeros(2, 3, 8, 8)).shape
    torch.Size([2, 1])
    """
    if size % patch or width % heads:
        raise ValueError(f"patch {patch} must divide size {size}, and heads {heads} width {width}")
    make = Layers(parameterization, bias, generator)
    return _VisionTransformer(make, channels, size, patch, width, depth, heads, d_out)


@torch.no_grad()
def scale_weights_(model: nn.Module, sigma: float) -> nn.Module:
    """Scale all parameters in place; N(0, 1) weights become N(0, sigma^2), the near zero initialisation at 0.1.

    Raises:
        ValueError: sigma is not a positive finite number.

    Source: thesis Appendix C.4, Figure C.14.

    >>> model = scale_weights_(ntk_mlp(3, 500, 2), 0.1)
    >>> 0.08 < model[0].weight.std().item() < 0.12
    True
    """
    if not (0 < sigma < math.inf):
        raise ValueError(f"sigma must be a positive finite number, got {sigma!r}")
    for p in model.parameters():
        p.mul_(sigma)
    return model


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
    sizes = (
        [whole_size("d_in", d_in)]
        + [whole_size("width", width)] * (whole_size("depth", depth) - 1)
        + [whole_size("d_out", d_out)]
    )
    if not callable(activation) or isinstance(activation, nn.Module):
        raise TypeError(f"activation must make a module (nn.ReLU, not nn.ReLU()), got {activation!r}")
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [NTKLinear(fan_in, fan_out, bias, generator=generator), activation()]
    return nn.Sequential(*layers[:-1])
