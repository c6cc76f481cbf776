"""Linear and quadratic models of networks: modules, dynamics under gradient descent, regimes (thesis chapter 3)."""

from .closed_forms import GeneralQuadraticModel, TwoLayerNQM, TwoLayerReLU
from .dynamics import (
    Trajectory,
    matrix_step,
    one_dimensional_step,
    reduced,
    reduced_step,
    scalar_step,
    scalar_step_jacobian,
    scalar_trajectory,
)
from .expansions import LinearModel, QuadraticModel
from .measures import jacobian, output_hessians
from .regimes import (
    Equilibrium,
    Observation,
    PhaseDiagram,
    Regime,
    catapult_directions,
    equilibria,
    observe,
    phase_diagram,
    regime,
    two_layer_start,
)

__all__ = [
    "Equilibrium",
    "GeneralQuadraticModel",
    "LinearModel",
    "Observation",
    "PhaseDiagram",
    "QuadraticModel",
    "Regime",
    "Trajectory",
    "TwoLayerNQM",
    "TwoLayerReLU",
    "catapult_directions",
    "equilibria",
    "jacobian",
    "matrix_step",
    "observe",
    "one_dimensional_step",
    "output_hessians",
    "phase_diagram",
    "reduced",
    "reduced_step",
    "regime",
    "scalar_step",
    "scalar_step_jacobian",
    "scalar_trajectory",
    "two_layer_start",
]
