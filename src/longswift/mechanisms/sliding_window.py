"""Sliding-window attention with optional global tokens.

Causal, window 3, one global token (rows are queries)::

    x . . . . .
    x x . . . .
    x x x . . .
    x x x x . .        the window is the query and the 2 keys before it;
    x . x x x .        token 0 is global
    x . . x x x

| | time | memory beyond inputs and output |
|---|---|---|
| forward, backward | O(L * (window + globals) * D) | O(L) |

Longformer (Beltagy et al., 2020, arXiv 2004.05150); windows inclusive of the query itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from longswift.core.errors import ConfigError, problem
from longswift.core.mechanism import Call, check_positive
from longswift.core.pattern import Band, BlockPattern
from longswift.core.types import AttentionResult
from longswift.kernels import dispatch
from longswift.mechanisms.full import full_pattern
from longswift.mechanisms.patterned import Patterned, pattern_stats

_BLOCK = 64


@dataclass(frozen=True, kw_only=True)
class SlidingWindow(Patterned):
    """Each query sees a window of keys around it, and the first ``global_tokens`` real tokens.

    Attributes:
        window: Causal: the query and the ``window - 1`` keys before it. Bidirectional: keys with
            ``|i - j| <= window // 2``.
        global_tokens: Leading tokens seen by every query; in bidirectional attention they also
            see every key.
    """

    name: ClassVar[str] = "sliding_window"

    window: int = 512
    global_tokens: int = 0

    def __post_init__(self) -> None:
        check_positive("SlidingWindow", window=self.window)
        if type(self.global_tokens) is not int or self.global_tokens < 0:
            raise ConfigError(
                problem(
                    "SlidingWindow.global_tokens",
                    expected="an integer >= 0",
                    got=repr(self.global_tokens),
                    fix="Give the number of leading tokens every query should see.",
                )
            )

    def pattern(self, q_len: int, k_len: int, kv_heads: int, causal: bool) -> BlockPattern:
        reach = (self.window - 1, 0) if causal else (self.window // 2, self.window // 2)
        tile = _BLOCK if self.window <= 2 * _BLOCK else min(256, self.window // _BLOCK * _BLOCK)
        band = Band(tile=tile, left=reach[0], right=reach[1], reach=reach)
        if self.global_tokens == 0:
            return BlockPattern(causal=causal, bands=(band,) * kv_heads, block=_BLOCK)
        offset = k_len - q_len
        first, last = offset // _BLOCK, (k_len - 1) // _BLOCK
        starts = torch.arange(first, last + 1, device="cpu") * _BLOCK
        tokens = torch.arange(min(self.global_tokens, k_len), device="cpu")
        tokens = tokens.expand(len(starts), -1)
        # Per row: a global token is gathered exactly where the window has moved past it.
        leaves = tokens + reach[0] + 1
        tokens = torch.where(leaves < starts[:, None] + _BLOCK, tokens, -1)
        visible_from = leaves.clamp(min=0)
        shape = (1, kv_heads, len(starts), tokens.shape[1])
        return BlockPattern(
            causal=causal,
            bands=(band,) * kv_heads,
            block=_BLOCK,
            tokens=tokens.expand(shape),
            visible_from=visible_from.expand(shape),
        )

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> AttentionResult:
        result = super()._forward(q, k, v, call)
        rows = self._global_rows(q.shape[2], call.causal)
        if rows == 0:
            return result
        name, backend = dispatch.resolve(call.backend, q.device, q, k, v)
        exact = backend.attend(
            q[:, :, :rows], k, v, full_pattern(k.shape[2], k.shape[1], False), call.scale
        )
        out = torch.cat([exact.out, result.out[:, :, rows:]], 2)
        lse = torch.cat([exact.lse, result.lse[:, :, rows:]], 2)
        pattern = self.pattern(q.shape[2], k.shape[2], k.shape[1], call.causal)
        size = q.shape[2], k.shape[2]
        stats = pattern_stats(self.name, name, self.mode, pattern, *size, exact_rows=rows)
        return AttentionResult(out, lse, stats)

    def _visible(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        seen = super()._visible(q, k, call)
        rows = self._global_rows(q.shape[2], call.causal)
        seen[:, :, :rows] = True
        return seen

    def _global_rows(self, q_len: int, causal: bool) -> int:
        return 0 if causal else min(self.global_tokens, q_len)
