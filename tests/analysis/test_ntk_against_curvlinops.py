"""An independent package agrees: the exact NTK is J J^T of curvlinops' Jacobian, to 1e-10 in float64.

Skipped where curvlinops is not installed: pip install --no-deps -r constraints-bench.txt
"""

import pytest
import torch

from catapult_opt.analysis.networks import cnn, mlp, myrtle5, vit, wide_resnet
from catapult_opt.analysis.ntk import ntk

curvlinops = pytest.importorskip("curvlinops")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


CASES = {
    "fcn-2": lambda: mlp(12, 24, 2, generator=seeded()),
    "fcn-5, three outputs": lambda: mlp(12, 24, 5, 3, generator=seeded()),
    "fcn-3, PyTorch's parameterisation": lambda: mlp(12, 24, 3, 2, parameterization="torch", generator=seeded()),
    "cnn-5": lambda: cnn(3, 6, 5, 8, generator=seeded()),
    "cnn-3, ten outputs": lambda: cnn(3, 6, 3, 8, 10, generator=seeded()),
    "myrtle-5": lambda: myrtle5(3, 6, 2, generator=seeded()),
    "wide resnet": lambda: wide_resnet(3, 2, widen=0.1, norm=False, generator=seeded()),
    "vit": lambda: vit(3, 8, 2, width=6, depth=2, generator=seeded()),
}


@pytest.mark.parametrize("case", CASES)
def test_ntk_is_that_of_curvlinops_to_1e_10(case):
    model = CASES[case]().double()
    shape = (6, 12) if case.startswith("fcn") else (6, 3, 8, 8)
    x = torch.randn(*shape, generator=seeded(1), dtype=torch.float64)
    kernel = ntk(model, x)
    params = list(model.parameters())
    y = model(x).detach()
    transposed = curvlinops.TransposedJacobianLinearOperator(model, params, [(x, y)])
    rows = (transposed @ torch.eye(y.numel(), dtype=torch.float64)).T
    truth = rows @ rows.T
    assert kernel.shape == truth.shape == (y.numel(), y.numel())
    assert float((kernel - truth).abs().max() / truth.abs().max()) < 1e-10
