"""Full attention, computed blockwise: exact, quadratic time, linear memory.

Every query sees every key (causal: every key up to its own position).

| | time | memory beyond inputs and output |
|---|---|---|
| forward, backward | O(Lq * Lk * D) | O(Lq) |

FlashAttention's tiling (Dao et al., 2022, arXiv 2205.14135) is what makes the memory linear.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from longswift.core.pattern import BlockPattern
from longswift.core.types import AttentionResult
from longswift.mechanisms.patterned import Patterned, attend_at_once, full_pattern


@dataclass(frozen=True, kw_only=True)
class Full(Patterned):
    """Exact softmax attention over all keys; the judge of every other mechanism."""

    name: ClassVar[str] = "full"
    mode: ClassVar[str] = "dense"
    supports_cross: ClassVar[bool] = True

    def _at_once(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool,
        scale: float | None,
        backend: str,
        summarised: bool,
    ) -> AttentionResult | None:
        return attend_at_once(self.name, q, k, v, causal, scale, backend)

    def pattern(self, q_len: int, k_len: int, kv_heads: int, causal: bool) -> BlockPattern:
        return full_pattern(k_len, kv_heads, causal, q_len=q_len)
