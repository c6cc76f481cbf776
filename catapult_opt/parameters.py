"""Which parameters: those of an optimizer, those of a model, and their names."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from .distributed import reshard


def params_of(optimizer: Optimizer) -> list[Tensor]:
    """All parameters of an optimizer, in its order."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def parameter_names(model: nn.Module, params: Sequence[Tensor]) -> list[str]:
    """The name of each parameter in the model, as it was before it was compiled; "" where it has none."""
    names = {id(p): name.replace("_orig_mod.", "") for name, p in model.named_parameters()}
    return [names.get(id(p), "") for p in params]


def trainable(model: nn.Module) -> list[Tensor]:
    """The model's parameters that require gradients; a ValueError if there are none."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    params: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise ValueError("model has no parameter that requires a gradient: unfreeze some, or pass another model")
    return params


def check_model(model: nn.Module, params: Sequence[Tensor]) -> None:
    """A ValueError unless the model holds all trainable parameters of the optimizer, and there are some."""
    reshard(model)  # a validation leaves gathered weights in place of the optimizer's
    known = {id(p) for p in trainable(model)}
    if not any(p.requires_grad for p in params):
        raise ValueError("params: none of the parameters requires a gradient")
    for i, p in enumerate(params):
        if p.requires_grad and id(p) not in known:
            raise ValueError(
                f"params: parameter {i} of shape {tuple(p.shape)} is not a parameter of model "
                f"({type(model).__name__}): pass the model that holds it"
            )
