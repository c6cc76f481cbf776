"""States as plain numbers: how they are checked before anything is taken over. Plain Python.

A state is a dataclass of numbers, strings and flags. A newer version may have added fields, and an older one lacks
some: unknown fields are ignored and missing ones keep their defaults. Everything else that is not as it should be is
one `ValueError` that names the field.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

# The version of the state format that is written; 1 is that of catapult_opt 0.1.0.
VERSION = 2
_LARGEST_INTEGER = 2**53


def field_of(
    default: Any,
    *,
    least: float = -math.inf,
    most: float = math.inf,
    infinite: bool = False,
    choices: tuple[str, ...] = (),
) -> Any:
    """A dataclass field with the values that may be loaded into it.

    Args:
        default: of a new state, and where the field is missing.
        least, most: range of a number, both included.
        infinite: may a float be infinite? It may never be NaN.
        choices: the strings allowed; (): any.
    """
    return field(default=default, metadata={"least": least, "most": most, "infinite": infinite, "choices": choices})


@dataclass
class FieldsState:
    """A state: a dataclass whose fields are made by `field_of`."""

    def as_dict(self) -> dict[str, Any]:
        """The fields by name; numbers, strings and flags only."""
        return dict(vars(self))


State = TypeVar("State", bound=FieldsState)


def take_over(kind: type[State], state: object, where: str) -> State:
    """A new state of this kind from what a checkpoint holds.

    Args:
        kind: the dataclass.
        state: a mapping of its fields.
        where: name of the state, for errors.

    Raises:
        ValueError: not a mapping, or a field of the wrong type or out of its range; names it.

    Example:
        >>> @dataclass
        ... class Count(FieldsState):
        ...     steps: int = field_of(0, least=0)
        >>> take_over(Count, {"steps": 3, "unknown": 1}, "count")
        Count(steps=3)
    """
    if not isinstance(state, dict):
        raise ValueError(f"state_dict: {where} must be a mapping of fields, got {_short(state)}")
    known = {f.name: f for f in fields(kind)}
    values = {}
    for name in known.keys() & state.keys():
        problem = _problem(state[name], str(known[name].type), known[name].metadata)
        if problem:
            raise ValueError(f"state_dict: {where}.{name} must be {problem}, got {_short(state[name])}")
        values[name] = float(state[name]) if known[name].type == "float" else state[name]
    return kind(**values)


def parse(text: object) -> dict[str, Any]:
    """The JSON object in a string.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(text, str):
        raise ValueError(f"state_dict: must be a string that state_dict() gave, got {_short(text)}")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"state_dict: is damaged ({why}): {_short(text)}") from None
    if not isinstance(found, dict):
        raise ValueError(f"state_dict: must be a JSON object, got {_short(text)}")
    return found


def _problem(value: Any, kind: str, limits: Any) -> str:
    """What the value should have been, "" if it is that."""
    if kind.endswith(" | None"):
        if value is None:
            return ""
        kind = kind.removesuffix(" | None")
    least, most = limits["least"], limits["most"]
    if kind == "bool":
        return "" if isinstance(value, bool) else "true or false"
    if kind == "str":
        choices = limits["choices"]
        fits = isinstance(value, str) and (not choices or value in choices)
        return "" if fits else f"one of {', '.join(map(repr, choices))}" if choices else "a string"
    number = isinstance(value, int) or (isinstance(value, float) and kind == "float")
    if not number or isinstance(value, bool):
        return "a number" if kind == "float" else "a whole number"
    if kind == "int" and abs(value) > _LARGEST_INTEGER:
        return "a whole number that a checkpoint can hold"
    if math.isnan(value) or (math.isinf(value) and not limits["infinite"]):
        return "a finite number"
    if not least <= value <= most:
        return f"at least {least:g}" + ("" if math.isinf(most) else f" and at most {most:g}")
    return ""


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
