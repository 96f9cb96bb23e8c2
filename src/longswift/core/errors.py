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
