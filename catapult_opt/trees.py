"""Tensors inside nested arguments and outputs: tuples, lists, mappings, dataclasses; and their values."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def tensors_in(tree: Any) -> list[Tensor]:
    """Every tensor of a nested structure, in a fixed order."""
    if isinstance(tree, Tensor):
        return [tree]
    return [tensor for child in _children(tree) for tensor in tensors_in(child)]


def read_numbers(tensors: Sequence[Tensor]) -> list[float]:
    """Values of 0-d tensors in one transfer. Waits for the device: the hot path of a step must not come here."""
    if len(tensors) == 1:
        return [float(tensors[0])]
    return [float(x) for x in torch.stack([t.to(tensors[0].device) for t in tensors]).tolist()]


def map_tensors(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same structure with function applied to every tensor; what holds no tensor is passed through as it is."""
    if isinstance(tree, Tensor):
        return function(tree)
    if not tensors_in(tree):
        return tree
    if isinstance(tree, Mapping):
        mapped: Any = copy.copy(tree)  # keeps subclasses such as the output classes of other libraries
        for key, value in tree.items():
            mapped[key] = map_tensors(value, function)
        return mapped
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        fields = {f.name: map_tensors(getattr(tree, f.name), function) for f in dataclasses.fields(tree)}
        return dataclasses.replace(tree, **fields)
    children = [map_tensors(child, function) for child in tree]
    return type(tree)(*children) if hasattr(tree, "_fields") else type(tree)(children)


def _children(tree: Any) -> list[Any]:
    if isinstance(tree, Mapping):
        return list(tree.values())
    if isinstance(tree, (tuple, list)):
        return list(tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return [getattr(tree, f.name) for f in dataclasses.fields(tree)]
    return []
