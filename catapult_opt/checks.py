"""Checks of arguments that several places make, in the same words. Plain Python."""

from __future__ import annotations


def check_whole_number(name: str, value: object) -> None:
    """A ValueError unless the value is an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
