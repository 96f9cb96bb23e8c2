"""Rows of a file that somebody may have edited, held against the record they are to become."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints, is_typeddict

from longswift.core.errors import InputError, problem

# What rows are: one record, or a field whose value says which.
Records = type | tuple[str, Mapping[str, type]]
_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "text",
    NoneType: "null",
}


def check_rows(rows: list[dict[str, Any]], records: Records, file: Path) -> None:
    """Check that every row has the fields of its record, with values of their types.

    Args:
        rows: As JSON gives them.
        records: A dataclass or ``TypedDict``, or a field and those of its values.
        file: Where they are from, for the error.

    Raises:
        InputError: Naming the first field that is missing, unknown or of another type.
    """
    for number, row in enumerate(rows):
        wrong = _row(row, records, f"rows[{number}]")
        if wrong is not None:
            expected, at, got = wrong
            raise InputError(
                problem(
                    str(file),
                    expected=f"{expected} in {at}",
                    got=got,
                    fix="Delete the file, or measure again with --fresh.",
                )
            )


# What was expected, where, and what was there instead.
_Wrong = tuple[str, str, str]


def _row(row: dict[str, Any], records: Records, where: str) -> _Wrong | None:
    """What is wrong with one row, or None."""
    if isinstance(records, type):
        return _fields(row, records, where)
    name, known = records
    value = row.get(name)
    if not isinstance(value, str) or value not in known:
        return f"one of {', '.join(known)}", f"{where}.{name}", repr(value)
    return _fields(row, known[value], where)


def _fields(row: Any, record: Any, where: str) -> _Wrong | None:
    """What is wrong with one record, or None."""
    if not isinstance(row, dict):
        return "a record", where, repr(row)
    hints = get_type_hints(record)
    if is_dataclass(record):
        needed = {
            f.name
            for f in fields(record)
            if f.default is MISSING and f.default_factory is MISSING and f.init
        }
    else:
        needed = set(record.__required_keys__)
    for name in sorted(needed - set(row)):
        return f"the field {name!r}", where, "none"
    for name, value in row.items():
        if name not in hints:
            return "fields of this version only", where, repr(name)
        wrong = _value(value, hints[name], f"{where}.{name}")
        if wrong is not None:
            return wrong
    return None


def _value(value: Any, hint: Any, where: str) -> _Wrong | None:
    """What is wrong with a value, or None."""
    if hint is Any:
        return None
    if is_dataclass(hint) or is_typeddict(hint):
        return _fields(value, hint, where)
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        found = [_value(value, part, where) for part in parts]
        if None in found:
            return None
        # Null is never what somebody meant to write; the other kind says more.
        return next(one for one, part in zip(found, parts, strict=True) if part is not NoneType)
    if origin in (list, tuple):
        return _items(value, parts, where, ends=origin is tuple and Ellipsis not in parts)
    if origin is dict:
        if not isinstance(value, dict):
            return "a record", where, repr(value)
        found = [_value(one, parts[1], f"{where}.{name}") for name, one in value.items()]
        return next((one for one in found if one is not None), None)
    return None if _plain(value, hint) else (_NAMES.get(hint, str(hint)), where, repr(value))


def _items(value: Any, parts: tuple[Any, ...], where: str, *, ends: bool) -> _Wrong | None:
    if not isinstance(value, list):
        return "a list", where, repr(value)
    if ends and len(value) != len(parts):
        return f"{len(parts)} values", where, repr(value)
    for number, one in enumerate(value):
        wrong = _value(one, parts[number] if ends else parts[0], f"{where}[{number}]")
        if wrong is not None:
            return wrong
    return None


def _plain(value: Any, hint: Any) -> bool:
    if hint is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)
