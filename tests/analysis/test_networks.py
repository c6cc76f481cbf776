"""Networks are in NTK parameterisation: N(0, 1) weights, 1/sqrt(fan_in) in the forward pass."""

import pytest
import torch
from torch import nn

from catapult_opt.analysis.networks import NTKConv2d, NTKLinear, cnn, mlp, myrtle5, ntk_mlp, vit, wide_resnet


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_analytic_forward_of_a_two_layer_net():
    model = ntk_mlp(7, 16, 2, 3, generator=seeded()).double()
    x = torch.randn(5, 7, dtype=torch.float64)
    first, second = model[0].weight, model[2].weight
    expected = torch.relu(x @ first.T / 7**0.5) @ second.T / 4
    torch.testing.assert_close(model(x), expected)


def test_bias_is_absent_by_default_and_added_unscaled_when_asked_for():
    assert {name for name, _ in ntk_mlp(3, 4, 2).named_parameters()} == {"0.weight", "2.weight"}
    layer = NTKLinear(9, 2, bias=True)
    assert torch.equal(layer.bias, torch.zeros(2))
    nn.init.constant_(layer.bias, 5.0)
    assert torch.equal(layer(torch.zeros(1, 9)), torch.full((1, 2), 5.0))


@pytest.mark.parametrize(
    "make",
    [
        lambda bias: mlp(12, 8, 3, bias=bias),
        lambda bias: cnn(3, 4, 3, 8, bias=bias),
        lambda bias: myrtle5(3, 4, bias=bias),
        lambda bias: wide_resnet(3, widen=0.25, norm=False, bias=bias),
        lambda bias: vit(3, 8, width=12, bias=bias),
    ],
    ids=["mlp", "cnn", "myrtle5", "wide_resnet", "vit"],
)
def test_hidden_biases_are_in_all_layers_but_the_last(make):
    layers = [m for m in make("hidden").modules() if isinstance(m, (NTKLinear, NTKConv2d))]
    assert [layer.bias is not None for layer in layers] == [True] * (len(layers) - 1) + [False]
    assert all(torch.equal(layer.bias, torch.zeros_like(layer.bias)) for layer in layers[:-1])
    assert all(m.bias is not None for m in make(True).modules() if isinstance(m, (NTKLinear, NTKConv2d)))
    with pytest.raises(ValueError, match="bias must be True, False, None or 'hidden', got 'first'"):
        make("first")


def test_weights_are_standard_normal():
    weight = ntk_mlp(100, 1000, 2, generator=seeded())[0].weight
    assert abs(weight.mean()) < 0.01
    assert abs(weight.std() - 1) < 0.01


@pytest.mark.parametrize("width", [256, 4096])
def test_the_critical_rate_does_not_vanish_with_the_width(width):
    model = ntk_mlp(20, width, 2, generator=seeded())
    x = torch.randn(1, 20, generator=seeded(1))
    gradients = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    ntk = sum(g.square().sum() for g in gradients)
    # E K(x, x) = |x|^2 / d: half from each layer.
    assert float(ntk / x.square().mean()) == pytest.approx(1, rel=0.2)


@pytest.mark.parametrize(
    ("depth", "widths"), [(1, [(2, 5)]), (2, [(8, 5), (2, 8)]), (4, [(8, 5), (8, 8), (8, 8), (2, 8)])]
)
def test_depth_counts_weight_layers(depth, widths):
    model = ntk_mlp(5, 8, depth, 2)
    assert [tuple(p.shape) for p in model.parameters()] == widths
    assert model(torch.zeros(3, 5)).shape == (3, 2)
    assert isinstance(model[-1], NTKLinear)


def test_activation_is_chosen():
    assert isinstance(ntk_mlp(5, 8, 2, activation=nn.Tanh)[1], nn.Tanh)


def test_own_generator_decides_and_the_global_one_is_untouched():
    before = torch.get_rng_state()
    a, b, c = (ntk_mlp(5, 8, 3, generator=seeded(s)) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a[0].weight, b[0].weight)
    assert not torch.equal(a[0].weight, c[0].weight)


@pytest.mark.parametrize("name", ["d_in", "width", "depth", "d_out"])
@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)])
def test_bad_sizes_are_named(name, value, error):
    with pytest.raises(error, match=rf"{name} must be .*{value}"):
        ntk_mlp(**({"d_in": 2, "width": 2, "depth": 2, "d_out": 1} | {name: value}))


def test_activation_has_to_be_a_factory():
    with pytest.raises(TypeError, match="activation must make a module"):
        ntk_mlp(2, 2, 2, activation=nn.ReLU())
