"""How close to linear in its weights a network is: tangent kernel, Hessian norm, deviation (thesis chapter 2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor
from torch.func import functional_call, jvp

from catapult_opt.checks import check_whole_number
from catapult_opt.curvature.eigensolver import top_eigenvalue
from catapult_opt.replay import preserved
from catapult_opt.vectors import Vector, norm, random_unit, scaled

from .network import DAGNetwork

__all__ = [
    "HessianNorm",
    "KernelChange",
    "Linearization",
    "PLStar",
    "gradient_norm",
    "gradient_norm_bound",
    "hessian_norm",
    "hessian_norm_in_ball",
    "pl_star",
    "points_in_ball",
    "tangent_kernel",
]


def tangent_kernel(network: DAGNetwork, inputs: Tensor) -> Tensor:
    """The neural tangent kernel ``K_ij = grad f(x_i) . grad f(x_j)``, summed over all weights, a (c n, c n) matrix.

    Rows are ordered by output, then sample: for one output it is the thesis' (n, n) matrix. It is put together from the
    neurons' values and derivatives, layer by layer; gradients with respect to single weights are formed only where
    weights are shared or the layer is sparse. Weights and gradients are left alone.

    Source: thesis Eq. 2.17.

    >>> from catapult_opt.analysis.dag import fcn
    >>> tangent_kernel(DAGNetwork(fcn([4, 1])), 2 * torch.eye(4)[:2])  # f = w.x / 2
    tensor([[1., 0.],
            [0., 1.]])
    """
    with torch.inference_mode(False), torch.enable_grad():
        trace = network.trace(inputs.detach().clone())
        sums = trace.outputs.sum(dim=0)  # samples do not mix: the derivative of the sum is each sample's own
        derivatives = [_gradients(total, trace.pre) for total in sums]
    n, c = len(inputs), len(sums)
    kernel = torch.zeros(c * n, c * n, dtype=trace.outputs.dtype, device=inputs.device)
    values = [value.detach() for value in trace.values]
    for i, layer in enumerate(network.weight_layers):
        kernel += layer.gram(layer.gather(values), torch.stack([d[i] for d in derivatives]))
    return kernel


class KernelChange:
    """Follows the relative change ``|K_t - K_0| / |K_0|`` of the tangent kernel, in spectral norms, during training.

    Args:
        network, inputs: K_0 is taken when this is made.

    Source: thesis Figure 2.2 and Eq. 2.17.

    >>> from catapult_opt.analysis.dag import fcn
    >>> net = DAGNetwork(fcn([4, 64, 1]))
    >>> change = KernelChange(net, torch.randn(5, 4))
    >>> change.update(), change.maximum  # call update() after as many steps as are to be looked at
    (0.0, 0.0)
    """

    def __init__(self, network: DAGNetwork, inputs: Tensor) -> None:
        self._network, self._inputs = network, inputs
        self.initial = tangent_kernel(network, inputs)
        self.maximum = 0.0

    def update(self) -> float:
        """The change at the present weights; nan where the kernel is not finite."""
        difference = tangent_kernel(self._network, self._inputs) - self.initial
        if not difference.isfinite().all():
            self.maximum = math.nan
            return math.nan
        change = float(torch.linalg.matrix_norm(difference, 2) / torch.linalg.matrix_norm(self.initial, 2))
        self.maximum = max(change, self.maximum)  # a nan stays
        return change


@dataclass(frozen=True)
class HessianNorm:
    """A spectral norm of second derivatives, found by the eigen-solver."""

    value: float  # lower bound that the solver converges to
    matvecs: int  # Hessian-vector products
    converged: bool


def hessian_norm(
    network: DAGNetwork,
    sample: Tensor,
    *,
    vertex: int | None = None,
    tol: float = 1e-3,
    max_matvecs: int = 200,
    seed: int = 0,
) -> HessianNorm:
    """The spectral norm of the Hessian with respect to the weights, of the outputs or of one pre-activation.

    For one output or pre-activation, the largest absolute eigenvalue: the larger of the top eigenvalues of H and of -H.
    For several outputs the norm of the third-order tensor, ``sup u^T (sum_k s_k H_k) v`` over unit s, u, v; it is found
    by going up in s and v in turn from the output with the largest norm, so it lies between that largest norm and the
    supremum.

    Args:
        sample: one input (d,), or a batch of one.
        vertex: a neuron, for its pre-activation; all outputs without one.
        tol: of the eigen-solver, see `top_eigenvalue`: a few times this is the accuracy to expect.
        max_matvecs: cap on the products of one eigenvalue.
        seed: of the start vector, which has a generator of its own.

    Raises:
        ValueError: more than one sample, or the vertex is not a neuron.

    Source: thesis Theorems 2.3.6 and 2.3.8, Appendix A.3.

    >>> from catapult_opt.analysis.dag import fcn
    >>> net = DAGNetwork(fcn([1, 1, 1]), lambda z: z)  # f = w1 w2 x: the Hessian is [[0, x], [x, 0]]
    >>> round(hessian_norm(net, torch.tensor([3.0])).value, 4)
    3.0
    """
    x = sample.detach().reshape(1, -1) if sample.ndim == 1 else sample.detach()
    if len(x) != 1:
        raise ValueError(f"sample must be one input (d,), got shape {tuple(sample.shape)}")
    _at_least("tol", tol, 0)
    check_whole_number("max_matvecs", max_matvecs)
    with torch.inference_mode(False), torch.enable_grad():
        outputs = network(x)[0] if vertex is None else network.pre_activation(x, vertex)
        hessians = [_Hessian(output, list(network.parameters())) for output in outputs]
        start = random_unit(list(network.parameters()), seed)

        def solve(s: Tensor) -> _Extreme:
            return _largest(_Combined(hessians, s), start, tol, max_matvecs)

        return _supremum(hessians, solve, tol)


def hessian_norm_in_ball(
    network: DAGNetwork, sample: Tensor, radius: float, *, samples: int = 8, seed: int = 0, **solver: float | int | None
) -> HessianNorm:
    """The largest `hessian_norm` at the weights w, at w +- R g and w +- R/2 g, and at random points of the sphere.

    g is the unit gradient of the summed outputs, along which they change most. A lower estimate of the supremum over
    the ball: random directions, uniform in the space of the weights that exist, are nearly orthogonal to the few that
    change the Hessian most. The weights are put back bit for bit.

    Args:
        radius: R, Euclidean, at least 0.
        samples: random points, 0 or more.
        solver: `vertex`, `tol`, `max_matvecs` of `hessian_norm`.

    Source: thesis Theorem 2.3.6.
    """
    _at_least("radius", radius, 0.0)
    found = [hessian_norm(network, sample, **solver)]  # type: ignore[arg-type]
    for _ in chain(_along_gradient(network, sample, radius), points_in_ball(network, radius, samples, seed)):
        found.append(hessian_norm(network, sample, **solver))  # type: ignore[arg-type]
    converged = all(f.converged for f in found)
    return HessianNorm(max(f.value for f in found), sum(f.matvecs for f in found), converged)


def points_in_ball(network: DAGNetwork, radius: float, samples: int, seed: int = 0) -> Iterator[None]:
    """Puts the weights at random points of the sphere of `radius` about them, one after the other, and then back.

    >>> from catapult_opt.analysis.dag import fcn
    >>> net = DAGNetwork(fcn([4, 64, 1]))
    >>> linear = Linearization(net, torch.randn(5, 4))
    >>> deviations = [float(linear.deviation().max()) for _ in points_in_ball(net, 1.0, samples=3)]
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(samples):
        direction = [layer.direction(generator) for layer in network.weight_layers]
        with _moved(network, scaled(direction, radius / float(norm(direction)))):
            yield


def _along_gradient(network: DAGNetwork, sample: Tensor, radius: float) -> Iterator[None]:
    """Puts the weights at w + t g for t of R, R/2, -R/2, -R, and back; nowhere if g is zero."""
    with torch.inference_mode(False), torch.enable_grad():
        gradient = _gradients(network(sample.detach().reshape(1, -1)).sum(), list(network.parameters()))
    length = float(norm(gradient))
    for part in (1.0, 0.5, -0.5, -1.0) if length > 0 else ():
        with _moved(network, scaled(gradient, part * radius / length)):
            yield


class Linearization:
    """The first-order Taylor expansion f_lin of a network about the weights it has now (Eq. 2.9).

    Args:
        network, inputs: (n, d). The weights are copied.

    Source: thesis Eq. 2.9 and Corollary 2.3.7.

    >>> from catapult_opt.analysis.dag import fcn
    >>> net = DAGNetwork(fcn([4, 1]))  # linear in its weights
    >>> linear = Linearization(net, torch.ones(2, 4))
    >>> _ = net.layers[0].weight.data.add_(1.0)
    >>> torch.allclose(linear(), net(torch.ones(2, 4)))
    True
    """

    def __init__(self, network: DAGNetwork, inputs: Tensor) -> None:
        self._network, self._inputs = network, inputs
        self._origin = {name: p.detach().clone() for name, p in network.named_parameters()}

    def __call__(self) -> Tensor:
        """f_lin (n, c) at the network's present weights."""
        step = {name: p.detach() - self._origin[name] for name, p in self._network.named_parameters()}
        found = jvp(lambda w: functional_call(self._network, w, self._inputs), (self._origin,), (step,))
        line: Tensor = (found[0] + found[1]).detach()
        return line

    def deviation(self) -> Tensor:
        """|f - f_lin| (n, c) at the network's present weights."""
        with torch.no_grad():
            outputs: Tensor = self._network(self._inputs)
        return (outputs - self()).abs()

    def distance(self) -> float:
        """|w - w_0|: the radius of the ball that the present weights lie on."""
        return float(norm([p.detach() - self._origin[name] for name, p in self._network.named_parameters()]))


@dataclass(frozen=True)
class PLStar:
    """The PL* condition |grad L|^2 >= 2 mu L for L = (1/2) sum (f - y)^2, at one point."""

    mu: float  # lambda_min(K): the constant that Eq. 2.16 promises
    loss: float  # L
    gradient_norm: float  # |grad L|
    ratio: float  # |grad L|^2 / (2 L), the largest mu for which the condition holds here; inf where L = 0


def pl_star(network: DAGNetwork, inputs: Tensor, targets: Tensor) -> PLStar:
    """The smallest eigenvalue of the tangent kernel and the PL* condition at the present weights, in float64.

    Where there are more outputs than weights, the eigenvalue is 0 up to rounding, of either sign.

    Args:
        targets: (n, c), for the loss (1/2) sum (f - y)^2 (Eq. 2.15).

    Raises:
        ValueError: targets are not shaped like the outputs.

    Source: thesis Eq. 2.16.

    >>> from catapult_opt.analysis.dag import fcn
    >>> at = pl_star(DAGNetwork(fcn([4, 64, 1])), torch.randn(5, 4), torch.ones(5, 1))
    >>> at.ratio >= at.mu
    True
    """
    with torch.no_grad():
        outputs = network(inputs)
    if targets.shape != outputs.shape:
        raise ValueError(f"targets must have shape {tuple(outputs.shape)}, got {tuple(targets.shape)}")
    kernel = tangent_kernel(network, inputs).double()
    r = (outputs - targets).double().T.reshape(-1)  # by output, then sample, as the kernel
    loss, squared = float(r @ r) / 2, float(r @ kernel @ r)
    mu = float(torch.linalg.eigvalsh(kernel)[0])
    return PLStar(mu, loss, math.sqrt(max(squared, 0.0)), squared / (2 * loss) if loss else math.inf)


def gradient_norm(network: DAGNetwork, sample: Tensor) -> Tensor:
    """|grad_w f_k| (c,) for one input (d,): the square root of the tangent kernel's diagonal.

    Source: thesis Proposition 2.4.4, which bounds its mean over x ~ N(0, I) and the first weights from below.
    """
    return tangent_kernel(network, sample.reshape(1, -1)).diagonal().sqrt()


def gradient_norm_bound(second_moment: float, degree: float, depth: int) -> float:
    """The lower bound ``sqrt(min(1, min_j C^(1 + r + ... + r^(j-1))))``, j = 1..L, of Eq. 2.18 on E|grad f_k|.

    Args:
        second_moment: C, the least E sigma(z)^2 over the activations, z ~ N(0, 1); 1/2 for ReLU.
        degree: r, of the homogeneous activations; 1 for ReLU.
        depth: L.

    The proof bounds the root of the mean *square*. By Jensen's inequality, E|grad f| is not above that root, and for
    L = 1, d = 1 the inequality as printed fails: E|x| = sqrt(2/pi) < 1.

    >>> gradient_norm_bound(0.5, 1.0, 4)
    0.25
    """
    exponents = [sum(degree**i for i in range(j)) for j in range(1, depth + 1)]
    return math.sqrt(min(1.0, *(second_moment**e for e in exponents)))


class _Hessian:
    """Hessian of one number with respect to the weights, through a second backward pass."""

    def __init__(self, value: Tensor, params: list[Tensor]) -> None:
        self._params = params
        self._gradient = _gradients(value, params, create_graph=True)

    def matvec(self, v: Vector) -> Vector:
        """H v."""
        used = [(g, x) for g, x in zip(self._gradient, v, strict=True) if g.requires_grad]
        if not used:  # linear in the weights
            return [torch.zeros_like(p) for p in self._params]
        inner = sum((g * x).sum() for g, x in used)
        assert isinstance(inner, Tensor)
        return _gradients(inner, self._params)


class _Combined:
    """sum_k s_k H_k."""

    def __init__(self, hessians: Sequence[_Hessian], s: Tensor) -> None:
        self._terms = [(hessian, float(factor)) for hessian, factor in zip(hessians, s, strict=True) if factor != 0]

    def matvec(self, v: Vector) -> Vector:
        products = [scaled(hessian.matvec(v), factor) for hessian, factor in self._terms]
        return [sum(parts[1:], parts[0]) for parts in zip(*products, strict=True)]


@dataclass(frozen=True)
class _Extreme:
    value: float  # largest |eigenvalue|
    vector: Vector
    matvecs: int
    converged: bool


def _largest(operator: _Combined, start: Vector, tol: float, max_matvecs: int) -> _Extreme:
    """The eigenvalue of largest size, from both ends of the spectrum."""
    ends = [
        top_eigenvalue(
            lambda v, sign=sign: scaled(operator.matvec(v), sign),  # type: ignore[misc]
            start,
            tol=tol,
            max_matvecs=max_matvecs,
            semidefinite=False,
        )
        for sign in (1.0, -1.0)
    ]
    top = max(ends, key=lambda end: end.value)
    return _Extreme(max(top.value, 0.0), top.vector, sum(e.matvecs for e in ends), all(e.converged for e in ends))


def _supremum(hessians: Sequence[_Hessian], solve: Callable[[Tensor], _Extreme], tol: float) -> HessianNorm:
    """Goes up in s (a unit vector over the outputs) and v in turn, from the single output with the largest norm."""
    singles = [solve(s) for s in torch.eye(len(hessians))]
    best = max(singles, key=lambda extreme: extreme.value)
    matvecs, converged = sum(e.matvecs for e in singles), all(e.converged for e in singles)
    while len(hessians) > 1:
        along = torch.stack([_inner(best.vector, h.matvec(best.vector)) for h in hessians]).double()
        if not along.norm() > best.value * (1 + tol):
            break
        best = solve(along / along.norm())
        matvecs, converged = matvecs + best.matvecs + len(hessians), converged and best.converged
    return HessianNorm(best.value, matvecs, converged)


def _inner(a: Vector, b: Vector) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def _gradients(value: Tensor, of: Sequence[Tensor], create_graph: bool = False) -> list[Tensor]:
    """Gradients, zero where the value does not depend on a tensor."""
    if not value.requires_grad:
        return [torch.zeros_like(x) for x in of]
    got = torch.autograd.grad(value, list(of), retain_graph=True, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(got, of, strict=True)]


@contextmanager
def _moved(network: DAGNetwork, change: Vector) -> Iterator[None]:
    params = list(network.parameters())
    with preserved(network, None, params):
        for p, x in zip(params, change, strict=True):
            p.data = p.data + x
        yield


def _at_least(name: str, value: float, least: float) -> None:
    if not (math.isfinite(value) and value >= least):
        raise ValueError(f"{name} must be a finite number of at least {least:g}, got {value!r}")
