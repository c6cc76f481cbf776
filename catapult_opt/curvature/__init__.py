"""Curvature of the loss: operators and the eigen-solver."""
