"""Promise: Hessians of torch's criteria in closed form are those of the criterion, at two temporaries a product.

Oracle: torch.func.hessian in float64; for whatever has no closed form, the same through autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from catapult_opt import LossModule
from catapult_opt.curvature.closed_forms import Diagonal, MeanAndVariance, Softmax, closed_form
from catapult_opt.curvature.output_hessian import AutogradHessian, output_hessian
from catapult_opt.link import LossCall

F64 = torch.float64
WEIGHT = 0.7  # of the call in the step's loss


def data(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def classes(*shape: int, count: int = 4, ignored: bool = False) -> Tensor:
    y = torch.randint(count, shape, generator=torch.Generator().manual_seed(1))
    return y.masked_fill(data(*shape, seed=2) > 0.5, -100) if ignored else y


def call_of(criterion: nn.Module, inputs: list[Tensor], args: tuple[Any, ...], **kwargs: Any) -> LossCall:
    return LossCall(
        torch.zeros((), dtype=F64), torch.tensor(WEIGHT, dtype=F64), None, criterion, args, kwargs, inputs=inputs
    )


CLASS_WEIGHTS = torch.tensor([0.5, 2.0, 0.0, 1.0], dtype=F64)
Y01 = torch.tensor([0.0, 1.0, 0.3, 1.0, 0.0, 1.0], dtype=F64).reshape(3, 2)
# criterion as a module and as a function, its input, its target (and variance)
CASES: dict[str, tuple[nn.Module, Callable[..., Tensor], Tensor, tuple[Any, ...]]] = {
    "mse": (nn.MSELoss(), F.mse_loss, data(5, 3), (data(5, 3, seed=3),)),
    "ce": (nn.CrossEntropyLoss(), F.cross_entropy, data(5, 4), (classes(5),)),
    "ce one sample": (nn.CrossEntropyLoss(), F.cross_entropy, data(4), (classes(1)[0],)),
    "ce over positions": (nn.CrossEntropyLoss(), F.cross_entropy, data(3, 4, 2, 2), (classes(3, 2, 2),)),
    "ce ignored": (nn.CrossEntropyLoss(), F.cross_entropy, data(9, 4), (classes(9, ignored=True),)),
    "ce probabilities": (nn.CrossEntropyLoss(), F.cross_entropy, data(3, 4, 2), (data(3, 4, 2, seed=3).softmax(1),)),
    "nll": (nn.NLLLoss(), F.nll_loss, data(5, 4).log_softmax(1), (classes(5),)),
    "bce": (nn.BCEWithLogitsLoss(), F.binary_cross_entropy_with_logits, data(3, 2), (Y01,)),
    "huber": (nn.HuberLoss(), F.huber_loss, data(7), (2 * data(7, seed=3),)),
    "smooth l1": (nn.SmoothL1Loss(), F.smooth_l1_loss, data(7), (2 * data(7, seed=3),)),
    "poisson": (nn.PoissonNLLLoss(), F.poisson_nll_loss, data(7), (data(7, seed=3).exp(),)),
    "gaussian": (nn.GaussianNLLLoss(), F.gaussian_nll_loss, data(7), (data(7, seed=3), data(7, seed=4).exp())),
}
# settings of module and function alike
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    *[(name, {"reduction": reduction}) for name in CASES for reduction in ("mean", "sum")],
    *[
        (name, {"reduction": reduction, **more})
        for name in ("ce", "ce over positions", "ce ignored", "ce probabilities")
        for reduction in ("mean", "sum")
        for more in (
            {"weight": CLASS_WEIGHTS},
            {"label_smoothing": 0.2},
            {"weight": CLASS_WEIGHTS, "label_smoothing": 0.3},
        )
    ],
    ("ce", {"ignore_index": 2, "label_smoothing": 0.1}),
    ("bce", {"pos_weight": torch.tensor([2.0, 0.5], dtype=F64)}),
    ("bce", {"weight": torch.tensor([2.0, 0.5], dtype=F64), "reduction": "sum"}),
    ("huber", {"delta": 0.4}),
    ("smooth l1", {"beta": 0.4}),
    ("poisson", {"log_input": True, "full": True}),
    ("gaussian", {"full": True, "eps": 1.0}),
]


@pytest.mark.parametrize("as_function", [False, True], ids=["module", "function"])
@pytest.mark.parametrize(("name", "settings"), SETTINGS, ids=lambda x: x if isinstance(x, str) else "-".join(x))
def test_products_are_those_of_the_hessian(name: str, settings: dict[str, Any], as_function: bool) -> None:
    module, function, z, rest = CASES[name]
    criterion: nn.Module = LossModule(function) if as_function else type(module)(**settings)
    call = call_of(criterion, [z], (z, *rest), **(settings if as_function else {}))
    hessian = torch.func.hessian(lambda x: function(x, *rest, **settings))(z).reshape(z.numel(), z.numel())
    found = closed_form(call)
    assert found is not None
    columns = torch.stack([found([e.view_as(z)])[0].flatten() for e in torch.eye(z.numel(), dtype=F64)])
    torch.testing.assert_close(columns, WEIGHT * hessian, rtol=1e-10, atol=1e-12)
    assert found.curved() == bool(hessian.any())


def test_poisson_of_rates_by_keywords() -> None:
    z, y = data(7).exp(), data(7, seed=3).exp()
    hessian = torch.func.hessian(lambda x: F.poisson_nll_loss(x, y, log_input=False, eps=0.1))(z)
    found = closed_form(call_of(nn.PoissonNLLLoss(log_input=False, eps=0.1), [z], (), log_input=z, target=y))
    assert found is not None
    torch.testing.assert_close(found([torch.ones_like(z)])[0], WEIGHT * hessian.sum(1))


def test_gaussian_with_a_learned_variance() -> None:
    z, y, v = data(6), data(6, seed=3), data(6, seed=4).exp()
    blocks = torch.func.hessian(lambda a, b: F.gaussian_nll_loss(a, y, b), argnums=(0, 1))(z, v)
    hessian = torch.cat([torch.cat(row, 1) for row in blocks])
    found = closed_form(call_of(nn.GaussianNLLLoss(), [z, v], (z, y, v)))
    assert isinstance(found, MeanAndVariance)
    columns = [torch.cat(found([e[:6], e[6:]])) for e in torch.eye(12, dtype=F64)]
    torch.testing.assert_close(torch.stack(columns), WEIGHT * hessian)


class Halved(nn.MSELoss):
    """A subclass with a loss of its own: not torch's."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input, target) / 2


def forward_replaced() -> nn.Module:
    criterion = nn.MSELoss()
    criterion.forward = lambda a, b: (a - b).pow(4).sum()  # type: ignore[method-assign]
    return criterion


@pytest.mark.parametrize(
    ("criterion", "z", "y"),
    [
        (Halved(), data(5, 3), data(5, 3, seed=3)),
        (forward_replaced(), data(5, 3), data(5, 3, seed=3)),
        (LossModule(lambda a, b: (a - b).pow(4).mean()), data(5, 3), data(5, 3, seed=3)),
        (nn.MSELoss(), data(5, 1), data(5, seed=3)),  # broadcast
        (nn.BCELoss(), data(3, 2).sigmoid(), Y01),
    ],
    ids=["subclass", "forward replaced", "own function", "broadcast", "other criterion"],
)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_any_other_criterion_is_right_too(criterion: nn.Module, z: Tensor, y: Tensor) -> None:
    found = output_hessian(call_of(criterion, [z], (z, y)))
    hessian = torch.func.hessian(lambda x: criterion.forward(x, y))(z).reshape(z.numel(), z.numel())
    t = data(*z.shape, seed=9)
    torch.testing.assert_close(found([t])[0].flatten(), WEIGHT * hessian @ t.flatten())


def test_targets_that_depend_on_the_model_go_through_autograd() -> None:
    z, y = data(5, 3), data(5, 3, seed=3)
    assert isinstance(output_hessian(call_of(nn.MSELoss(), [z, y], (z, y))), AutogradHessian)


@pytest.mark.parametrize(("name", "multiple"), [("mse", 2 / 15), ("ce", None), ("gaussian", None), ("nll", None)])
def test_what_is_a_multiple_of_the_identity(name: str, multiple: float | None) -> None:
    module, _, z, rest = CASES[name]
    found = output_hessian(call_of(module, [z], (z, *rest))).as_multiple_of_identity()
    assert found == (None if multiple is None else pytest.approx(WEIGHT * multiple))


class Largest(TorchDispatchMode):
    """Counts the new tensors of at least a size."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.seen = size, set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, Tensor) and t.numel() >= self.size:
                self.seen.add(t.untyped_storage().data_ptr())
        return out


@pytest.mark.parametrize("name", [name for name in CASES if name != "gaussian"])
def test_a_product_makes_one_tensor_of_the_size_of_the_input(name: str) -> None:
    """With the one that is kept, two."""
    module, _, z, rest = CASES[name]
    found = closed_form(call_of(module, [z], (z, *rest)))
    assert isinstance(found, (Diagonal, Softmax))
    kept = [x for x in vars(found).values() if isinstance(x, Tensor) and x.numel() >= z.numel()]
    t = torch.ones_like(z)
    with Largest(z.numel()) as mode:
        found([t])
    assert len(kept) <= 1
    assert len(mode.seen) == 1
