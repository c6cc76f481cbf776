"""Quadratic models that can be written down: of the two-layer ReLU net (Eq. 3.10), and in general (Eq. 3.3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["GeneralQuadraticModel", "TwoLayerNQM", "TwoLayerReLU"]


class TwoLayerReLU(nn.Module):
    """``f(u, v; x) = (1/sqrt(m)) sum_i v_i ReLU(u_i^T x / sqrt(d))``, (n, d) -> (n, 1), with both layers trained.

    u_i ~ N(0, I_d) and v_i is -1 or 1 with equal chances: the thesis' initialization of chapter 3, under which the
    tangent kernel is of order 1 at any width. (Chapter 4's networks, `analysis.networks`, draw v from N(0, 1).)

    Args:
        d, m: dimension of the inputs and width, at least 1.
        generator: source of the weights; the global generator without one.

    Raises:
        ValueError: a size below 1.

    Source: thesis Eq. 3.9.

    >>> TwoLayerReLU(3, 16)(torch.ones(5, 3)).shape
    torch.Size([5, 1])
    """

    def __init__(self, d: int, m: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if d < 1 or m < 1:
            raise ValueError(f"d and m must be at least 1, got d = {d}, m = {m}")
        self.u = nn.Parameter(torch.randn(m, d, generator=generator))
        self.v = nn.Parameter(2.0 * torch.randint(0, 2, (m,), generator=generator) - 1.0)

    def forward(self, x: Tensor) -> Tensor:
        m, d = self.u.shape
        hidden = torch.relu(x @ self.u.T / math.sqrt(d))
        return (hidden @ self.v / math.sqrt(m)).unsqueeze(1)

    def kernel(self, x: Tensor) -> Tensor:
        """The tangent kernel (n, n), from the closed form of the gradients (Appendix B.1)."""
        return _two_layer_kernel(x, x @ self.u.T > 0, self.u, self.v)


class TwoLayerNQM(nn.Module):
    """The neural quadratic model of `TwoLayerReLU` about its present weights u0, v0, in closed form.

    The four terms of Eq. 3.10 add up to ``(1/sqrt(m d)) sum_i 1_i v_i u_i^T x`` with 1_i = [u0_i^T x >= 0]: the net
    with its activation pattern at w0 held. `QuadraticModel` computes the same of any net.
    Parameters u (m, d) and v (m,) start at u0 and v0.

    Source: thesis Eq. 3.10 and B.1.

    >>> f = TwoLayerReLU(3, 16)
    >>> torch.allclose(TwoLayerNQM(f)(torch.ones(5, 3)), f(torch.ones(5, 3)))
    True
    """

    u0: Tensor

    def __init__(self, net: TwoLayerReLU) -> None:
        super().__init__()
        self.register_buffer("u0", net.u.detach().clone())
        self.u = nn.Parameter(net.u.detach().clone())
        self.v = nn.Parameter(net.v.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        active = x @ self.u0.T >= 0
        return ((active * (x @ self.u.T)) @ self.v / math.sqrt(self.u.numel())).unsqueeze(1)

    def kernel(self, x: Tensor) -> Tensor:
        """The tangent kernel (n, n), from the closed form of the gradients (Appendix B.2)."""
        return _two_layer_kernel(x, x @ self.u0.T >= 0, self.u, self.v)


@torch.no_grad()
def _two_layer_kernel(x: Tensor, active: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Rows of df/du_i are active_i v_i x / sqrt(m d), those of df/dv_i are active_i u_i^T x / sqrt(m d)."""
    outer, inner = active * v, active * (x @ u.T)
    return ((outer @ outer.T) * (x @ x.T) + inner @ inner.T) / u.numel()


class GeneralQuadraticModel(nn.Module):
    """``g(w; x) = w^T phi(x) + (gamma / 2) w^T Sigma(x) w`` for n given samples, which are numbered: () -> (n, 1).

    Args:
        phi: feature vectors (n, p).
        sigma: (n, p, p), one symmetric matrix a sample; (p, p), one for all; or (p,), the diagonal of one for all.
        gamma: how far from linear the model is.
        w: (p,), where the parameter ``w`` starts; drawn from N(0, I_p) without it, as in Appendix B.14.
        generator: source of w; the global generator without one.

    Raises:
        ValueError: shapes that do not fit, or a matrix that is not symmetric.

    Source: thesis Eq. 3.3. With phi = 0 and Sigma^2 = |x|^2 I it is Appendix B.13's, whose dynamics for y = 0 are
    `scalar_step` with c = gamma^2 |x|^2.

    >>> g = GeneralQuadraticModel(torch.eye(3)[:2], torch.ones(3), 0.1, w=torch.ones(3))
    >>> g()
    tensor([[1.1500],
            [1.1500]], grad_fn=<UnsqueezeBackward0>)
    """

    phi: Tensor
    sigma: Tensor

    def __init__(
        self,
        phi: Tensor,
        sigma: Tensor,
        gamma: float,
        w: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if phi.ndim != 2:
            raise ValueError(f"phi must have shape (n, p), got {tuple(phi.shape)}")
        n, p = phi.shape
        if sigma.shape not in {(p,), (p, p), (n, p, p)}:
            raise ValueError(f"sigma must have shape {(p,)}, {(p, p)} or {(n, p, p)}, got {tuple(sigma.shape)}")
        if sigma.ndim > 1 and not torch.equal(sigma, sigma.mT):
            raise ValueError("sigma must be symmetric: take (sigma + sigma.mT) / 2, which gives the same model")
        start = torch.randn(p, generator=generator, dtype=phi.dtype).to(phi.device) if w is None else w.detach().clone()
        if start.shape != (p,):
            raise ValueError(f"w must have shape {(p,)}, got {tuple(start.shape)}")
        self.gamma = gamma
        self.register_buffer("phi", phi.detach().clone())
        self.register_buffer("sigma", sigma.detach().clone())
        self.w = nn.Parameter(start)

    def forward(self) -> Tensor:
        w = self.w
        product = self.sigma * w if self.sigma.ndim == 1 else self.sigma @ w
        return (self.phi @ w + 0.5 * self.gamma * (product @ w)).unsqueeze(1)

    def kernel(self) -> Tensor:
        """The tangent kernel (n, n): rows of its Jacobian are phi(x_i) + gamma Sigma(x_i) w."""
        w = self.w.detach()
        product = self.sigma * w if self.sigma.ndim == 1 else self.sigma @ w
        rows = self.phi + self.gamma * product
        return rows @ rows.T
