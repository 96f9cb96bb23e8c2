"""BigBird described token by token: a band, global tokens, and a share of random positions.

Bidirectional, ``window=3, global_tokens=1``, ``r`` drawn with probability ``random_ratio``::

    g g g g g g g
    g x x . r . .
    g x x x . . r
    g . x x x . .
    g r . x x x .
    g . . r x x x
    g . r . . x x

| | time | memory beyond inputs and output |
|---|---|---|
| forward, backward | O(L * (window + globals + random_ratio * L) * D) | O(random_ratio * L^2) |

Whether query ``i`` of a KV head sees key ``j`` is a function of (seed, head, i, j) alone, so that
training, evaluation, a longer text and decoding see the same keys. Every row gathers its own list:
nothing outside it is computed, but a share of a quadratic amount is still quadratic. ``bigbird``
draws whole blocks and is linear.

Big Bird (Zaheer et al., 2020, arXiv 2007.14062), the graph before it is made of blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longswift.core.draws import uniform
from longswift.core.errors import ConfigError, check_count, check_positive, problem
from longswift.core.pattern import BlockPattern
from longswift.mechanisms.patterned import Patterned
from longswift.mechanisms.sliding_window import SlidingWindow

# Pairs of one head that are drawn at once: 8 MiB of numbers.
_PAIRS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class BigBirdTokens(Patterned):
    """Window, random and global keys for every single query.

    Attributes:
        window: As in ``sliding_window``: causal, the query and the ``window - 1`` keys before it;
            bidirectional, keys with ``|i - j| <= window // 2``.
        random_ratio: Share of all other keys that a query sees, on average.
        global_tokens: Leading tokens seen by every query; in bidirectional attention they also see
            every key.
        seed: Of the random positions.
    """

    name: ClassVar[str] = "bigbird_tokens"

    window: int = 129
    random_ratio: float = 0.15
    global_tokens: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive("BigBirdTokens", window=self.window)
        check_count("BigBirdTokens", global_tokens=self.global_tokens, seed=self.seed)
        ratio = self.random_ratio
        if not isinstance(ratio, int | float) or ratio is True or not 0.0 <= ratio <= 1.0:
            raise ConfigError(
                problem(
                    "BigBirdTokens.random_ratio",
                    expected="a share from 0 to 1",
                    got=repr(ratio),
                    fix="For example random_ratio=0.15.",
                )
            )

    def pattern(self, q_len: int, k_len: int, kv_heads: int, causal: bool) -> BlockPattern:
        window = SlidingWindow(window=self.window)
        band = window.pattern(q_len, k_len, 1, causal).bands[0]
        reach = window.reach(causal)
        heads = [self._tokens(head, q_len, k_len, causal, reach) for head in range(kv_heads)]
        width = max(tokens.shape[1] for tokens in heads)
        padded = [
            np.pad(tokens, ((0, 0), (0, width - tokens.shape[1])), constant_values=-1)
            for tokens in heads
        ]
        return BlockPattern(
            causal=causal,
            bands=(band,) * kv_heads,
            block=1,
            tokens=torch.from_numpy(np.stack(padded)).unsqueeze(0),
        )

    def full_rows(self, k_len: int) -> Tensor | None:
        rows = torch.arange(min(self.global_tokens, k_len), device="cpu")
        return rows if len(rows) else None

    def _tokens(
        self, head: int, q_len: int, k_len: int, causal: bool, reach: tuple[int, int]
    ) -> NDArray[np.int32]:
        """Keys outside the window that each query of a head sees, ``[Lq, C]``, -1 for none."""
        key, found = np.arange(k_len), []
        rows_at_once = max(1, _PAIRS // k_len)
        for first in range(k_len - q_len, k_len, rows_at_once):
            row = np.arange(first, min(first + rows_at_once, k_len))[:, None]
            seen = uniform(self.seed, head, row, key) < self.random_ratio
            seen |= key < self.global_tokens
            outside = key < row - reach[0]
            if not causal:
                outside |= key > row + reach[1]
                # These rows see every key anyway.
                outside &= row >= self.global_tokens
            seen &= outside
            found.append(np.argwhere(seen) + np.array([first - (k_len - q_len), 0]))
        pairs = np.concatenate(found)
        count = np.bincount(pairs[:, 0], minlength=q_len)
        slot = np.arange(len(pairs)) - np.repeat(np.cumsum(count) - count, count)
        tokens = np.full((q_len, count.max()), -1, dtype=np.int32)
        tokens[pairs[:, 0], slot] = pairs[:, 1]
        return tokens
