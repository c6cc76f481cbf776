"""The figures and tables of the thesis, each by one command: ``catapult-opt reproduce NAME``."""

from __future__ import annotations

from . import batch_sizes, linearity
from .artefact import Artefact, Verdict

__all__ = ["ARTEFACTS", "Artefact", "Verdict"]

# One module a group of artefacts that belong together.
_MODULES = (linearity, batch_sizes)

ARTEFACTS: tuple[Artefact, ...] = tuple(artefact for module in _MODULES for artefact in module.ARTEFACTS)
"""All artefacts, in the order of the thesis."""
