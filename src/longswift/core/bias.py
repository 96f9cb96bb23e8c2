"""Additions to attention scores that depend on the distance between query and key alone.

A ``PositionBias`` is what a caller passes; a ``ScoreBias`` is what kernels read: one number per
query head and signed distance, ``O(Hq * (Lq + Lk))`` memory. Kernels return gradients to that
table, and autograd carries them on to whatever parameters it was made from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from longswift.core.errors import InputError, problem
from longswift.core.inputs import check_finite
from longswift.core.softmax import accumulator_dtype


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoreBias:
    """The score of the query at position ``p`` and key ``j`` grows by ``[zero + step * j - p]``.

    Attributes:
        values: ``[Hq, S]`` in the accumulator dtype.
        zero: Column of the key at the query's own place.
        step: Positions from one key to the next; more than 1 only where a key stands for several
            tokens, which no band holds.
    """

    values: Tensor
    zero: int
    step: int = 1

    @property
    def requires_grad(self) -> bool:
        """Whether gradients are wanted for the values, and recorded."""
        return self.values.requires_grad and torch.is_grad_enabled()

    def heads(self, heads: Any) -> ScoreBias:
        """The bias of some query heads: a slice or a list."""
        return replace(self, values=self.values[heads])

    def moved(self, by: int) -> ScoreBias:
        """For queries that sit ``by`` positions behind the places the kernel takes them for."""
        return replace(self, zero=self.zero - by)

    def spaced(self, distance: int) -> ScoreBias:
        """For every ``distance``-th query and key, in phase."""
        return replace(
            self,
            values=self.values[:, self.zero % distance :: distance],
            zero=self.zero // distance,
        )

    def rectangle(self, offset: int, rows: int, width: int) -> Tensor:
        """``[Hq, rows, width]`` of neighbouring queries and keys.

        Args:
            offset: Position of the first key minus that of the first query.
            rows: Queries.
            width: Keys.
        """
        first, span = self.zero + offset - rows + 1, rows + width - 1
        line = self.values[:, first : first + span]
        # Row r starts rows - 1 - r columns into the span: a step of one less from row to row.
        spread = line.unsqueeze(1).repeat(1, rows, 1)
        return spread.as_strided((len(line), rows, width), (rows * span, span - 1, 1), rows - 1)

    def rows(self, position: Tensor, keys: int) -> Tensor:
        """``[Hq, P, keys]`` of the queries at ``position [P]`` and the first ``keys`` keys."""
        column = self.step * torch.arange(keys, device=position.device) - position[:, None]
        # Keys that nobody sees may lie beyond the table.
        return self.values[:, (column + self.zero).clamp(0, self.values.shape[1] - 1)]

    def add_rectangle_(self, offset: int, grad: Tensor) -> None:
        """Adds the gradient ``[Hq, rows, width]`` of a ``rectangle`` to these values."""
        heads, rows, width = grad.shape
        span = rows + width - 1
        spread = grad.new_zeros(heads, rows, span)
        view = spread.as_strided(grad.shape, (rows * span, span - 1, 1), rows - 1)
        view.copy_(grad)
        first = self.zero + offset - rows + 1
        self.values[:, first : first + span] += spread.sum(1)

    def places(self, keys: Tensor, position: Tensor) -> Tensor:
        """Where in ``values.flatten()`` every pair lies, ``[B, Hkv, N, G, R, C]``.

        Args:
            keys: ``[B or 1, Hkv or 1, N or 1, C]``.
            position: ``[N, R]`` of the queries of each of ``N`` blocks.
        """
        return self.head_starts(keys.shape[1]) + (
            self.zero + self.step * keys[:, :, :, None, None] - position[:, None, :, None]
        )

    def at(self, keys: Tensor, position: Tensor, run: int = 1) -> Tensor:
        """The bias of every pair, ``[B, Hkv, N, G * R, C * run]``; see ``places``.

        Args:
            keys: As for ``places``; the first of every ``run`` keys.
            position: As for ``places``.
            run: Neighbouring keys, one look-up for all of them; needs values ``beyond(run - 1)``.
        """
        places = self.places(keys, position)
        if run == 1:
            return torch.take(self.values, places).flatten(3, 4)
        runs = self.values.as_strided((self.values.numel() - run + 1, run), (1, 1))
        found = runs.index_select(0, places.flatten())
        return found.view(*places.shape, run).flatten(5).flatten(3, 4)

    def beyond(self, count: int) -> ScoreBias:
        """With ``count`` more columns of zeros, for keys behind the last one."""
        return replace(self, values=torch.nn.functional.pad(self.values, (0, count)))

    def head_starts(self, kv_heads: int) -> Tensor:
        """Where in ``values.flatten()`` each query head begins, ``[Hkv, 1, G, 1, 1]``."""
        heads, length = self.values.shape
        starts = torch.arange(heads, device=self.values.device) * length
        return starts.view(kv_heads, 1, -1, 1, 1)

    def largest(self, count: int, step: int) -> ScoreBias:
        """The maximum over ``count`` neighbouring keys, which start at multiples of ``step``."""
        padded = torch.nn.functional.pad(self.values, (0, count - 1), value=float("-inf"))
        found = torch.nn.functional.max_pool1d(padded, count, 1)
        return replace(self, values=found, step=step)

    def antidiagonals(self, stride: int, beyond: int) -> ScoreBias:
        """Means over the antidiagonals of tiles, by the tile's last query and its first key.

        Keys start at multiples of ``stride``, as far as ``beyond`` keys behind the last one. Over
        the edges of the table its first and last values go on.
        """
        reach, more = stride - 1, 2 * (stride - 1) + beyond
        padded = torch.nn.functional.pad(self.values[None], (reach, more), mode="replicate")[0]
        length = self.values.shape[1] + reach + beyond
        shifted = [padded[:, 2 * s : 2 * s + length] for s in range(stride)]
        found = torch.stack(shifted).mean(0)
        return replace(self, values=found, zero=self.zero + reach, step=stride)

    def mean(self, count: int, step: int) -> ScoreBias:
        """The mean over ``count`` neighbouring keys, which start at multiples of ``step``."""
        sums = self.sums()
        found = (sums[:, count:] - sums[:, :-count]) / count
        return replace(self, values=found.to(self.values.dtype), step=step)

    def sums(self) -> Tensor:
        """Sums of all values before each column, ``[Hq, S + 1]``.

        fp64 where there is such: differences of long fp32 sums lose the small numbers.
        """
        wide = torch.float32 if self.values.device.type == "mps" else torch.float64
        return torch.nn.functional.pad(self.values.to(wide).cumsum(1), (1, 0))


@dataclass(frozen=True, kw_only=True, eq=False)
class PositionBias(ABC):
    """A bias on the scaled scores, by query head and signed distance.

    Distances count real tokens. Instances are immutable; tensors in them may require gradients.
    """

    name: ClassVar[str]

    @abstractmethod
    def values(self, offset: Tensor, heads: int) -> Tensor:
        """The bias at some signed distances, differentiable with respect to its parameters.

        Args:
            offset: int64 ``[S]``, key position minus query position: negative for the past.
            heads: Query heads.

        Returns:
            ``[heads, S]``, finite, any floating dtype.

        Raises:
            InputError: The bias was made for another number of heads.
        """

    def scores(self, q: Tensor, k: Tensor) -> ScoreBias:
        """The table for a call with ``q [B, Hq, Lq, D]`` and ``k [B, Hkv, Lk, D]``, and its parts.

        Raises:
            InputError: Another number of heads, another device, or NaN.
        """
        heads, q_len, k_len = q.shape[1], q.shape[2], k.shape[2]
        offset = torch.arange(1 - k_len, q_len, device=q.device)
        values = self.values(offset, heads).to(accumulator_dtype(q.dtype))
        if tuple(values.shape) != (heads, len(offset)) or values.device != q.device:
            raise InputError(
                problem(
                    f"bias {self.name!r}",
                    expected=f"values {(heads, len(offset))} on {q.device}",
                    got=f"{tuple(values.shape)} on {values.device}",
                    fix="Give one row of values per query head, on the device of the queries.",
                )
            )
        check_finite(bias=values)
        return ScoreBias(values=values, zero=k_len - 1)
