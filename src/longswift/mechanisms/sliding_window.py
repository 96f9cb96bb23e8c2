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

from longswift.core.errors import check_count, check_positive
from longswift.mechanisms.windows import WindowAndGlobals


@dataclass(frozen=True, kw_only=True)
class SlidingWindow(WindowAndGlobals):
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
        check_count("SlidingWindow", global_tokens=self.global_tokens)

    def reach(self, causal: bool) -> tuple[int, int]:
        return (self.window - 1, 0) if causal else (self.window // 2, self.window // 2)

    def globals_of(self, k_len: int) -> Tensor:
        return torch.arange(min(self.global_tokens, k_len), device="cpu")
