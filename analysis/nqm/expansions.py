"""Taylor expansions of any module in its weights, as modules that train like it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from catapult_opt.trees import map_tensors

from .written_out import twice_differentiable

__all__ = ["LinearModel", "QuadraticModel"]

Weights = dict[str, Tensor]


class _Expansion(nn.Module):
    """What both expansions share: a copy of the module, whose parameters train, and the weights w0 as buffers."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
        if not any(True for _ in module.parameters()):
            raise ValueError(f"module has no parameters to expand in: {type(module).__name__}")
        self.module = copy.deepcopy(module)
        self._origins = {name: "origin_" + name.replace(".", "__") for name, _ in module.named_parameters()}
        if len(set(self._origins.values())) < len(self._origins):
            raise ValueError(f"module's parameter names clash once '.' is '__': rename one of {list(self._origins)}")
        for name, parameter in module.named_parameters():
            self.register_buffer(self._origins[name], parameter.detach().clone())

    def origin(self) -> Weights:
        """w0, by the module's names of its parameters."""
        return {name: self.get_buffer(buffer) for name, buffer in self._origins.items()}

    def displacement(self) -> Weights:
        """w - w0, by the module's names of its parameters; gradients flow to w."""
        origin = self.origin()
        return {name: parameter - origin[name] for name, parameter in self.module.named_parameters()}

    def distance(self) -> float:
        """|w - w0|, Euclidean over all weights."""
        return float(torch.stack([step.detach().norm() for step in self.displacement().values()]).norm())

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        with twice_differentiable():
            if torch.is_grad_enabled():
                return self._expand(args, kwargs)
            # Forward mode needs operations that only gradient mode has (SiLU), and no tensors of inference mode.
            with torch.inference_mode(False), torch.enable_grad():
                plain = map_tensors((args, kwargs), lambda t: t.clone() if t.is_inference() else t)
                return self._expand(*plain).detach()

    def _expand(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        raise NotImplementedError

    def _function(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[Weights], Tensor]:
        """The module's outputs as a function of its weights."""
        buffers = dict(self.module.named_buffers())

        def function(weights: Weights) -> Tensor:
            # Copies: BatchNorm in train mode writes to its buffers, and an expansion about w0 has no use for that.
            state = {**weights, **{name: buffer.clone() for name, buffer in buffers.items()}}
            outputs = functional_call(self.module, state, args, kwargs)
            if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
                kind = outputs.dtype if isinstance(outputs, Tensor) else type(outputs).__name__
                raise TypeError(f"module must return a floating-point tensor, got {kind}: wrap it in one that does")
            return outputs

        return function


class LinearModel(_Expansion):
    """f_lin, the first-order Taylor expansion of a module in its weights about the ones it has when this is made.

    ``f_lin(w; x) = f(w0; x) + (w - w0)^T grad f(w0; x)``, for every entry of the module's output. Nothing of the
    size of the weights squared or of weights times samples is formed: one forward-mode derivative an evaluation, about
    two forward passes, and a backward pass as usual.

    It is used in the place of the module: the same arguments, the same outputs, any optimizer and criterion. Its
    parameters are w itself, under the module's own names (``f_lin.module``: the module at the present w, so that
    ``f_lin.module(x)`` is f(w; x)). So weight decay, parameter groups and weights that are loaded mean what they mean
    for the module; w starts at w0. ``state_dict`` holds w and, as buffers, w0: it restores the function. The module
    that is given is copied and never changed.

    Buffers (BatchNorm's running statistics) stay as they were at w0, in train mode too. Where the module draws random
    numbers (dropout), f(w0) and its derivatives are those of one draw.

    Args:
        module: has parameters; returns one floating-point tensor; is differentiable in forward mode. On the CPU, the
            LSTM and GRU of torch are so only inside ``torch.backends.mkldnn.flags(enabled=False)``.

    Raises:
        TypeError: not a module, or (when called) its output is not a floating-point tensor.
        ValueError: no parameters, or names that clash.

    Source: thesis Eq. 3.1.

    >>> f = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    >>> f_lin = LinearModel(f)
    >>> optimizer = torch.optim.SGD(f_lin.parameters(), lr=0.1)
    >>> torch.allclose(f_lin(torch.ones(2, 3)), f(torch.ones(2, 3)))
    True
    """

    def _expand(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        found = jvp(self._function(args, kwargs), (self.origin(),), (self.displacement(),))
        outputs: Tensor = found[0] + found[1]
        return outputs


class QuadraticModel(_Expansion):
    """f_quad, the second-order Taylor expansion of a module in its weights: its neural quadratic model (NQM).

    ``f_quad(w; x) = f(w0; x) + (w - w0)^T grad f(w0; x) + (1/2) (w - w0)^T H_f(w0; x) (w - w0)``, for every entry of
    the output. In all else it is as `LinearModel` says. It is matrix-free: a forward-mode derivative of a forward-mode
    derivative along w - w0. A training step takes about 5 of the module's own where its layers are large (f_lin: 2),
    and more where they are small.

    Second derivatives are autograd's: of ReLU and other piecewise linear functions zero, also at the kink. That is the
    thesis' convention (footnote 2 and Eq. B.1), by which the quadratic term of a ReLU net has only products of weights
    from different layers.

    Args:
        module: as for `LinearModel`, differentiable twice in forward mode. Where torch lacks such a derivative, it says
            so when called (GLU, torch's weight_norm; RNNs as above). LayerNorm, BatchNorm, InstanceNorm and GroupNorm
            are computed from their formulas, as torch's second derivatives of them are wrong (2.13); those of the
            orthogonal parametrization are too, and are not replaced.

    Raises:
        TypeError, ValueError: as `LinearModel`.

    Source: thesis Eq. 3.2.

    >>> f = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> f_quad = QuadraticModel(f)
    >>> with torch.no_grad():
    ...     f_quad.module[2].weight += 1.0
    >>> torch.allclose(f_quad(torch.ones(2, 3)), f_quad.module(torch.ones(2, 3)))  # f is linear in its last layer
    True
    """

    def _expand(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        function, origin, step = self._function(args, kwargs), self.origin(), self.displacement()

        def value_and_slope(weights: Weights) -> tuple[Tensor, Tensor]:
            found = jvp(function, (weights,), (step,))
            return found[0], found[1]

        found = jvp(value_and_slope, (origin,), (step,))
        (value, first), (_, second) = found[0], found[1]
        outputs: Tensor = value + first + 0.5 * second
        return outputs
