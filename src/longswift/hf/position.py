"""Position biases of ``LongSwiftLM``'s layers: a module beside the projections, read by attention.

Transformers' own models with such biases do not come here: BLOOM, MPT and Falcon compute attention
in code of their own, and the T5 family hands over a dense matrix, which is refused.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn

from longswift.core.bias import PositionBias
from longswift.core.errors import ConfigError, problem
from longswift.extend.bias import ALiBi, T5Bias

# Name of the module in an attention layer, hence of its parameters in a checkpoint.
PLACE = "position_bias"
POSITIONS = ("rope", "none", "alibi", "t5")


class LayerBias(nn.Module, ABC):
    """What one layer adds to its scores."""

    @abstractmethod
    def bias(self) -> PositionBias:
        """The bias, with gradients to the parameters of this module."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Put the parameters, if any, to their initial values."""


class LinearBias(LayerBias):
    """ALiBi with the published slopes; nothing is learned."""

    def bias(self) -> PositionBias:
        return ALiBi()

    def reset_parameters(self) -> None:
        return None


class BucketBias(LayerBias):
    """T5's buckets of a decoder, a table per layer.

    Args:
        heads: Query heads.
        buckets: Rows of the table.
        max_distance: Distances from here on share the last row.
        std: Standard deviation of the initial values.
    """

    def __init__(self, heads: int, buckets: int, max_distance: int, std: float) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(buckets, heads))
        self.max_distance, self.std = max_distance, std
        self.bias()
        self.reset_parameters()

    def bias(self) -> PositionBias:
        return T5Bias(table=self.table, max_distance=self.max_distance)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.table, std=self.std)


def layer_bias(config: Any) -> LayerBias | None:
    """A new module for a layer of a ``LongSwiftConfig``; None if nothing is added to scores."""
    if config.position == "alibi":
        return LinearBias()
    if config.position == "t5":
        return BucketBias(
            config.num_attention_heads,
            getattr(config, "relative_attention_num_buckets", 32),
            getattr(config, "relative_attention_max_distance", 128),
            config.initializer_range,
        )
    return None


def bias_of(layer: nn.Module) -> PositionBias | None:
    """The bias of an attention layer of this library, None for any other layer."""
    found = getattr(layer, PLACE, None)
    return found.bias() if isinstance(found, LayerBias) else None


def read_position(
    position: str | None, rope: bool | None, rotated: list[int] | None, layers: int
) -> tuple[str, list[int]]:
    """Where positions come from, and which layers are rotated (1) or not (0).

    Args:
        position: One of ``POSITIONS``, or None.
        rope: The older way to say ``"rope"`` or ``"none"``.
        rotated: ``no_rope_layers`` as given.
        layers: Number of layers.

    Raises:
        ConfigError: Unknown, or two answers that contradict one another.
    """
    if position is None:
        still = rope is None and rotated is not None and not any(rotated)
        position = "none" if rope is False or still else "rope"
    elif position not in POSITIONS:
        raise _refusal(f"one of {', '.join(POSITIONS)}", repr(position))
    elif rope is not None and rope != (position == "rope"):
        raise _refusal("position and rope to agree", f"position={position!r}, rope={rope}")
    if rope is not None or rotated is None:
        rotated = [int(position == "rope")] * layers
    if position != "rope" and any(rotated):
        raise _refusal(f"no rotated layer beside {position!r}", f"no_rope_layers={rotated}")
    return position, rotated


def _refusal(expected: str, got: str) -> ConfigError:
    fix = "For example position='alibi', and neither rope nor no_rope_layers."
    return ConfigError(problem("position", expected=expected, got=got, fix=fix))
