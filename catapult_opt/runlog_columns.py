"""Records of a run log in little memory: a numpy array per field, seen as a sequence of dictionaries."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Union, overload

import numpy as np
import numpy.typing as npt

from .runlog_format import MAX_INT, Record

Column = Union[npt.NDArray[Any], "Columns"]  # values of one field; columns again where the values are dictionaries
Columns = dict[str, Column]
Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Group:
    """Records with the same fields.

    Attributes:
        lines: the number of each record's line in the log, ascending, int64 of shape (n,).
        columns: the values of each field, n of them, in the order in which the fields are written.
    """

    lines: Integers
    columns: Columns

    def select(self, mask: Mask) -> Group:
        """The records for which ``mask``, of shape (n,), is true."""
        return Group(self.lines[mask], _select(self.columns, mask))

    def numbers(self, *path: str) -> Floats | None:
        """The values of a field, or of a field within a field, as floats of shape (n,); None where there is none."""
        column: Column | None = self.columns
        for key in path:
            column = column.get(key) if isinstance(column, dict) else None
        if column is None or isinstance(column, dict):
            return None
        if column.dtype != object:
            return column.astype(np.float64)
        return np.array([_as_float(value) for value in column], np.float64)


class Records(Sequence[Record]):
    """Records in the order written. Each item is a new dictionary: changing it changes nothing here.

    Example:
        >>> records = Records.of([{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25, "eta_crit": 2.0}])
        >>> records[-1]
        {'step': 2, 'loss': 0.25, 'eta_crit': 2.0}
        >>> records.numbers("eta_crit")
        array([nan,  2.])
    """

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, groups: Iterable[Group] = ()) -> None:
        self.groups = sorted((group for group in groups if len(group.lines)), key=lambda group: int(group.lines[0]))
        lines = np.concatenate([np.empty(0, np.int64), *[group.lines for group in self.groups]])
        self._order: Integers | None = None  # the places of the records among those of all groups; None: as they come
        if np.any(lines[1:] < lines[:-1]):
            self._order = np.argsort(lines, kind="stable")
        self._ends = np.cumsum([len(group.lines) for group in self.groups], dtype=np.int64)

    @classmethod
    def of(cls, records: Iterable[Record]) -> Records:
        """Columns made of dictionaries."""
        return cls(grouped(list(enumerate(records))))

    # As a sequence of dictionaries, which compares, adds and prints like a list of them.

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self._record(i) for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]  # this refuses what lies outside
        return self._record(i)

    def _record(self, i: int) -> Record:
        place = i if self._order is None else int(self._order[i])
        number = int(np.searchsorted(self._ends, place, side="right"))
        group = self.groups[number]
        return _row(group.columns, place - int(self._ends[number]) + len(group.lines))

    def __iter__(self) -> Iterator[Record]:
        return map(self._record, range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (Records, list)) and len(self) == len(other) and all(map(_same, self, other))

    def __add__(self, other: Sequence[Record]) -> list[Record]:
        return [*self, *other]

    def __radd__(self, other: Sequence[Record]) -> list[Record]:
        return [*other, *self]

    def __repr__(self) -> str:
        return repr(list(self))

    # As columns.

    def keys(self, *path: str) -> list[str]:
        """The names of all fields, or of all fields within a field, in the order of their first record."""
        found: dict[str, None] = {}
        for group in self.groups:
            columns: Any = group.columns
            for key in path:
                columns = columns.get(key, {}) if isinstance(columns, dict) else {}
            found |= dict.fromkeys(columns if isinstance(columns, dict) else ())
        return list(found)

    def numbers(self, *path: str) -> Floats:
        """A field, or a field within a field, of every record as floats of shape (len,), NaN where there is none."""
        return self._in_order([_or_nan(group, path) for group in self.groups], np.float64)

    def integers(self, key: str, default: int) -> Integers:
        """The whole numbers in a field of every record, int64 of shape (len,), ``default`` where there is none.

        Those that do not fit 64 bits become the closest that does.
        """
        parts = [_integers(group.columns.get(key), len(group.lines), default) for group in self.groups]
        return self._in_order(parts, np.int64)

    def values(self, key: str, default: Any = None) -> list[Any]:
        """The values of a field in every record, ``default`` where there is none."""
        parts: list[list[Any]] = []
        for group in self.groups:
            n, column = len(group.lines), group.columns.get(key)
            if isinstance(column, dict):
                parts.append([_row(column, i) for i in range(n)])
            else:
                parts.append([default] * n if column is None else column.tolist())
        values = [value for part in parts for value in part]
        return values if self._order is None else [values[place] for place in self._order.tolist()]

    def having(self, *path: str) -> Records:
        """The records that have a field, or a field within a field; their columns are shared, not copied."""
        return Records(group for group in self.groups if _has(group.columns, path))

    def _in_order(self, parts: Sequence[Any], dtype: Any) -> npt.NDArray[Any]:
        joined = np.concatenate([np.empty(0, dtype), *parts]).astype(dtype, copy=False)
        return joined if self._order is None else joined[self._order]


def _same(one: Any, other: Any) -> bool:
    return bool(one == other)


def _integers(column: Column | None, count: int, default: int) -> Integers:
    if column is None or isinstance(column, dict) or column.dtype.kind == "f":
        return np.full(count, default)
    if column.dtype != object:
        return column.astype(np.int64, copy=False)
    least, most = -MAX_INT, MAX_INT - 1
    return np.array([min(max(v, least), most) if isinstance(v, int) else default for v in column], np.int64)


def _as_float(value: Any) -> float:
    try:
        return float(value) if isinstance(value, (int, float)) else math.nan
    except OverflowError:
        return math.nan


def _has(columns: Mapping[str, Any], path: Sequence[str]) -> bool:
    found: Any = columns
    for key in path:
        if not isinstance(found, dict) or key not in found:
            return False
        found = found[key]
    return True


def _or_nan(group: Group, path: Sequence[str]) -> Floats:
    numbers = group.numbers(*path)
    return np.full(len(group.lines), np.nan) if numbers is None else numbers


def _select(columns: Columns, mask: Mask) -> Columns:
    return {k: _select(c, mask) if isinstance(c, dict) else c[mask] for k, c in columns.items()}


def _row(columns: Columns, i: int) -> Record:
    return {k: _row(c, i) if isinstance(c, dict) else c.item(i) for k, c in columns.items()}


# ------------------------------------------------------------------------------------------------------------ packing


def grouped(records: Sequence[tuple[int, Record]]) -> list[Group]:
    """Groups of records with the same fields, and the same fields within these, made of line numbers and records."""
    alike: dict[tuple[Any, ...], list[tuple[int, Record]]] = {}
    for item in records:
        record = item[1]
        inner = [tuple(value) for value in record.values() if type(value) is dict]
        alike.setdefault((tuple(record), *inner), []).append(item)
    groups = []
    for (keys, *_), items in alike.items():
        columns = zip(*[record.values() for _, record in items], strict=True)
        lines = np.array([number for number, _ in items], np.int64)
        groups.append(Group(lines, {key: packed(values) for key, values in zip(keys, columns, strict=True)}))
    return groups


def packed(values: Sequence[Any]) -> Column:
    """The values of one field as an array of floats, integers or booleans where they are one kind, else of objects."""
    kinds = set(map(type, values))
    if kinds == {dict} and len(keys := set(map(tuple, values))) == 1:
        (names,) = keys
        return {name: packed([value[name] for value in values]) for name in names}
    if kinds == {float}:
        return compact(np.array(values, np.float64))
    if kinds == {bool}:
        return compact(np.array(values, np.bool_))
    if kinds == {int} and all(-MAX_INT <= value < MAX_INT for value in values):
        return compact(np.array(values, np.int64))
    column = np.empty(len(values), object)
    for i, value in enumerate(values):  # not all at once: numpy would take lists apart
        column[i] = value
    return compact(column) if kinds == {str} else column


def compact(column: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The column, its value stored once where all are the same; texts that are the same are one object."""
    if column.dtype == object:
        texts: dict[Any, Any] = {}
        column[:] = [texts.setdefault(value, value) for value in column]
    bits = column.view(np.int64) if column.dtype == np.float64 else column  # NaN equals NaN here, 0 differs from -0
    if len(column) > 1 and (bits[1:] == bits[:1]).all():
        return np.broadcast_to(column[:1].copy(), column.shape)
    return column
