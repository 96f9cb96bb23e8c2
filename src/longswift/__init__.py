"""LongSwift: long context for the Transformers models people already have.

Importing the package adds almost nothing to ``import torch`` and patches nothing; names are
resolved on first use. ``import longswift.hf`` registers the mechanisms with Transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longswift.core.errors import (
        ConfigError,
        InputError,
        LongSwiftError,
        UnsupportedError,
    )
    from longswift.core.mechanism import Mechanism
    from longswift.core.types import AttentionResult, AttentionStats
    from longswift.mechanisms import from_dict, get_mechanism, list_mechanisms
    from longswift.mechanisms.full import Full
    from longswift.mechanisms.ms_swift import MSSwift
    from longswift.mechanisms.sliding_window import SlidingWindow

__version__ = "0.1.0"

_HOMES = {
    "AttentionResult": "longswift.core.types",
    "AttentionStats": "longswift.core.types",
    "ConfigError": "longswift.core.errors",
    "Full": "longswift.mechanisms.full",
    "InputError": "longswift.core.errors",
    "LongSwiftError": "longswift.core.errors",
    "MSSwift": "longswift.mechanisms.ms_swift",
    "Mechanism": "longswift.core.mechanism",
    "SlidingWindow": "longswift.mechanisms.sliding_window",
    "UnsupportedError": "longswift.core.errors",
    "from_dict": "longswift.mechanisms",
    "get_mechanism": "longswift.mechanisms",
    "list_mechanisms": "longswift.mechanisms",
}

__all__ = [
    "AttentionResult",
    "AttentionStats",
    "ConfigError",
    "Full",
    "InputError",
    "LongSwiftError",
    "MSSwift",
    "Mechanism",
    "SlidingWindow",
    "UnsupportedError",
    "__version__",
    "from_dict",
    "get_mechanism",
    "list_mechanisms",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'longswift' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
