"""Longformer: a window with its own reach to either side, and global tokens anywhere.

Bidirectional, ``left=1, right=1``, token 2 global (rows are queries)::

    x x x . . .
    x x x . . .
    x x x x x x        the global token sees everything,
    . x x x . .        and everything sees it
    . . x x x x
    . . x . x x

| | time | memory beyond inputs and output |
|---|---|---|
| forward, backward | O(L * (left + right + 2 globals) * D) | O(L) |

Longformer (Beltagy et al., 2020, arXiv 2004.05150). The causal form is not in the paper: nothing
right of the query is seen, a query sees the global tokens before it, and a global token sees what
any other token at its place would, so that a longer text changes nothing in its beginning.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from longswift.core.errors import ConfigError, check_count, problem
from longswift.core.mechanism import Call, Mechanism
from longswift.core.softmax import accumulator_dtype
from longswift.core.types import AttentionResult
from longswift.mechanisms.full import Full
from longswift.mechanisms.windows import WindowAndGlobals


@dataclass(frozen=True, kw_only=True)
class Longformer(WindowAndGlobals):
    """A window around every query, and global tokens that see and are seen by everything.

    Attributes:
        left: Keys seen before the query.
        right: Keys seen after the query; causal attention sees none of them.
        global_tokens: Leading real tokens that are global.
        global_positions: More global tokens, counted from the row's first real token. Those
            beyond the end of a row do not exist there.
    """

    name: ClassVar[str] = "longformer"

    left: int = 256
    right: int = 256
    global_tokens: int = 1
    global_positions: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_count(
            "Longformer", left=self.left, right=self.right, global_tokens=self.global_tokens
        )
        positions = self.global_positions
        if not isinstance(positions, Iterable) or not all(
            type(p) is int and p >= 0 for p in positions
        ):
            raise ConfigError(
                problem(
                    "Longformer.global_positions",
                    expected="positions of tokens, integers >= 0",
                    got=repr(positions),
                    fix="For example global_positions=(0, 512).",
                )
            )
        object.__setattr__(self, "global_positions", tuple(sorted(set(positions))))

    def reach(self, causal: bool) -> tuple[int, int]:
        return self.left, 0 if causal else self.right

    def globals_of(self, k_len: int) -> Tensor:
        found = {*range(min(self.global_tokens, k_len)), *self.global_positions}
        return torch.tensor(sorted(p for p in found if p < k_len), dtype=torch.int64, device="cpu")


def attend_with_global_projections(
    mechanism: WindowAndGlobals,
    local: tuple[Tensor, Tensor, Tensor],
    projected: tuple[Tensor, Tensor, Tensor],
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> AttentionResult:
    """Bidirectional attention whose global rows have queries, keys and values of their own.

    This is Longformer as published: local rows see the window and the global tokens through the
    ordinary projections, the rows of global tokens see every key through separate ones.

    Args:
        mechanism: Which tokens are global, and the window.
        local: ``q [B, Hq, L, D]``, ``k, v [B, Hkv, L, *]`` of the ordinary projections.
        projected: The same of the separate projections; only the queries of global tokens count.
        key_mask: bool ``[B, L]``, True = real token.
        scale: Factor on the scores, ``D ** -0.5`` when None.
        backend: As for a mechanism.

    Raises:
        InputError: Wrong shapes, dtypes or devices.
    """
    result = mechanism(*local, causal=False, key_mask=key_mask, scale=scale, backend=backend)
    rows = _GlobalRows(of=mechanism)(
        *projected, causal=False, key_mask=key_mask, scale=scale, backend=backend
    )
    is_global = rows.lse > float("-inf")
    return AttentionResult(
        torch.where(is_global[..., None], rows.out, result.out),
        torch.where(is_global, rows.lse, result.lse),
        result.stats,
    )


@dataclass(frozen=True, kw_only=True)
class _GlobalRows(Mechanism):
    """Rows of global tokens attend to every key, the others to none."""

    name: ClassVar[str] = "longformer_global_rows"
    supports_causal: ClassVar[bool] = False

    of: WindowAndGlobals

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> AttentionResult:
        rows = self.of.globals_of(k.shape[2]).to(q.device)
        if len(rows) == 0:
            return self._nothing(q, k, v)
        full = Full()._forward(q.index_select(2, rows), k, v, call)
        out = q.new_zeros(*q.shape[:3], v.shape[3])
        lse = torch.full(
            q.shape[:3], float("-inf"), dtype=accumulator_dtype(q.dtype), device=q.device
        )
        return AttentionResult(
            out.index_copy(2, rows, full.out), lse.index_copy(2, rows, full.lse), full.stats
        )

    def _visible(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        seen = torch.zeros(1, q.shape[1], q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        return seen.index_fill(2, self.of.globals_of(k.shape[2]).to(q.device), True)
