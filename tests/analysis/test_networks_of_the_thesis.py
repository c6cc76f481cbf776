"""CNN, Myrtle, WideResNet and ViT: forward passes in closed form, scales, widths, shapes, seeds."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from catapult_opt.analysis.networks import NTKConv2d, cnn, mlp, myrtle5, ntk_mlp, scale_weights_, vit, wide_resnet
from catapult_opt.analysis.ntk import ntk

MAKERS = {
    "mlp": lambda **options: mlp(3 * 16 * 16, 16, 3, 2, **options),
    "cnn": lambda **options: cnn(3, 4, 5, 16, 2, **options),
    "myrtle5": lambda **options: myrtle5(3, 4, 2, **options),
    "wide_resnet": lambda **options: wide_resnet(3, 2, widen=0.25, **options),
    "vit": lambda **options: vit(3, 16, 2, width=12, heads=3, **options),
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images(n=3, size=16):
    return torch.randn(n, 3, size, size, generator=seeded(9))


def test_analytic_convolution():
    layer = NTKConv2d(3, 5, generator=seeded()).double()
    x = images().double()
    expected = F.conv2d(F.pad(x, (1, 1, 1, 1)), layer.weight) / 27**0.5
    torch.testing.assert_close(layer(x), expected)
    assert layer.bias is None
    assert NTKConv2d(3, 5, bias=True).bias.abs().sum() == 0
    assert NTKConv2d(3, 5, stride=2)(images()).shape == (3, 5, 8, 8)


def test_analytic_cnn():
    model, x = cnn(3, 4, 3, 16, generator=seeded()).double(), images().double()
    first, second, last = (p for p in model.parameters())
    h = F.relu(F.conv2d(x, first, padding=1) / 27**0.5)
    h = F.relu(F.conv2d(h, second, padding=1) / 36**0.5)
    torch.testing.assert_close(model(x), h.flatten(1) @ last.T / 1024**0.5)


def test_depth_counts_weight_layers():
    assert len(list(cnn(3, 4, 5, 16).parameters())) == 5
    assert len(list(myrtle5(3, 4).parameters())) == 5
    convolutions = [m for m in wide_resnet(3, widen=0.25).modules() if isinstance(m, NTKConv2d)]
    assert len([m for m in convolutions if m.kernel_size == 3]) == 7  # 10 with the linear layer and 2 of 3 shortcuts
    assert len(convolutions) == 10


def test_wide_resnet_10_10_has_the_size_it_is_known_by():
    parameters = sum(p.numel() for p in wide_resnet(3, 10, parameterization="torch").parameters())
    # conv 432; groups 16-160, 160-320, 320-640 of two 3x3 and a 1x1 convolution and two norms; norm, linear.
    sizes = [(16, 160), (160, 320), (320, 640)]
    expected = 432 + sum(9 * a * b + 9 * b * b + a * b + 2 * a + 2 * b for a, b in sizes) + 1280 + 6400
    assert parameters == expected


@pytest.mark.parametrize("name", MAKERS)
def test_a_generator_decides_the_weights_and_the_global_one_is_untouched(name):
    for parameterization in ("ntk", "torch"):
        a, b, c = (MAKERS[name](parameterization=parameterization, generator=seeded(s)) for s in (0, 0, 1))
        x = images()
        assert torch.equal(a(x), b(x))
        assert not torch.equal(a(x), c(x))
        assert a(x).shape == (3, 2)
    with pytest.raises(ValueError, match="parameterization must be 'ntk' or 'torch', got 'mup'"):
        MAKERS[name](parameterization="mup")


def test_torch_parameterization_has_the_distribution_of_torch():
    ours = cnn(3, 64, 3, 8, parameterization="torch", generator=seeded())
    theirs = [nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3), nn.Linear(4096, 1)]
    for mine, other in zip((m for m in ours if isinstance(m, (nn.Conv2d, nn.Linear))), theirs, strict=True):
        assert mine.bias is not None
        assert float(mine.weight.std()) == pytest.approx(float(other.weight.std()), rel=0.1)
        assert float(mine.weight.abs().max()) == pytest.approx(float(other.weight.abs().max()), rel=0.02)


@pytest.mark.parametrize("widths", [(8, 64)])
def test_the_tangent_kernel_does_not_grow_with_the_width(widths):
    for make in (
        lambda w: cnn(3, w, 3, 8, generator=seeded()),
        lambda w: mlp(192, w, 3, generator=seeded()),
        lambda w: myrtle5(3, w, generator=seeded()),
    ):
        narrow, wide = (float(ntk(make(w), images(2, 8)).trace()) for w in widths)
        assert 0.3 < wide / narrow < 3


def test_mlp_is_ntk_mlp_on_flat_inputs():
    a, b = mlp(192, 8, 3, generator=seeded()), ntk_mlp(192, 8, 3, generator=seeded())
    x = images(4, 8)
    assert torch.equal(a(x), b(x.flatten(1)))


def test_vit_attends_across_patches_and_knows_places():
    model, x = vit(3, 16, width=12, generator=seeded()), images(1)
    swapped = torch.cat([x[..., 8:], x[..., :8]], -1)
    assert not torch.allclose(model(x), model(swapped), atol=1e-4)
    with torch.no_grad():
        model.places.zero_()
    torch.testing.assert_close(model(x), model(swapped))
    with pytest.raises(ValueError, match="patch 5 must divide size 16"):
        vit(3, 16, patch=5)


def test_near_zero_initialisation_scales_the_output_by_sigma_to_the_depth():
    model, x = ntk_mlp(6, 8, 3, generator=seeded()).double(), torch.randn(4, 6, dtype=torch.float64)
    before = model(x)
    torch.testing.assert_close(scale_weights_(model, 0.1)(x), before * 1e-3)
    for sigma in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="sigma must be"):
            scale_weights_(model, sigma)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cnn(3, 4, 1, 8), "depth must be at least 2, got 1"),
        (lambda: wide_resnet(3, depth=12), "depth must be 10, 16, 22"),
        (lambda: NTKConv2d(0, 4), "in_channels must be at least 1, got 0"),
        (lambda: mlp(3, 4, 0), "depth must be at least 1, got 0"),
    ],
)
def test_bad_sizes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
