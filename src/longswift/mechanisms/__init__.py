"""THE table of mechanisms: one line each. Tests, CLI and HF names all come from it."""

from __future__ import annotations

from typing import Any

from longswift.core.mechanism import Mechanism
from longswift.core.registry import Registry

MECHANISMS: Registry[Mechanism] = Registry(
    "mechanism",
    {
        "full": "longswift.mechanisms.full:Full",
        "sliding_window": "longswift.mechanisms.sliding_window:SlidingWindow",
        "ms_swift": "longswift.mechanisms.ms_swift:MSSwift",
        "longformer": "longswift.mechanisms.longformer:Longformer",
        "bigbird": "longswift.mechanisms.bigbird:BigBird",
        "bigbird_tokens": "longswift.mechanisms.bigbird_tokens:BigBirdTokens",
        "block_sparse": "longswift.mechanisms.block_sparse:BlockSparse",
        "dilated_window": "longswift.mechanisms.dilated_window:DilatedWindow",
        "chunked": "longswift.mechanisms.chunked:Chunked",
        "hierarchical": "longswift.mechanisms.hierarchical:Hierarchical",
        "linear": "longswift.mechanisms.linear:Linear",
        "efficient": "longswift.mechanisms.efficient:Efficient",
        "performer": "longswift.mechanisms.performer:Performer",
        "nystrom": "longswift.mechanisms.nystrom:Nystrom",
    },
    entry_point_group="longswift.mechanisms",
)


def list_mechanisms() -> list[str]:
    """Names of every mechanism, those of installed plug-ins included."""
    return MECHANISMS.names()


def get_mechanism(name: str, **config: Any) -> Mechanism:
    """The mechanism ``name`` with these options.

    Raises:
        ConfigError: Unknown name, unknown option, or an impossible value.
    """
    return MECHANISMS.build(name, config)


def from_dict(config: dict[str, Any]) -> Mechanism:
    """Inverse of ``Mechanism.to_dict``."""
    return MECHANISMS.from_dict(config)
