"""Neural networks from any directed acyclic graph, and how close to linear in their weights they are (thesis ch. 2)."""

from .builders import add_bottlenecks, conv1d, densenet, drop_edges, fcn, with_skips
from .graph import DAG
from .measures import (
    HessianNorm,
    KernelChange,
    Linearization,
    PLStar,
    gradient_norm,
    gradient_norm_bound,
    hessian_norm,
    hessian_norm_in_ball,
    pl_star,
    points_in_ball,
    tangent_kernel,
)
from .network import DAGNetwork
from .picture import draw_layers
from .slopes import Slope, log_log_slope

__all__ = [
    "DAG",
    "DAGNetwork",
    "HessianNorm",
    "KernelChange",
    "Linearization",
    "PLStar",
    "Slope",
    "add_bottlenecks",
    "conv1d",
    "densenet",
    "draw_layers",
    "drop_edges",
    "fcn",
    "gradient_norm",
    "gradient_norm_bound",
    "hessian_norm",
    "hessian_norm_in_ball",
    "log_log_slope",
    "pl_star",
    "points_in_ball",
    "tangent_kernel",
    "with_skips",
]
