"""Studies of training dynamics: linearity, quadratic models, catapults and AGOP."""
