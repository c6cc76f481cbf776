"""Hessians of torch's usual criteria with respect to their inputs, in closed form.

With w the weight of the call in the step's loss and n the divisor of reduction="mean" (1 for "sum"):

* mse_loss: (2 w / n) I.
* cross_entropy: for a sample with softmax p, (w m / n) (diag(p) - p p^T), where m is the total weight of its target
  (smoothing and class weights in; 0 where the target is ignored) and n the total class weight of the targets, or the
  number of samples where targets are probabilities.
* nll_loss: 0.
* binary_cross_entropy_with_logits: diag(w weight (1 + (pos_weight - 1) y) s (1 - s) / n), s = sigmoid(z).
* huber_loss, smooth_l1_loss: w / n, or w / (n beta), where |z - y| is below delta or beta, else 0.
* poisson_nll_loss: diag(w exp(z) / n), or diag(w y / (z + eps)^2 / n) where log_input is False.
* gaussian_nll_loss, with r = z - y: (w / n) [[1 / v, -r / v^2], [-r / v^2, r^2 / v^3 - 1 / (2 v^2)]] in (z, v).

A product needs at most two tensors of the size of the criterion's input: what is kept, and the product itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..criterion import LossModule
from ..link import LossCall
from ..replay import precise

# Below this relative spread the entries of a diagonal count as equal.
_EQUAL = 1e-5


class Diagonal:
    """diag(d) on the only input; a 0-d tensor d stands for d times the identity."""

    def __init__(self, diagonal: Tensor) -> None:
        self._diagonal = diagonal

    def __call__(self, tangents: Sequence[Tensor]) -> list[Tensor]:
        """H t, one tensor per criterion input."""
        return [tangents[0].to(self._diagonal.dtype) * self._diagonal]

    def curved(self) -> bool:
        """Is there any second derivative at these inputs?"""
        return bool(self._diagonal.any())

    def as_multiple_of_identity(self) -> float | None:
        """h if H = h I with h > 0, else None."""
        lowest, highest = (float(x) for x in torch.aminmax(self._diagonal))
        return highest if highest > 0 and highest - lowest <= _EQUAL * highest else None


class Softmax:
    """diag(m) (diag(p) - p p^T) for every sample, with the classes along dimension `dim`."""

    def __init__(self, p: Tensor, mass: Tensor, dim: int) -> None:
        """`mass`: like p, with one entry along `dim`."""
        self._p, self._mass, self._dim = p, mass, dim

    def __call__(self, tangents: Sequence[Tensor]) -> list[Tensor]:
        """H t, one tensor per criterion input."""
        product = self._p * tangents[0].to(self._p.dtype)
        product.addcmul_(self._p, product.sum(self._dim, keepdim=True), value=-1)
        return [product.mul_(self._mass)]

    def curved(self) -> bool:
        """Is there any second derivative at these inputs?"""
        return bool((self._p.addcmul(self._p, self._p, value=-1) * self._mass).any())

    def as_multiple_of_identity(self) -> None:
        """None: what shifts all logits of a sample alike has no curvature."""


class MeanAndVariance:
    """Symmetric 2 x 2 blocks [[a, b], [b, c]] on the elements of two inputs of the same shape."""

    def __init__(self, a: Tensor, b: Tensor, c: Tensor) -> None:
        self._a, self._b, self._c = a, b, c

    def __call__(self, tangents: Sequence[Tensor]) -> list[Tensor]:
        """H t, one tensor per criterion input."""
        z, v = (t.to(self._a.dtype) for t in tangents)
        return [(self._a * z).addcmul_(self._b, v), (self._b * z).addcmul_(self._c, v)]

    def curved(self) -> bool:
        """Is there any second derivative at these inputs? The mean always has: 1 / v."""
        return True

    def as_multiple_of_identity(self) -> None:
        """None: the loss is no squared error where the variance is learned."""


ClosedForm = Diagonal | Softmax | MeanAndVariance


def closed_form(call: LossCall) -> ClosedForm | None:
    """The Hessian of a criterion that is known: a module of exactly torch's type, or torch's function in a LossModule.

    None for any other one, for one called in a way that is not covered (shapes that are broadcast, legacy arguments),
    and where other arguments than the input (and the variance of gaussian_nll_loss) depend on the model.
    """
    assert call.weight is not None
    function, tensors, options = _called(call)
    form = next((form for known, form in _FORMS.items() if known is function), None)
    legacy = options.get("size_average") is not None or options.get("reduce") is not None
    if form is None or legacy or options.get("reduction") not in ("mean", "sum"):
        return None
    if not all(isinstance(t, Tensor) for t in tensors):
        return None
    inputs = [id(z) for z in call.inputs]
    if inputs != [id(t) for t in tensors][:1] and (
        form is not _gaussian_nll or inputs != [id(tensors[0]), id(tensors[2])]
    ):
        return None
    with torch.no_grad():
        values = [precise(t.detach()) for t in tensors]
        return form(values, options, call.weight, len(inputs))


def _called(call: LossCall) -> tuple[Any, list[Any], dict[str, Any]]:
    """The function of torch.nn.functional that was called, its tensor arguments in order, and its settings."""
    criterion = call.criterion
    assert criterion is not None
    if type(criterion) is LossModule:
        function: Any = criterion.function
        if not any(function is known for known in _FORMS):
            return None, [], {}
        arguments = inspect.signature(function).bind(*call.args, **call.kwargs)
        arguments.apply_defaults()
        count = 3 if function is F.gaussian_nll_loss else 2
        items = list(arguments.arguments.items())
        return function, [value for _, value in items[:count]], dict(items[count:])
    if type(criterion) not in _FUNCTIONS or "forward" in vars(criterion):
        return None, [], {}
    function = _FUNCTIONS[type(criterion)]
    arguments = inspect.signature(criterion.forward).bind(*call.args, **call.kwargs)
    names = [name for name in inspect.signature(function).parameters if hasattr(criterion, name)]
    return function, list(arguments.arguments.values()), {name: getattr(criterion, name) for name in names}


# (tensor arguments, settings, d(step's loss) / d(value), how many of the arguments depend on the model) -> Hessian.
_Form = Callable[[list[Tensor], dict[str, Any], Tensor, int], ClosedForm | None]


def _per_element(diagonal: Tensor, options: dict[str, Any], weight: Tensor) -> Diagonal:
    """Of a loss that is a sum or a mean over the elements; in the memory of `diagonal`."""
    return Diagonal(diagonal.mul_(weight / (diagonal.numel() if options["reduction"] == "mean" else 1)))


def _mse(tensors: list[Tensor], options: dict[str, Any], weight: Tensor, inputs: int) -> ClosedForm | None:
    z, y = tensors
    if z.shape != y.shape or options.get("weight") is not None:
        return None
    return Diagonal((2.0 * weight / (z.numel() if options["reduction"] == "mean" else 1)).to(z.dtype))


def _cross_entropy(tensors: list[Tensor], options: dict[str, Any], weight: Tensor, inputs: int) -> ClosedForm | None:
    z, y = tensors
    dim = 0 if z.dim() == 1 else 1
    classes, smoothing = z.shape[dim], options["label_smoothing"]
    of_class = torch.ones(classes, dtype=z.dtype, device=z.device)
    if options["weight"] is not None:
        of_class = options["weight"].to(z.dtype)
    if y.is_floating_point():
        if y.shape != z.shape:
            return None
        mass = torch.tensordot(y.to(z.dtype), of_class, dims=([dim], [0])).unsqueeze(dim)
        total: Tensor | int = z.numel() // classes
    else:
        counted = y != options["ignore_index"]
        mass = (of_class[torch.where(counted, y, 0)] * counted).unsqueeze(dim)
        total = mass.sum()
    spread = of_class.sum() if y.is_floating_point() else of_class.sum() * counted.unsqueeze(dim)
    mass = (1 - smoothing) * mass + smoothing / classes * spread
    return Softmax(z.softmax(dim), mass * (weight / (total if options["reduction"] == "mean" else 1)), dim)


def _nll(tensors: list[Tensor], options: dict[str, Any], weight: Tensor, inputs: int) -> ClosedForm | None:
    return Diagonal(torch.zeros((), dtype=tensors[0].dtype, device=tensors[0].device))


def _bce_with_logits(tensors: list[Tensor], options: dict[str, Any], weight: Tensor, inputs: int) -> ClosedForm | None:
    z, y = tensors
    if z.shape != y.shape:
        return None
    diagonal = z.sigmoid()
    diagonal.addcmul_(diagonal, diagonal, value=-1)
    if options["pos_weight"] is not None:
        diagonal = diagonal * ((options["pos_weight"] - 1) * y + 1)
    if options["weight"] is not None:
        diagonal = diagonal * options["weight"]
    return _per_element(diagonal, options, weight) if diagonal.shape == z.shape else None


def _within(tensors: list[Tensor], threshold: float) -> Tensor | None:
    """1 where the residual is below the threshold, else 0."""
    z, y = tensors
    return ((z - y).abs_() < threshold).to(z.dtype) if z.shape == y.shape else None


def _huber(tensors: list[Tensor], options: dict[str, Any], weight: Tensor, inputs: int) -> ClosedForm | None:
    within = None if options.get("weight") is not None else _within(tensors, options["delta"])
    return None if within is None else _per_element(within, options, weight)


def _smooth_l1(tensors: list[Tensor], options: dict[str, Any], weight: Tensor, inputs: int) -> ClosedForm | None:
    within, beta = _within(tensors, options["beta"]), options["beta"]
    return None if within is None else _per_element(within.div_(beta) if beta > 0 else within, options, weight)


def _poisson_nll(tensors: list[Tensor], options: dict[str, Any], weight: Tensor, inputs: int) -> ClosedForm | None:
    z, y = tensors
    if z.shape != y.shape:
        return None
    return _per_element(z.exp() if options["log_input"] else y / (z + options["eps"]).square_(), options, weight)


def _gaussian_nll(tensors: list[Tensor], options: dict[str, Any], weight: Tensor, inputs: int) -> ClosedForm | None:
    z, y, v = tensors
    if not z.shape == y.shape == v.shape:
        return None
    v = v.clamp_min(options["eps"])
    factor = weight / (z.numel() if options["reduction"] == "mean" else 1)
    if inputs == 1:
        return Diagonal(factor / v)
    b = (y - z) / v**2 * factor
    return MeanAndVariance(factor / v, b, (b * (y - z) / v).sub_(factor / (2 * v**2)))


_FORMS: dict[Callable[..., Tensor], _Form] = {
    F.mse_loss: _mse,
    F.cross_entropy: _cross_entropy,
    F.nll_loss: _nll,
    F.binary_cross_entropy_with_logits: _bce_with_logits,
    F.huber_loss: _huber,
    F.smooth_l1_loss: _smooth_l1,
    F.poisson_nll_loss: _poisson_nll,
    F.gaussian_nll_loss: _gaussian_nll,
}
_FUNCTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.MSELoss: F.mse_loss,
    nn.CrossEntropyLoss: F.cross_entropy,
    nn.NLLLoss: F.nll_loss,
    nn.BCEWithLogitsLoss: F.binary_cross_entropy_with_logits,
    nn.HuberLoss: F.huber_loss,
    nn.SmoothL1Loss: F.smooth_l1_loss,
    nn.PoissonNLLLoss: F.poisson_nll_loss,
    nn.GaussianNLLLoss: F.gaussian_nll_loss,
}
