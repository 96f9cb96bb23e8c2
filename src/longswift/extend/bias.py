"""Position biases: ALiBi, and learned values by bucketed or clipped distance.

They are passed to a call, ``mechanism(q, k, v, bias=ALiBi())``, and added to the scaled scores. All
of them depend on the signed distance between key and query alone.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from longswift.core.bias import PositionBias
from longswift.core.errors import ConfigError, InputError, problem


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """The published slopes of ``heads`` query heads.

    For a power of two ``n``: ``2 ** (-8 k / n)`` for ``k = 1 .. n``. Otherwise those of the next
    smaller power of two, and then every other slope of the next larger one, from its first on.

    Raises:
        ConfigError: No head.
    """
    if type(heads) is not int or heads < 1:
        raise ConfigError(
            problem(
                "alibi_slopes",
                expected="a positive number of heads",
                got=repr(heads),
                fix="Give the number of query heads.",
            )
        )
    power = 1 << (heads.bit_length() - 1)
    first = [2.0 ** (-8.0 * k / power) for k in range(1, power + 1)]
    between = [2.0 ** (-4.0 * k / power) for k in range(1, 2 * power, 2)]
    return (*first, *between[: heads - power])


@dataclass(frozen=True, kw_only=True, eq=False)
class ALiBi(PositionBias):
    """Attention with linear biases: ``-slope * |distance|``.

    Press et al., 2022, arXiv 2108.12409. Bidirectional attention takes the absolute distance.

    Attributes:
        slopes: One per query head: numbers, or a tensor ``[Hq]`` that may be trained. None: the
            published ones (``alibi_slopes``). A slope of 0 leaves a head without positions.
    """

    name: ClassVar[str] = "alibi"

    slopes: Sequence[float] | Tensor | None = None

    def __post_init__(self) -> None:
        slopes = self.slopes
        if slopes is None:
            return
        if isinstance(slopes, Tensor):
            if slopes.dim() != 1 or not slopes.is_floating_point():
                got = f"{slopes.dtype} {tuple(slopes.shape)}"
                raise _impossible("ALiBi.slopes", "a float tensor [Hq]", got)
            return
        if not isinstance(slopes, Sequence) or not all(map(_is_finite, slopes)):
            raise _impossible("ALiBi.slopes", "finite numbers, one per query head", slopes)
        object.__setattr__(self, "slopes", tuple(slopes))

    def values(self, offset: Tensor, heads: int) -> Tensor:
        slopes = alibi_slopes(heads) if self.slopes is None else self.slopes
        if len(slopes) != heads:
            raise _other_heads("ALiBi.slopes", len(slopes), heads)
        if not isinstance(slopes, Tensor):
            # Distances of long texts need more digits than fp32 has once they are scaled.
            wide = torch.float32 if offset.device.type == "mps" else torch.float64
            slopes = torch.tensor(slopes, dtype=wide, device=offset.device)
        return -slopes[:, None] * offset.abs()


@dataclass(frozen=True, kw_only=True, eq=False)
class RelativeBias(PositionBias):
    """Learned values, one row of a table per bucket of distances.

    Attributes:
        table: ``[buckets, Hq]``, floating; gradients reach it.
    """

    table: Tensor

    def __post_init__(self) -> None:
        table = self.table
        if not isinstance(table, Tensor) or table.dim() != 2 or not table.is_floating_point():
            got = tuple(table.shape) if isinstance(table, Tensor) else type(table).__name__
            raise _impossible(f"{type(self).__name__}.table", "a float tensor [buckets, Hq]", got)

    @abstractmethod
    def buckets(self, offset: Tensor) -> Tensor:
        """Row of the table for each signed distance, int64."""

    def values(self, offset: Tensor, heads: int) -> Tensor:
        if self.table.shape[1] != heads:
            raise _other_heads(f"{type(self).__name__}.table", self.table.shape[1], heads)
        return self.table.index_select(0, self.buckets(offset)).t()


@dataclass(frozen=True, kw_only=True, eq=False)
class ClippedBias(RelativeBias):
    """A value for every distance up to a limit, and the last one beyond it.

    Distances ``-c .. c`` for a table of ``2 c + 1`` rows (an odd number), in this order: row 0 is a
    key ``c`` or more places *before* the query. Clipped as in Shaw et al., 2018, arXiv 1803.02155.
    """

    name: ClassVar[str] = "clipped"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.table.shape[0] % 2 == 0:
            raise _impossible(
                "ClippedBias.table", "2 c + 1 rows, for distances -c .. c", self.table.shape[0]
            )

    def buckets(self, offset: Tensor) -> Tensor:
        limit = self.table.shape[0] // 2
        return offset.clamp(-limit, limit) + limit


@dataclass(frozen=True, kw_only=True, eq=False)
class T5Bias(RelativeBias):
    """T5's buckets: short distances one by one, longer ones on a logarithmic scale.

    Raffel et al., 2020, arXiv 1910.10683. A decoder's table uses all rows for the past; an
    encoder's uses the upper half of its rows for keys after the query.

    Attributes:
        bidirectional: Whether keys after the query have rows of their own. Without, they share the
            row of distance 0.
        max_distance: Distances from here on share the last row.
    """

    name: ClassVar[str] = "t5"

    bidirectional: bool = False
    max_distance: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        rows = self.table.shape[0]
        if rows < 2 or self.bidirectional and rows % 2:
            raise _impossible("T5Bias.table", "2 rows or more, even if bidirectional", rows)
        if type(self.max_distance) is not int or self.max_distance <= self._exact:
            raise _impossible(
                "T5Bias.max_distance",
                f"more than the {self._exact} distances that have rows of their own",
                self.max_distance,
            )

    @property
    def _rows(self) -> int:
        """Rows of one direction."""
        return self.table.shape[0] // 2 if self.bidirectional else self.table.shape[0]

    @property
    def _exact(self) -> int:
        return self._rows // 2

    def buckets(self, offset: Tensor) -> Tensor:
        distance = offset.abs() if self.bidirectional else (-offset).clamp(min=0)
        exact, rows = self._exact, self._rows
        # fp32 and this order of operations: at the borders of buckets rounding decides.
        share = torch.log(distance.clamp(min=1).float() / max(exact, 1))
        share = share / math.log(self.max_distance / max(exact, 1)) * (rows - exact)
        far = (exact + share.long()).clamp(max=rows - 1)
        bucket = torch.where(distance < exact, distance, far)
        return bucket + rows * (offset > 0) if self.bidirectional else bucket


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _impossible(name: str, expected: str, got: object) -> ConfigError:
    return ConfigError(
        problem(name, expected=expected, got=got, fix="See the documentation of the class.")
    )


def _other_heads(name: str, got: int, heads: int) -> InputError:
    return InputError(
        problem(
            name,
            expected=f"values for {heads} query heads",
            got=got,
            fix="Biases belong to query heads, not to key/value heads.",
        )
    )
