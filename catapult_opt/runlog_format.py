"""The format of a run log: what a line may hold, and how values are written as strict JSON.

The first line is the header, every later line a record of kind ``step``, ``event``, ``metrics`` or ``resume``. Every
line is strict JSON: NaN and the infinities are the strings "NaN", "Infinity" and "-Infinity".
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeGuard

FORMAT: Final = "catapult_opt-run"
VERSION: Final = 1
TRUNCATED: Final = "log_truncated"  # the event that tells of records lost after they were written
MAX_LINE: Final = 1 << 20  # bytes; a longer line is not a record of ours, and must not fill the memory
MAX_INT: Final = 1 << 63  # integers beyond it do not fit a column
_NON_FINITE: Final = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

Record = dict[str, Any]


class RunLogError(ValueError):
    """A run log that cannot be read at all; the message is one line and names the file."""


class RunLogNotFound(RunLogError, FileNotFoundError):
    """There is no such file."""


class RunLogWarning(UserWarning):
    """The run log could not be written, or lost something; training goes on."""


def kind_of_file(mode: int) -> str:
    """What a file of this mode is, in words, and "" for a regular file: only those are run logs."""
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return "" if stat.S_ISREG(mode) else kinds.get(stat.S_IFMT(mode), "a device")


# ---------------------------------------------------------------------------------------------------------- encoding


def encode(value: Any) -> Any:
    """``value`` as strict JSON can hold it: non-finite floats as strings, foreign objects as numbers or their repr.

    Example:
        >>> encode({"loss": math.inf, "betas": (0.9, 0.999)})
        {'loss': 'Infinity', 'betas': [0.9, 0.999]}
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return _encode_float(value)
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [encode(item) for item in value]
    try:
        return encode(value.item())  # a scalar of numpy or torch, neither of which is imported here
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return repr(value)


def _encode_float(value: float) -> float | str:
    if math.isfinite(value):
        return float(value)
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def decode(value: Any) -> Any:
    """The inverse of :func:`encode`, as far as there is one: "NaN" and the infinities become floats again."""
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [decode(item) for item in value]
    return value


def to_line(record: Record) -> bytes:
    """The line of the log that holds ``record``."""
    try:  # nearly every record is plain and finite already
        text = json.dumps(record, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError):
        text = json.dumps(encode(record), allow_nan=False, separators=(",", ":"))
    return text.encode("ascii") + b"\n"


def parse(data: bytes) -> Record:
    """The JSON object on a line; ``ValueError`` says what is wrong with it."""
    try:
        record = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError("not text") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError:  # this includes integers of absurd length
        raise ValueError("truncated record" if not data.endswith(b"\n") else "damaged record") from None
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    return record


# ----------------------------------------------------------------------------------------------------------- checking


def checked_header(data: bytes, size: int, path: Path) -> Record:
    """The header on the first line of ``size`` bytes; :class:`RunLogError` says why there is none."""
    if not data.strip():
        raise RunLogError(f"{path}: is empty" if size == 0 else f"{path}: is not a catapult_opt run log")
    try:
        header = parse(data)
    except ValueError as error:
        if FORMAT.encode() in data[:4096]:
            raise RunLogError(f"{path}: the header is damaged ({error})") from None
        raise RunLogError(f"{path}: is not a catapult_opt run log") from None
    if header.get("kind") != "header" or header.get("format") != FORMAT:
        raise RunLogError(f"{path}: is not a catapult_opt run log")
    try:
        return _with_defaults(header, path)
    except (ValueError, RecursionError) as error:
        raise RunLogError(f"{path}: {error}") from None


def _with_defaults(header: Record, path: Path) -> Record:
    version = header.get("version")
    if not _is_int(version):
        raise ValueError("the header is damaged (no version)")
    if version > VERSION:  # before anything else: a newer version may mean the other fields differently
        raise ValueError(
            f"is written in version {version} of the format, and this catapult_opt reads up to version {VERSION}: "
            "upgrade it with `pip install --upgrade catapult_opt`"
        )
    defaults: Record = {"name": path.stem, "face": "", "settings": {}, "batch_size": None, "parameters": None}
    defaults["extra_bytes"] = None
    header = {**defaults, "libraries": {}, **{key: item for key, item in header.items() if item is not None}}
    for key, check in _HEADER_FIELDS.items():
        if header[key] is not None and not check(header[key]):
            raise ValueError(f"the header is damaged (field {key!r} is of the wrong type)")
    return {**header, "settings": decode(header["settings"])}


def checked_step(record: Record, least: int) -> int:
    """The step number of a record, at least ``least``."""
    step = record.get("step")
    if not _is_int(step) or not least <= step < MAX_INT:
        raise ValueError(f"{record['kind']} record without a step number")
    return step


def checked_step_record(record: Record) -> Record:
    """A record of kind ``step`` with its numbers as floats."""
    checked_step(record, least=1)
    required = _REQUIRED + (_REQUIRED_IF_MEASURED if "eta_crit" in record else ())
    for key in required:
        if key not in record:
            raise ValueError(f"step record without {key!r}")
    checked = decode(record)
    for key in _STEP_FIELDS.keys() & checked.keys():
        if not _STEP_FIELDS[key](checked[key]):
            raise ValueError(f"step record whose {key!r} is of the wrong type")
        if _STEP_FIELDS[key] is _is_number:
            checked[key] = float(checked[key])
    return dict(checked)


def checked_event(record: Record) -> Record:
    """A record of kind ``event``."""
    checked_step(record, least=0)
    if not isinstance(record.get("event"), str):
        raise ValueError("event record without the event's name")
    return dict(decode(record))


def checked_metrics(record: Record) -> Record:
    """A record of kind ``metrics`` with its values as floats."""
    checked_step(record, least=0)
    values = decode(record.get("values"))
    if not isinstance(values, dict) or not all(_is_number(value) for value in values.values()):
        raise ValueError("metrics record whose values are not numbers")
    return {**record, "values": {key: float(value) for key, value in values.items()}}


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (_is_int(value) and abs(value) < MAX_INT)


def _is_a(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind)


_HEADER_FIELDS: Final[dict[str, Callable[[Any], bool]]] = {
    "name": _is_a(str),
    "face": _is_a(str),
    "settings": _is_a(dict),
    "batch_size": _is_int,
    "parameters": _is_int,
    "extra_bytes": _is_int,
    "libraries": _is_a(dict),
}
_STEP_FIELDS: Final[dict[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("loss", "effective_lr", "eta_crit", "lambda_max", "ntk_lambda_max"), _is_number),
    **dict.fromkeys(("residual", "probe_seconds", "elapsed", "eta_crit_mean", "log_lambda_sd"), _is_number),
    **dict.fromkeys(("matvecs", "age"), _is_int),
    "super_critical": _is_a(bool),
    "phase": _is_a(str),
}
_REQUIRED: Final = ("loss", "effective_lr")
_REQUIRED_IF_MEASURED: Final = ("lambda_max", "super_critical")
