"""Results on disk: one JSON line a case, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from catapult_opt import __version__
from catapult_opt.runlog import decode, encode

from .artefact import Artefact, Case, Record, Setting

__all__ = ["Results", "ResultsError", "case_key"]

_FORMAT = "catapult_opt-results"
_VERSION = 1


class ResultsError(ValueError):
    """Results cannot be read, or belong to something else; says what to do."""


def case_key(case: Case) -> str:
    """Equal for equal cases."""
    return json.dumps(encode(case), sort_keys=True)


class Results:
    """The results file of one artefact in one setting: a header, then a record a case.

    A last line that an interruption cut off, and any other line that cannot be read, is dropped and listed in
    ``dropped``: its case is run again.

    Args:
        path: the file, made on the first `add`.
        artefact: whose results these are.
        setting: all of it but "seeds" has to be that of the file, so that results of different settings never mix.

    Raises:
        ResultsError: the file is of another artefact, setting or format.
    """

    def __init__(self, path: Path, artefact: Artefact, setting: Setting) -> None:
        self.path = path
        self.dropped: list[str] = []
        self._records: dict[str, Record] = {}
        owner = artefact.shares or artefact.name
        fixed = {key: value for key, value in setting.items() if key != "seeds"}
        self._header = {"format": _FORMAT, "version": _VERSION, "artefact": owner, "setting": fixed}
        if path.exists():
            self._read()

    def get(self, case: Case) -> Record | None:
        return self._records.get(case_key(case))

    def add(self, record: Record) -> None:
        """Write a record through to the disk.

        Raises:
            TypeError: the result is not made of plain numbers, strings, lists and dicts.
        """
        _check_plain(record, "record")
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            libraries = {"catapult_opt": __version__, "torch": torch.__version__}
            self._append({**self._header, "libraries": libraries})
        self._append(record)
        self._records[case_key(record["case"])] = _as_read(record)

    def _append(self, record: Mapping[str, Any]) -> None:
        with open(self.path, "ab") as file:
            file.write(_line(record))
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> None:
        data = self.path.read_bytes()
        first, *rest = data.split(b"\n")
        self._check_header(first)
        kept = [first]
        for number, line in enumerate(rest, start=2):
            try:
                record = decode(json.loads(line)) if line else None
                if record is not None:
                    self._records[case_key(record["case"])] = {**record, "result": dict(record["result"])}
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                self.dropped.append(f"line {number} is cut off or damaged")
        if self.dropped or not data.endswith(b"\n"):  # what is appended next must start on a line of its own
            temporary = self.path.with_suffix(".tmp")
            temporary.write_bytes(b"".join(line + b"\n" for line in kept))
            temporary.replace(self.path)

    def _check_header(self, line: bytes) -> None:
        try:
            header = decode(json.loads(line))
            known = header["format"] == _FORMAT and isinstance(header["setting"], dict)
        except (ValueError, KeyError, TypeError):
            known = False
        if not known:
            raise ResultsError(f"{self.path}: is not a results file; delete it or choose another --out")
        if header.get("version") != _VERSION or header.get("artefact") != self._header["artefact"]:
            raise ResultsError(
                f"{self.path}: holds results of {header.get('artefact')} in version {header.get('version')}; "
                "choose another --out"
            )
        here = _as_read(self._header)["setting"]
        differences = [
            f"{key} {_shown(header['setting'], key)} there, {_shown(here, key)} here"
            for key in sorted({*here, *header["setting"]})
            if _shown(here, key) != _shown(header["setting"], key)
        ]
        if differences:
            raise ResultsError(
                f"{self.path}: holds results of another setting ({'; '.join(differences)}), and they are not mixed: "
                "choose another --out, or delete the file"
            )


def _check_plain(value: Any, where: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_plain(item, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_plain(item, f"{where}[...]")
    elif value is not None and not isinstance(value, (bool, int, float, str)):
        raise TypeError(f"{where} is a {type(value).__name__}: results are plain numbers, strings, lists and dicts")


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(encode(dict(record)), allow_nan=False, separators=(",", ":")).encode() + b"\n"


def _as_read(record: Mapping[str, Any]) -> dict[str, Any]:
    """What comes back from the file: tuples are lists, whole keys are strings, whether just run or read again."""
    read: dict[str, Any] = decode(json.loads(_line(record)))
    return read


def _shown(setting: Mapping[str, Any], key: str) -> str:
    return json.dumps(encode(setting[key])) if key in setting else "(not given)"
