"""The figures and tables of the thesis, each by one command: ``catapult-opt reproduce NAME``."""

from __future__ import annotations

import re

from . import (
    automatic,
    batch_sizes,
    catapults,
    features,
    gradients,
    hessian_rates,
    kernel_change,
    linearity,
    one_example,
    optimizers,
    printed_rates,
    quadratic,
    quadratic_directions,
    quadratic_features,
    quadratic_spaces,
    quadratic_test_loss,
    quadratic_theorems,
    raised_rates,
    sgd,
    small_rates,
)
from .artefact import Artefact, Verdict

__all__ = ["ARTEFACTS", "Artefact", "Verdict"]

# One module a group of artefacts that belong together.
_MODULES = (
    automatic,
    batch_sizes,
    catapults,
    features,
    gradients,
    hessian_rates,
    kernel_change,
    linearity,
    one_example,
    optimizers,
    printed_rates,
    quadratic,
    quadratic_directions,
    quadratic_features,
    quadratic_spaces,
    quadratic_test_loss,
    quadratic_theorems,
    raised_rates,
    sgd,
    small_rates,
)


def _place(artefact: Artefact) -> tuple[str, str, list[int]]:
    """Chapters 2, 3, 4, then appendices A, B, C; figures before tables; by number."""
    kind, _, number = artefact.name.partition("-")
    chapter, *rest = number.split(".")
    return chapter, kind, [int(n) for n in re.findall(r"\d+", ".".join(rest))]


ARTEFACTS: tuple[Artefact, ...] = tuple(
    sorted((artefact for module in _MODULES for artefact in module.ARTEFACTS), key=_place)
)
"""All artefacts, in the order of the thesis."""
