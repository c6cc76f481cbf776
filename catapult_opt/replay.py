"""Run a captured forward pass again at other weights, leaving nothing of the user's changed."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.func import functional_call

from .distributed import local, reshard
from .trees import map_tensors, tensors_in

# Ids of the modules of every measurement under way: one a thread that trains.
_measured: list[frozenset[int]] = []


def is_measuring(module: nn.Module | None = None) -> bool:
    """True while a measurement runs the model again: for user hooks that must not count such passes.

    Args:
        module: ask for this model, or part of one, alone; None: for any (where threads train models of their own).

    Example:
        >>> is_measuring()
        False
    """
    return any(module is None or id(module) in ids for ids in _measured)


@dataclass(frozen=True)
class Buffer:
    """A buffer at the start of a forward pass: spectral_norm, for one, computes with buffers that it moves."""

    module: nn.Module
    name: str
    tensor: Tensor
    version: int
    value: Tensor

    def changed(self) -> bool:
        return getattr(self.module, self.name) is not self.tensor or self.tensor._version != self.version

    def restore(self) -> None:
        """By pointer, so that compiled code sees the tensor it knows. Only inside `preserved`."""
        self.tensor.data = precise(self.value.clone())
        if getattr(self.module, self.name) is not self.tensor:
            setattr(self.module, self.name, self.tensor)


@dataclass
class ForwardCall:
    """One forward pass of the training loop: its arguments and the state it started from."""

    # The arguments of the call.
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    # The random state of the CPU (None) and of each device: the pass run again draws the same dropout masks.
    rng: list[tuple[str | None, Tensor]]
    # The training flag of every submodule.
    modes: list[bool]
    # All weights of the model, also those that another optimizer trains.
    weights: list[Tensor]
    # The versions of the weights and of the tensor arguments, which tell whether they were changed since.
    versions: list[int]
    # True under autocast, and where something wraps the model's forward and may switch autocast on inside.
    autocast: bool
    # True where the loop called torch.compile's version of a model given uncompiled.
    compiled: bool = False
    # True where the pass drew random numbers.
    random: bool = False
    # The output tensors that need gradients, as the loop got them.
    outputs: list[Tensor] = field(default_factory=list)
    # The index of each of these among all tensors of the output.
    places: list[int] = field(default_factory=list)
    # The edges by which the graph enters the outputs, whatever was changed in place since.
    edges: list[GradientEdge] = field(default_factory=list)
    # The detached outputs at the weights of the step.
    base: list[Tensor] | None = None
    # The versions of the outputs, which tell whether they were changed since.
    output_versions: list[int] = field(default_factory=list)
    # The buffers that the forward pass changes, as it found them.
    buffers: list[Buffer] = field(default_factory=list)

    def finish(self, output: Any) -> None:
        """Keep the outputs that gradients flow through, and the buffers that were changed."""
        self.buffers = [b for b in self.buffers if b.changed()]
        self.random = any(not torch.equal(_random_state(device), state) for device, state in self.rng)
        every = tensors_in(output)
        first = {id(t): i for i, t in reversed(list(enumerate(every)))}  # one tensor may come in several places
        self.places = sorted(i for i in first.values() if every[i].requires_grad and every[i].is_floating_point())
        self.outputs = [every[i] for i in self.places]
        self.edges = [get_gradient_edge(t) for t in self.outputs]
        self.base = [t.detach() for t in self.outputs]
        self.output_versions = [t._version for t in self.outputs]

    @property
    def batch_size(self) -> int | None:
        """Length of the first dimension of the first tensor argument."""
        tensors = [t for t in tensors_in((self.args, self.kwargs)) if t.dim() > 0]
        return tensors[0].shape[0] if tensors else None

    def inputs_depend_on(self, params: Sequence[Tensor]) -> bool:
        """Were the arguments themselves computed from parameters, by an earlier pass for instance?"""
        known = {id(p) for p in params}
        nodes = [t.grad_fn for t in tensors_in((self.args, self.kwargs)) if t.grad_fn is not None]
        return any(id(getattr(node, "variable", None)) in known for node in ancestors(nodes))

    def inputs_changed(self) -> bool:
        """Was an argument modified in place since the forward pass?"""
        tensors = tensors_in((self.args, self.kwargs))
        return [t._version for t in tensors] != self.versions[len(self.versions) - len(tensors) :]

    def base_is_current(self) -> bool:
        """Do the kept outputs still belong to the present weights, in full precision?"""
        return (
            self.base is not None
            and not self.autocast
            and not self.compiled
            and all(b.element_size() >= 4 for b in self.base)
            and [w._version for w in self.weights] == self.versions[: len(self.weights)]
            and [t._version for t in self.outputs] == self.output_versions
        )


def ancestors(nodes: Iterable[Node]) -> Iterator[Node]:
    """These nodes of the graph and all that they are computed from."""
    seen, todo = set(nodes), list(nodes)
    while todo:
        node = todo.pop()
        yield node
        new = [n for n, _ in node.next_functions if n is not None and n not in seen]
        seen.update(new)
        todo += new


def record_forward(
    model: nn.Module, params: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], compiled: bool = False
) -> ForwardCall:
    """What has to be known at the start of a forward pass to run it again."""
    devices = {p.device for p in params if p.device.type not in ("cpu", "meta")}
    places: list[str | None] = [None, *map(str, devices)]
    kinds = {p.device.type for p in params}
    # Under fully_shard the model holds gathered copies now, the optimizer (params) what is stepped.
    weights = list({id(p): p for p in [*params, *model.parameters()]}.values())
    return ForwardCall(
        args=args,
        kwargs=kwargs,
        rng=[(place, _random_state(place)) for place in places],
        modes=[m.training for m in model.modules()],
        weights=weights,
        versions=[t._version for t in [*weights, *tensors_in((args, kwargs))]],
        autocast=_wrapped(model) or any(torch.is_autocast_enabled(kind) for kind in kinds if kind != "meta"),
        compiled=compiled,
        buffers=[Buffer(m, name, b, b._version, b.detach().clone()) for m, name, b in buffers_of(model.modules())],
    )


def _random_state(device: str | None) -> Tensor:
    if device is None:
        return torch.get_rng_state()
    state: Tensor = torch.get_device_module(device).get_rng_state(device)
    return state


def buffers_of(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, str, Tensor]]:
    """Every buffer, with its module and its name there."""
    return [(m, name, b) for m in modules for name, b in m.named_buffers(recurse=False)]


def replay(model: nn.Module, call: ForwardCall, weights: dict[str, Tensor] | None = None) -> Any:
    """The model's output for the call's arguments at the present (or the given) weights. Only inside `preserved`."""
    for device, state in call.rng:
        if device is None:
            torch.set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, device)
    for module, mode in zip(model.modules(), call.modes, strict=True):
        module.training = mode
    for buffer in call.buffers:
        buffer.restore()
    args, kwargs = map_tensors((call.args, call.kwargs), lambda t: precise(t.detach()))
    if weights is not None:
        return functional_call(model, weights, args, kwargs)
    return model(*args, **kwargs)


def precise(tensor: Tensor) -> Tensor:
    """float32 in place of half precision, whose rounding drowns a small step."""
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() < 4 else tensor


def _wrapped(model: nn.Module) -> bool:
    """Was its forward replaced from outside, as Accelerate does to put autocast inside?"""
    return "forward" in vars(model)


def _without_autocast(kinds: Iterable[str], module: nn.Module, args: Any) -> None:
    """Until the autocast that is on now ends."""
    for kind in kinds:
        torch.set_autocast_enabled(kind, False)


@contextmanager
def preserved(model: nn.Module, criterion: nn.Module | None, params: Sequence[Tensor]) -> Iterator[None]:
    """Restore weights, buffers, random state and train/eval flags at the end, whatever happens inside.

    Weights and buffers are restored by pointer: their own storage is never written, but for the parts of sharded
    parameters, which are copied back. Inside, gradients are enabled,
    autocast is off, and half-precision weights and buffers are in float32.
    """
    ids = frozenset(map(id, model.modules()))
    reshard(model)
    modules = [*model.modules(), *(criterion.modules() if criterion is not None else ())]
    modes = [m.training for m in modules]
    buffers = buffers_of(modules)
    weights = {id(p): p for p in [*params, *(p for m in modules for p in m.parameters(recurse=False))]}.values()
    whole = [w for w in weights if local(w) is w]
    saved = [(t, t.data) for t in [*whole, *(b for _, _, b in buffers)]]
    parts = [(local(p), local(p).clone()) for p in params if local(p) is not p]
    devices = {p.device for p in params if p.device.type not in ("cpu", "meta")}
    kinds = {p.device.type for p in params} - {"meta"}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for device in devices:
            stack.enter_context(torch.random.fork_rng([device], device_type=device.type))
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False, cache_enabled=False))
        if _wrapped(model):
            for module in (m for m in model.modules() if m is not model):
                stack.enter_context(module.register_forward_pre_hook(functools.partial(_without_autocast, kinds)))
        stack.enter_context(torch.enable_grad())
        _measured.append(ids)
        try:
            for _, _, buffer in buffers:
                buffer.data = precise(buffer.data.clone())
            for weight in whole:
                weight.data = precise(weight.data)
            yield
        finally:
            _measured.remove(ids)
            for tensor, data in saved:
                tensor.data = data
            for part, kept in parts:
                part.data.copy_(kept)
            reshard(model)
            for module, name, buffer in buffers:
                if getattr(module, name) is not buffer:
                    setattr(module, name, buffer)
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode
