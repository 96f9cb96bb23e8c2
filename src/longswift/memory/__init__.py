"""What is kept of the past: growing keys and values, and attention with a memory of its own.

A *memory* is attention that has parameters or carries state from segment to segment, so it is a
``torch.nn.Module`` and not a row of the table of mechanisms. Its configuration is a frozen
dataclass with a name, found again through the table here.
"""

from __future__ import annotations

from typing import Any

from longswift.core.registry import Registry
from longswift.memory.base import MemoryConfig

MEMORIES: Registry[MemoryConfig] = Registry(
    "memory",
    {
        "infini": "longswift.memory.compressive:Infini",
        "transformer_xl": "longswift.memory.segment:TransformerXL",
    },
    entry_point_group="longswift.memories",
)


def list_memories() -> list[str]:
    """Names of every memory, those of installed plug-ins included."""
    return MEMORIES.names()


def get_memory(name: str, **config: Any) -> MemoryConfig:
    """The configuration ``name`` with these options.

    Raises:
        ConfigError: Unknown name, unknown option, or an impossible value.
    """
    return MEMORIES.build(name, config)


def memory_from_dict(config: dict[str, Any]) -> MemoryConfig:
    """Inverse of ``MemoryConfig.to_dict``."""
    return MEMORIES.from_dict(config)
