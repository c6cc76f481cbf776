"""What a controller keeps per parameter, and of the model's buffers: a warm start and an average of the weights."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .distributed import local, reshard
from .vectors import Vector

# Keys in the state of a parameter: the vector that the next measurement starts from, and the averaged weights, which
# are also what a blow-up is undone to. Both are there from the first step on, and shard with the parameter.
VECTOR, AVERAGE = "catapult_vector", "catapult_average"
# The names of the same in a state of catapult_opt 0.1.0.
_FORMER = {"catapult_snapshot": AVERAGE}


class Memory:
    """Warm start and averaged weights, one of each per parameter, and averaged buffers.

    Args:
        state: parameter -> dict; the optimizer's own state, or a mapping beside it.

    Example:
        >>> from collections import defaultdict
        >>> p = torch.zeros(2)
        >>> memory = Memory(defaultdict(dict))
        >>> memory.prepare([p])
        >>> memory.average([p.fill_(1.0)], {}, 0.25)
        >>> memory.weights([p])
        [tensor([0.2500, 0.2500])]
    """

    def __init__(self, state: MutableMapping[Tensor, dict[str, Any]]) -> None:
        self._state = state
        self._buffers: dict[str, Tensor] = {}
        self._depth = 0

    def keep_in(self, state: MutableMapping[Tensor, dict[str, Any]]) -> None:
        """From now on keep all in this mapping, which holds what the last one held, or what was loaded."""
        self._state = state

    @property
    def in_place(self) -> bool:
        """Are the averaged weights in place of the model's own?"""
        return self._depth > 0

    def prepare(self, params: Sequence[Tensor]) -> None:
        """Complete the state of the parameters: a vector of zeros, and the present weights as their average."""
        for p in params:
            self._vector_of(p)
            if AVERAGE not in self._state[p]:
                self._state[p][AVERAGE] = p.detach().clone()

    def start(self, params: Sequence[Tensor]) -> Vector:
        """The warm start: the last vector remembered, zeros for parameters that are new; of the rank's own parts."""
        kept = [self._state[p].get(VECTOR) if p in self._state else None for p in params]
        return [torch.zeros_like(local(p)) if v is None else local(v) for p, v in zip(params, kept, strict=True)]

    def remember(self, params: Sequence[Tensor], vector: Vector) -> None:
        """Keep the vector that the next measurement starts from; of the rank's own parts."""
        for p, v in zip(params, vector, strict=True):
            local(self._vector_of(p)).copy_(v)

    @torch.no_grad()
    def average(self, params: Sequence[Tensor], buffers: Mapping[str, Tensor], weight: float) -> None:
        """Take the present weights and buffers into the average: average += weight * (present - average).

        Args:
            params: all trainable parameters.
            buffers: the model's buffers that forward passes change, by name.
            weight: 0 leaves the average as it is, 1 begins it anew.
        """
        if weight <= 0:
            return
        for p in params:
            _blend(self._state[p][AVERAGE], p, weight)
        for name, b in buffers.items():
            if name in self._buffers:
                _blend(self._buffers[name], b, weight)
            else:
                self._buffers[name] = b.detach().clone()

    def weights(self, params: Sequence[Tensor]) -> list[Tensor]:
        """The averaged weights of these parameters; their present ones where there is no average yet."""
        return [self._state[p].get(AVERAGE, p) if p in self._state else p for p in params]

    @torch.no_grad()
    def put(self, params: Sequence[Tensor], model: nn.Module) -> None:
        """Copy the averaged weights and buffers into the model.

        The buffers too: one NaN in running statistics would stay for good.
        """
        for p, kept in zip(params, self.weights(params), strict=True):
            if kept is not p:
                p.copy_(kept)
        for name, b in model.named_buffers():
            if name in self._buffers:
                b.copy_(self._buffers[name])
        _forget_copies(model)

    @contextmanager
    def averaged(self, params: Sequence[Tensor], model: nn.Module) -> Iterator[None]:
        """The averaged weights and buffers in place of the model's own, which come back to the bit. May be nested."""
        with torch.no_grad():
            kept = [(t, t.detach().clone()) for t in (*params, *model.buffers())] if self._depth == 0 else []
        self._depth += 1
        try:
            if self._depth == 1:
                self.put(params, model)
            yield
        finally:
            self._depth -= 1
            with torch.no_grad():
                for tensor, value in kept:
                    tensor.copy_(value)
            _forget_copies(model)

    def _vector_of(self, p: Tensor) -> Tensor:
        state = self._state[p]
        if VECTOR not in state:
            state[VECTOR] = torch.zeros_like(p, requires_grad=False)
        vector: Tensor = state[VECTOR]
        return vector

    def encoded_buffers(self) -> dict[str, dict[str, Any]]:
        """The averaged buffers as plain values: dtype, shape and their bytes in base64."""
        return {name: _encoded(b) for name, b in self._buffers.items()}

    def take_buffers(self, buffers: Mapping[str, Tensor]) -> None:
        """Averaged buffers from a state."""
        self._buffers = {name: b.detach().clone() for name, b in buffers.items()}


def parse_buffers(state: object, model: nn.Module) -> dict[str, Tensor]:
    """The averaged buffers of a state.

    Args:
        state: what `Memory.encoded_buffers` gave, or, of 0.1.0, a base64 text or a mapping of tensors.
        model: whose buffers they are; those that it does not have are left out.

    Raises:
        ValueError: damaged, or not of the shape of the model's buffer.
    """
    if isinstance(state, str):
        state = _decoded_text(state)
    if not isinstance(state, dict):
        raise ValueError(f"state_dict: buffers must be a mapping, got {type(state).__name__}")
    known = dict(model.named_buffers())
    found = {}
    for name in known.keys() & state.keys():
        value = state[name]
        buffer = value if isinstance(value, Tensor) else _decoded(name, value)
        if buffer.shape != known[name].shape:
            raise ValueError(
                f"state_dict: buffer {name} has shape {tuple(buffer.shape)}, the model's {tuple(known[name].shape)}"
            )
        _check_finite(f"buffer {name}", buffer)
        found[name] = buffer.to(known[name])
    return found


def check_entries(entries: Mapping[str, Any], p: Tensor, name: str) -> dict[str, Any]:
    """A parameter's state from a checkpoint under its present names, checked.

    Raises:
        ValueError: a vector or an average that is no tensor, of another shape, or not finite; names it.
    """
    entries = {_FORMER.get(key, key): value for key, value in entries.items()}
    for key in (VECTOR, AVERAGE):
        if key not in entries:
            continue
        value = entries[key]
        if not isinstance(value, Tensor):
            raise ValueError(f"state_dict: {key} of parameter {name} must be a tensor, got {type(value).__name__}")
        if value.shape != p.shape:
            raise ValueError(
                f"state_dict: {key} of parameter {name} has shape {tuple(value.shape)}, and the parameter "
                f"{tuple(p.shape)}: is it another model's?"
            )
        _check_finite(f"{key} of parameter {name}", value)
    return entries


def _check_finite(what: str, tensor: Tensor) -> None:
    part = local(tensor)
    if not part.is_meta and part.is_floating_point() and not bool(torch.isfinite(part).all()):
        raise ValueError(f"state_dict: {what} is not finite")


def _forget_copies(model: nn.Module) -> None:
    """What was made of the weights before: gathered ones under fully_shard, cast ones inside an autocast."""
    reshard(model)
    torch.clear_autocast_cache()


def _blend(average: Tensor, present: Tensor, weight: float) -> None:
    """average += weight * (present - average), in place; counters and the like are copied."""
    if weight >= 1 or not average.is_floating_point():
        average.copy_(present)
    else:
        local(average).lerp_(local(present).to(average.dtype), weight)


def _encoded(tensor: Tensor) -> dict[str, Any]:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"dtype": dtype, "shape": list(tensor.shape), "data": base64.b64encode(data).decode("ascii")}


def _decoded(name: str, state: object) -> Tensor:
    try:
        assert isinstance(state, dict)
        dtype = getattr(torch, state["dtype"])
        data = bytearray(base64.b64decode(state["data"], validate=True))
        assert isinstance(dtype, torch.dtype)
        shape = [int(n) for n in state["shape"]]
        return torch.frombuffer(data, dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype)
    except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"state_dict: buffer {name} is damaged ({error or type(error).__name__})") from None


def _decoded_text(text: str) -> dict[str, Tensor]:
    """Buffers as 0.1.0 wrote them: torch.save in base64. Data only: nothing in it is executed."""
    if not text:
        return {}
    try:
        file = io.BytesIO(base64.b64decode(text, validate=True))
        tensors: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds
        raise ValueError(f"state_dict: buffers are damaged ({type(error).__name__})") from None
    return tensors
