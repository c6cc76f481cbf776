"""Kernels of 5,000 rows stay under 8 GB, where the Jacobian alone takes twice as much and more: peak of a process."""

import subprocess
import sys

import pytest

_SCRIPT = """
import resource, torch
from catapult_opt.analysis.networks import mlp
from catapult_opt.analysis.ntk import ntk
generator = torch.Generator().manual_seed(0)
n, k, width, memory = {n}, {k}, {width}, {memory}
model = mlp(3072, width, 5, k, generator=generator)
x = torch.randn(n, 3072, generator=generator)
kernel = ntk(model, x, memory=memory)
assert kernel.shape == (n * k, n * k) and bool(kernel.isfinite().all())
# A few entries against autograd, row by row.
def row(i, a):
    return torch.cat([g.flatten() for g in torch.autograd.grad(model(x[i : i + 1])[0, a], list(model.parameters()))])
for (i, a), (j, b) in (((0, 0), (n - 1, k - 1)), ((n // 2, 0), (n // 2, k - 1))):
    torch.testing.assert_close(kernel[i * k + a, j * k + b], row(i, a) @ row(j, b), rtol=1e-3, atol=1e-4)
parameters = sum(p.numel() for p in model.parameters())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, n * k * parameters * 4 / 1e9)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "k", "width", "memory"),
    [
        pytest.param(5000, 1, 1024, 1e9, id="the thesis' 5-layer FCN, n = 5,000"),
        pytest.param(500, 10, 256, 4e9, id="ten outputs, kn = 5,000"),
    ],
)
def test_peak_memory_is_below_8_gb(n, k, width, memory):
    script = _SCRIPT.format(n=n, k=k, width=width, memory=memory)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    peak, jacobian = map(float, done.stdout.split())
    print(f"peak {peak:.2f} GB, Jacobian {jacobian:.0f} GB")
    assert jacobian > 16
    assert peak < 8
