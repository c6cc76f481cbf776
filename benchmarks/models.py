"""The five model families of the benchmarks, at sizes where a training step takes tens of milliseconds on one CPU core.

Data is synthetic with the structure of the real thing, so that losses fall and curvatures are those of a training that
learns: images are noisy, shifted copies of one smooth prototype per class, a tenth of the labels wrong; text is a
Markov chain over a Zipf-distributed vocabulary. No dropout: most of the compared packages cannot repeat a mask.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
_CLASSES = 10


@dataclass(frozen=True)
class Family:
    """A model, its criterion and an endless supply of mini-batches."""

    name: str
    build: Callable[[], nn.Module]  # default initialisation, from the global random state
    criterion: Callable[[], nn.Module]  # torch's own loss class: some of the compared packages accept no other
    batches: Callable[[int], Iterator[Batch]]  # seed -> (inputs, targets), endless
    lr: float  # a sane constant rate, for the plain SGD side


class WideBlock(nn.Module):
    """Pre-activation residual block with BatchNorm (Zagoruyko & Komodakis 2016)."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(inside), nn.BatchNorm2d(outside)
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        same = inside == outside and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(x))
        return self.conv2(F.relu(self.bn2(self.conv1(h)))) + self.shortcut(h)


class Attention(nn.Module):
    """Multi-head self-attention through `scaled_dot_product_attention`."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(b, t, c))


class TransformerBlock(nn.Module):
    """Pre-norm block: attention and a GELU MLP of four times the width."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Vision transformer on 3 x 32 x 32 images, mean-pooled."""

    def __init__(self, width: int = 64, depth: int = 3, heads: int = 4, patch: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (32 // patch) ** 2, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, causal=False) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(tokens)).mean(1))


class GPT(nn.Module):
    """Causal language model with GPT-2's initialisation; dimension 1 of the logits is the vocabulary."""

    def __init__(
        self, vocabulary: int = 128, context: int = 64, width: int = 96, depth: int = 3, heads: int = 4
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, causal=True) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        return self.head(self.norm(self.blocks(self.tokens(x) + self.positions(places)))).transpose(1, 2)


def mlp() -> nn.Module:
    sizes = (784, 512, 512)
    layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(sizes[-1], _CLASSES))


def cnn() -> nn.Module:
    channels = (3, 16, 32, 64)
    pairs = itertools.pairwise(channels)
    layers = [m for a, b in pairs for m in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, _CLASSES))


def wide_resnet(widen: int = 2) -> nn.Module:
    """WideResNet-10 with one block per stage."""
    widths = (16, 16 * widen, 32 * widen, 64 * widen)
    blocks = [WideBlock(a, b, s) for a, b, s in zip(widths, widths[1:], (1, 2, 2), strict=False)]
    head = [
        nn.BatchNorm2d(widths[-1]),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(widths[-1], _CLASSES),
    ]
    return nn.Sequential(nn.Conv2d(3, widths[0], 3, padding=1, bias=False), *blocks, *head)


def images(batch: int, channels: int, size: int, seed: int, *, one_hot: bool = False) -> Iterator[Batch]:
    """Noisy shifted class prototypes; targets are class numbers, or one-hot vectors for a squared error."""
    fixed = torch.Generator().manual_seed(0)  # the task; `seed` draws its samples
    coarse = torch.randn(_CLASSES, channels, 4, 4, generator=fixed)
    prototypes = F.interpolate(coarse, size=size, mode="bicubic")
    generator = torch.Generator().manual_seed(seed + 1)
    while True:
        y = torch.randint(_CLASSES, (batch,), generator=generator)
        shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
        x = prototypes[y].roll(shift, (2, 3)) + torch.randn(batch, channels, size, size, generator=generator)
        wrong = torch.rand(batch, generator=generator) < 0.1
        y = torch.where(wrong, torch.randint(_CLASSES, (batch,), generator=generator), y)
        yield x, F.one_hot(y, _CLASSES).float() if one_hot else y


def text(batch: int, context: int, vocabulary: int, seed: int) -> Iterator[Batch]:
    """Tokens that either follow from the last one or are drawn from Zipf's law; targets are the next tokens."""
    zipf = 1.0 / torch.arange(1, vocabulary + 1).float()
    generator = torch.Generator().manual_seed(seed + 1)
    while True:
        draws = torch.multinomial(zipf, batch * (context + 1), True, generator=generator).view(batch, context + 1)
        follows = torch.rand(batch, context + 1, generator=generator) < 0.7
        tokens = draws.clone()
        for t in range(1, context + 1):
            tokens[:, t] = torch.where(follows[:, t], (3 * tokens[:, t - 1] + 1) % vocabulary, draws[:, t])
        yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


FAMILIES: tuple[Family, ...] = (
    Family("MLP", mlp, nn.MSELoss, lambda seed: images(256, 1, 28, seed, one_hot=True), lr=0.1),
    Family("CNN", cnn, nn.CrossEntropyLoss, lambda seed: images(32, 3, 32, seed), lr=0.02),
    Family("WideResNet+BN", wide_resnet, nn.CrossEntropyLoss, lambda seed: images(32, 3, 16, seed), lr=0.05),
    Family("ViT", ViT, nn.CrossEntropyLoss, lambda seed: images(16, 3, 32, seed), lr=0.05),
    Family("GPT", GPT, nn.CrossEntropyLoss, lambda seed: text(8, 64, 128, seed), lr=0.5),
)
