"""Errors that say what was expected, what came, and what to do about it."""

from __future__ import annotations


class LongSwiftError(ValueError):
    """Base of every error a user can cause; also a ``ValueError``."""


class ConfigError(LongSwiftError):
    """A mechanism, backend or option was configured with an impossible value."""


class InputError(LongSwiftError):
    """A tensor or file handed to the library has the wrong shape, type or content."""


class UnsupportedError(LongSwiftError):
    """A valid request this mechanism or backend cannot honour; never ignored silently."""


def problem(subject: str, *, expected: str, got: object, fix: str) -> str:
    """One-line message in the form every error of this library has."""
    return f"{subject}: expected {expected}, got {got}. {fix}"


def check_count(owner: str, **values: int) -> None:
    """Raise ``ConfigError`` unless every value is an integer of at least 0."""
    for field_name, value in values.items():
        if type(value) is not int or value < 0:
            raise ConfigError(
                problem(
                    f"{owner}.{field_name}",
                    expected="an integer >= 0",
                    got=repr(value),
                    fix="Use 0 to turn it off.",
                )
            )


def check_positive(owner: str, **values: int) -> None:
    """Raise ``ConfigError`` unless every value is a positive integer."""
    for field_name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(
                problem(
                    f"{owner}.{field_name}",
                    expected="a positive integer",
                    got=repr(value),
                    fix="Give a whole number of at least 1.",
                )
            )
