"""Train the quadratic model f_quad of your own module, above the critical learning rate.

f_quad is the second-order Taylor expansion of a module in its weights. Like the network, and unlike its linearization
f_lin, it converges between 2/lambda and 4/lambda (lambda: the largest eigenvalue of its tangent kernel), by way of a
catapult; above 4/lambda it diverges, where the network may still converge. Takes seconds:

    python examples/quadratic_model.py
"""

from __future__ import annotations

import torch
from torch import nn

from catapult_opt import critical_lr
from catapult_opt.analysis.nqm import LinearModel, QuadraticModel


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor, lr: float, steps: int = 300) -> list[float]:
    """A training loop as any other: the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(30, 10)
    y = torch.sin(x[:, :1])

    # The ten lines: your module, its f_quad, any optimizer, your loop.
    module = nn.Sequential(nn.Linear(10, 1000), nn.ReLU(), nn.Linear(1000, 1))
    f_quad = QuadraticModel(module)
    optimizer = torch.optim.Adam(f_quad.parameters(), lr=1e-3)
    for _ in range(100):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(f_quad(x), y)
        loss.backward()
        optimizer.step()
    print(f"f_quad under Adam: loss {loss.item():.1e}, {f_quad.distance():.2f} away from w0")

    # The three models below and above the critical rate. Each is built from the same w0.
    eta_crit = critical_lr(module, nn.MSELoss(), x, y).eta_crit
    print(f"\n{'rate / critical':>15}  {'model':8} {'first':>9} {'highest':>9} {'last':>9}")
    for ratio in (0.9, 1.5, 2.5):
        fresh = QuadraticModel(module).module  # a copy of the module, so that the next rate starts from w0 again
        for name, model in {"f": fresh, "f_lin": LinearModel(module), "f_quad": QuadraticModel(module)}.items():
            losses = train(model, x, y, ratio * eta_crit)
            print(f"{ratio:15.1f}  {name:8} {losses[0]:9.1e} {max(losses):9.1e} {losses[-1]:9.1e}")


if __name__ == "__main__":
    main()
