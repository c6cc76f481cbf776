"""A term of the step's loss, and the user's code between the model's outputs and the criterion's inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from .replay import ForwardCall
from .trees import tensors_in


@dataclass
class LossCall:
    """One term of the step's loss: a criterion call, the forward passes it depends on, and its weight in the sum."""

    # The value of the criterion: detached, 0-d.
    value: Tensor
    # d(step's loss) / d(value), without the factor of a GradScaler. None until the backward pass ran.
    weight: Tensor | None = None
    # The GradScaler's factor, where there is a GradScaler.
    scale: Tensor | None = None
    # The module that was called. None where the model returned the loss itself.
    criterion: nn.Module | None = None
    # The arguments of the call.
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    # The tensors among the arguments that depend on the model's outputs.
    inputs: list[Tensor] = field(default_factory=list)
    # The forward passes that these tensors were computed from.
    forwards: list[ForwardCall] = field(default_factory=list)
    # The user's code from the model's outputs to `inputs`. None where they are the same tensors.
    link: Link | None = None
    # Why this call cannot be measured. Empty where it can.
    problem: str = ""
    # The number of this call, counted from the last step.
    number: int = 0
    # The number of the latest call at the time when the backward pass of this one ran.
    latest_at_backward: int = 0


class Link:
    """The user's code between the model's outputs and the criterion, linearised: products with its Jacobian J_g.

    Built while the training graph is alive. Each input of the criterion is taken for itself: another one may be
    computed from the same outputs by way of the model.
    """

    def __init__(self, outputs: list[Tensor], edges: list[list[GradientEdge | None]], inputs: list[Tensor]) -> None:
        self._outputs = [torch.zeros_like(o) for o in outputs]
        self._rows = [_Row(outputs, row, z) for row, z in zip(edges, inputs, strict=True)]

    def jvp(self, tangents: Sequence[Tensor]) -> list[Tensor]:
        """J_g t, one tensor per criterion input, for one tangent per output."""
        return [row.jvp(tangents) for row in self._rows]

    def vjp(self, cotangents: Sequence[Tensor]) -> list[Tensor]:
        """J_g^T s, one tensor per output, for one cotangent per criterion input."""
        total = [o.clone() for o in self._outputs]
        for row, s in zip(self._rows, cotangents, strict=True):
            for x, g in zip(total, row.vjp(s), strict=True):
                if g is not None:
                    x.add_(g)
        return total


class _Row:
    """J_g of one input, from its own backward pass: vjp(v) = J_g^T v is linear in v, so its derivative gives J_g t.

    Only the graph between outputs and input is touched.
    """

    def __init__(self, outputs: list[Tensor], edges: list[GradientEdge | None], z: Tensor) -> None:
        """`edges`: where the graph enters the outputs; None for those that z is not directly computed from."""
        self._zero, self._v = torch.zeros_like(z), torch.ones_like(z, requires_grad=True)
        self._n = len(outputs)
        direct = [(i, edge) for i, edge in enumerate(edges) if edge is not None]
        pulled: Sequence[Tensor | None] = ()
        if direct:
            inputs = [edge for _, edge in direct]
            pulled = torch.autograd.grad([z], inputs, [self._v], create_graph=True, allow_unused=True)
        used = [(i, y) for (i, _), y in zip(direct, pulled, strict=True) if y is not None and _moves(y)]
        self._places, self._pulled = [i for i, _ in used], [y for _, y in used]
        self._t = [torch.zeros_like(outputs[i], requires_grad=True) for i in self._places]
        self._pushed = [self._push(y, t) for y, t in zip(self._pulled, self._t, strict=True)]

    def jvp(self, tangents: Sequence[Tensor]) -> Tensor:
        if not self._places:
            return self._zero
        used = [tangents[i].to(y.dtype) for i, y in zip(self._places, self._pulled, strict=True)]
        return torch.autograd.grad(self._pulled, [self._v], used, retain_graph=True)[0]

    def vjp(self, s: Tensor) -> list[Tensor | None]:
        pulled: list[Tensor | None] = [None] * self._n
        if self._places:
            seeds = [s.to(y.dtype) for y in self._pushed]
            for i, g in zip(
                self._places, torch.autograd.grad(self._pushed, self._t, seeds, retain_graph=True), strict=True
            ):
                pulled[i] = g
        return pulled

    def _push(self, y: Tensor, t: Tensor) -> Tensor:
        pushed = torch.autograd.grad([y], [self._v], [t], create_graph=True, allow_unused=True)[0]
        if pushed is None:
            raise RuntimeError("its backward pass cannot be differentiated")
        return pushed


def _moves(pulled: Tensor) -> bool:
    """Does J_g^T v depend on v? A derivative of zero (rounding) does not; one that only looks constant is refused."""
    if not pulled.requires_grad and bool(pulled.any()):
        raise RuntimeError("its backward pass cannot be differentiated")
    return pulled.requires_grad


def connect(call: LossCall, forwards: Sequence[ForwardCall], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Find which arguments of a criterion call depend on which forward passes, and how. Before backward runs."""
    inputs = [t for t in unique(tensors_in((args, kwargs))) if t.requires_grad and t.is_floating_point()]
    at = {id(o): (f, edge) for f in forwards for o, edge in zip(f.outputs, f.edges, strict=True)}
    if inputs and all(id(z) in at and _same(get_gradient_edge(z), at[id(z)][1]) for z in inputs):
        call.args, call.kwargs, call.inputs = args, kwargs, inputs
        call.forwards = unique([at[id(z)][0] for z in inputs])
        return
    inputs = [z for z in inputs if z.grad_fn is not None]
    every = [edge for f in forwards for edge in f.edges]
    direct = [_direct([get_gradient_edge(z)], every) for z in inputs]
    used = [edge for edges in direct for edge in edges]
    call.forwards = [f for f in forwards if any(_is_in(edge, used) for edge in f.edges)]
    if not call.forwards:
        return
    call.args, call.kwargs, call.inputs = args, kwargs, inputs
    if any(len(edges) > 1 and any(_direct(_before(edge), edges) for edge in edges) for edges in direct):
        call.problem = (
            "what the criterion is given mixes outputs of the model of which one is computed from the other: give them "
            "to the criterion as arguments of their own, and combine them there"
        )
        return
    outputs, every = [o for f in call.forwards for o in f.outputs], [edge for f in call.forwards for edge in f.edges]
    rows = [[edge if _is_in(edge, edges) else None for edge in every] for edges in direct]
    try:
        with torch.enable_grad():
            call.link = Link(outputs, rows, inputs)
    except RuntimeError as error:
        call.problem = (
            f"the code between model and criterion has no second derivative; move it into the model ({error})"
        )


def _direct(starts: list[GradientEdge], ends: list[GradientEdge]) -> list[GradientEdge]:
    """The ends that the starts are computed from without another end in between."""
    goals = {_key(edge): edge for edge in ends}
    found, seen, todo = {}, set(), list(starts)
    while todo:
        edge = todo.pop()
        if _key(edge) in seen:
            continue
        seen.add(_key(edge))
        if _key(edge) in goals:
            found[_key(edge)] = goals[_key(edge)]
        else:
            todo += _before(edge)
    return list(found.values())


def _before(edge: GradientEdge) -> list[GradientEdge]:
    return [GradientEdge(node, number) for node, number in edge.node.next_functions if node is not None]


def _key(edge: GradientEdge) -> tuple[Node, int]:
    return edge.node, edge.output_nr


def _same(a: GradientEdge, b: GradientEdge) -> bool:
    return _key(a) == _key(b)


def _is_in(edge: GradientEdge, edges: list[GradientEdge]) -> bool:
    return any(_same(edge, other) for other in edges)


def unique(items: list[Any]) -> list[Any]:
    """Each object once, in the order of first appearance."""
    return list({id(item): item for item in items}.values())
