"""Promise: without a model, ``CatapultSGD`` is ``torch.optim.SGD`` to the bit. Oracle: torch.optim.SGD itself.

Every comparison is of bytes, so that -0.0 is not 0.0 and NaN is NaN: the parameters after each of some steps, and all
of the state dict.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from catapult_opt import CatapultSGD

STEPS = 6
SHAPES = [(3, 4), (4,), (), (0,), (2, 3, 2)]

OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3},
    {"momentum": 0.5, "dampening": -0.5},
    {"momentum": 0.9, "nesterov": True},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "momentum": 0.9, "dampening": 0.9},
    {"weight_decay": 0.01, "momentum": 0.8, "nesterov": True, "maximize": True},
    {"maximize": True},
]
IMPLEMENTATIONS: list[dict[str, Any]] = [{"foreach": None}, {"foreach": True}, {"foreach": False}, {"fused": False}]


def label(value: Any) -> str:
    return "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) and value else "defaults"


def bits(value: Any) -> Any:
    if isinstance(value, Tensor):
        raw = value.detach().contiguous().flatten().view(torch.uint8) if value.numel() else value.detach()
        return str(value.dtype), tuple(value.shape), value.stride(), bytes(raw.tolist())
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits(item) for item in value]
    return value


def parameters(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in SHAPES]


def train(
    make: Callable[[list[Tensor]], Optimizer],
    dtype: torch.dtype = torch.float32,
    after_step: Callable[[Optimizer, int], None] = lambda optimizer, i: None,
    closure: bool = False,
) -> list[Any]:
    """Some steps on fixed gradients, some of them None; everything there is to see after each step."""
    params = parameters(dtype)
    optimizer = make(params)
    generator = torch.Generator().manual_seed(2)
    seen = []
    for i in range(STEPS):
        gradients = [torch.randn(s, generator=generator).to(dtype) for s in SHAPES]

        def assign(step: int = i, gradients: list[Tensor] = gradients) -> float:
            assert torch.is_grad_enabled() or not closure
            for k, p in enumerate(params):
                p.grad = None if (k + step) % 4 == 3 else gradients[k].clone()
            return 10.0 + step

        if closure:
            seen.append(optimizer.step(assign))
        else:
            assign()
            seen.append(optimizer.step())
        after_step(optimizer, i)
        seen.append(bits(params))
        seen.append(bits([p.grad for p in params]))
        seen.append(state(optimizer))
    return seen


def state(optimizer: Optimizer) -> Any:
    """The state dict without torch.optim.SGD's own flag for the fused kernel, which CatapultSGD refuses."""
    full = optimizer.state_dict()
    for group in full["param_groups"]:
        group.pop("fused", None)
    return bits(full)


def assert_identical(make: Callable[[type[Optimizer], list[Tensor]], Optimizer], **kwargs: Any) -> None:
    expected = train(lambda params: make(SGD, params), **kwargs)
    got = train(lambda params: make(CatapultSGD, params), **kwargs)
    assert got == expected


@pytest.mark.parametrize("options", OPTIONS, ids=label)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=label)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_every_option(options: dict[str, Any], implementation: dict[str, Any], dtype: torch.dtype) -> None:
    assert_identical(lambda kind, params: kind(params, lr=0.1, **options, **implementation), dtype=dtype)


@pytest.mark.parametrize("options", OPTIONS, ids=label)
@pytest.mark.parametrize("foreach", [None, True, False])
def test_tensor_lr(options: dict[str, Any], foreach: bool | None) -> None:
    assert_identical(lambda kind, params: kind(params, lr=torch.tensor(0.1), foreach=foreach, **options))


@pytest.mark.parametrize("options", OPTIONS, ids=label)
def test_several_groups_with_their_own_options(options: dict[str, Any]) -> None:
    def make(kind: type[Optimizer], params: list[Tensor]) -> Optimizer:
        groups = [{"params": params[:2], "lr": 0.3, **options}, {"params": params[2:4], "weight_decay": 0.2}]
        optimizer = kind(groups, lr=0.01, momentum=0.7)
        optimizer.add_param_group({"params": params[4:], "lr": 1.0, "momentum": 0.0})
        return optimizer

    assert_identical(make)


def test_named_parameters() -> None:
    assert_identical(lambda kind, params: kind([(f"p{i}", p) for i, p in enumerate(params)], lr=0.1, momentum=0.9))


@pytest.mark.parametrize("closure", [False, True])
def test_closure_is_run_with_gradients_and_its_value_returned(closure: bool) -> None:
    assert_identical(lambda kind, params: kind(params, lr=0.1, momentum=0.9), closure=closure)


def test_options_changed_along_the_way() -> None:
    """As schedulers and users do: momentum switched on late starts its buffer late, in both."""

    def change(optimizer: Optimizer, i: int) -> None:
        group = optimizer.param_groups[0]
        group["lr"] *= 0.5
        group["momentum"] = 0.9 if i in (1, 2, 4) else 0.0
        group["weight_decay"] = 0.1 * (i % 2)
        group["maximize"] = i == 3

    assert_identical(lambda kind, params: kind(params, lr=0.1), after_step=change)


def test_non_contiguous_parameters_and_gradients() -> None:
    def run(kind: type[Optimizer]) -> Any:
        p = torch.arange(12.0).reshape(3, 4).t().requires_grad_()
        optimizer = kind([p], lr=0.1, momentum=0.9, weight_decay=0.1)
        for i in range(3):
            p.grad = torch.full((8, 3), float(i + 1))[::2]
            optimizer.step()
        return bits(p), state(optimizer)

    assert run(CatapultSGD) == run(SGD)


def test_complex_parameters() -> None:
    def run(kind: type[Optimizer]) -> Any:
        p = torch.complex(torch.arange(3.0), torch.ones(3)).requires_grad_()
        optimizer = kind([p], lr=0.1, momentum=0.9)
        for _ in range(3):
            p.grad = p.detach() * 1j
            optimizer.step()
        return bits(torch.view_as_real(p)), bits(torch.view_as_real(optimizer.state[p]["momentum_buffer"]))

    assert run(CatapultSGD) == run(SGD)


@pytest.mark.parametrize("options", [o for o in OPTIONS if o], ids=label)
def test_differentiable_steps_have_the_same_derivatives(options: dict[str, Any]) -> None:
    """The derivative of the trained parameter with respect to the initial one, through the steps."""

    def run(kind: type[Optimizer]) -> Any:
        start = torch.linspace(-1, 1, 5).requires_grad_()
        p = start.clone()
        optimizer = kind([p], lr=0.1, differentiable=True, foreach=False, **options)
        for _ in range(3):
            p.grad = 3 * p
            optimizer.step()
        (p**2).sum().backward()
        return bits(p), bits(start.grad)

    assert run(CatapultSGD) == run(SGD)


def test_differentiable_lr_has_the_same_derivative() -> None:
    def run(kind: type[Optimizer]) -> Any:
        lr = torch.tensor(0.1, requires_grad=True)
        p = torch.linspace(-1, 1, 5).requires_grad_().clone()
        optimizer = kind([p], lr=lr, differentiable=True, foreach=False)
        p.grad = 3 * p
        optimizer.step()
        (p**2).sum().backward()
        return bits(p), bits(lr.grad)

    assert run(CatapultSGD) == run(SGD)


@pytest.mark.parametrize("direction", ["from torch", "to torch"])
def test_state_dicts_are_exchangeable(direction: str) -> None:
    """Three steps with one, the state dict into the other, three more: as six steps of torch.optim.SGD."""
    first, second = (SGD, CatapultSGD) if direction == "from torch" else (CatapultSGD, SGD)
    settings = {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.01}

    def run(kinds: list[type[Optimizer]]) -> Any:
        p = torch.linspace(-1, 1, 5).requires_grad_()
        saved = None
        for kind in kinds:
            optimizer = kind([p], **settings)
            if saved is not None:
                optimizer.load_state_dict(saved)
            for _ in range(3):
                p.grad = 4 * p.detach() ** 3
                optimizer.step()
            saved = optimizer.state_dict()
        return bits(p), state(optimizer)

    assert run([first, second]) == run([SGD, SGD])


def test_a_module_with_a_controller_elsewhere_is_not_touched() -> None:
    """model=None registers nothing anywhere: no hook, no extra key in groups or state."""
    model = torch.nn.Linear(2, 2)
    before = (len(model._forward_hooks), len(model._forward_pre_hooks))
    optimizer = CatapultSGD(model.parameters(), lr=0.1)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert (len(model._forward_hooks), len(model._forward_pre_hooks)) == before
    assert not any(optimizer.state.values())
    reference = set(SGD(model.parameters(), lr=0.1).param_groups[0]) - {"fused"}
    assert set(optimizer.param_groups[0]) == reference
    assert (optimizer.last, optimizer.phase, optimizer.criterion) == (None, None, None)
    assert (optimizer.catapults, optimizer.super_critical_steps) == (0, 0)
    optimizer.log_metrics(val_loss=1.0)
