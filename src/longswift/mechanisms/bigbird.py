"""BigBird: blocks of keys in a window, at random, and global ones.

Bidirectional, one head, one letter a block of ``block`` x ``block`` tokens: ``w`` window, ``g``
global, ``r`` random (``random_blocks=1``, ``window_blocks=3``, ``global_blocks=1``)::

    g g g g g g g
    g w w . r . .
    g w w w . . r
    g . w w w r .
    g r . w w w .
    g . . r w w w
    g . r . . w w

Causal attention is this picture below the diagonal, with the random blocks drawn among those before
the window. Every KV head draws its own, and so does every row of blocks, as a function of (seed,
head, row) alone: training, evaluation, a longer text and decoding see the same blocks.

| | time | memory beyond inputs and output |
|---|---|---|
| forward, backward | O(L * seen blocks * block * D) | O(L * (random + global blocks)) |

Big Bird (Zaheer et al., 2020, arXiv 2007.14062); the causal form is not in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from longswift.core.blocks import tokens_of_blocks
from longswift.core.draws import distinct
from longswift.core.errors import ConfigError, check_count, check_positive, problem
from longswift.core.pattern import Band, BlockPattern
from longswift.mechanisms.patterned import Patterned


@dataclass(frozen=True, kw_only=True)
class BigBird(Patterned):
    """Window, random and global blocks of keys for every block of queries.

    Attributes:
        block: Tokens per block; blocks are counted from the row's first real token.
        random_blocks: Random blocks of keys per block of queries, never one that is seen anyway.
        window_blocks: Neighbouring blocks, the query's own in the middle; odd. Causal attention
            keeps those that are not after it.
        global_blocks: Leading blocks that see and are seen by everything (in causal attention: are
            seen by everything after them).
        last_global_blocks: Global blocks at the end of bidirectional attention. Causal attention
            has none: where a text ends is not known to its beginning.
        seed: Of the random blocks. Give every layer its own for layers that complement one another.
    """

    name: ClassVar[str] = "bigbird"

    block: int = 64
    random_blocks: int = 3
    window_blocks: int = 3
    global_blocks: int = 1
    last_global_blocks: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive("BigBird", block=self.block, window_blocks=self.window_blocks)
        check_count(
            "BigBird",
            random_blocks=self.random_blocks,
            global_blocks=self.global_blocks,
            last_global_blocks=self.last_global_blocks,
            seed=self.seed,
        )
        if self.window_blocks % 2 == 0:
            raise ConfigError(
                problem(
                    "BigBird.window_blocks",
                    expected="an odd number of blocks, with the query's own in the middle",
                    got=self.window_blocks,
                    fix="Use 1, 3, 5, ...",
                )
            )

    def key_blocks(self, q_len: int, k_len: int, kv_heads: int, causal: bool) -> Tensor:
        """Blocks outside the window that each block of queries sees, int64 ``[Hkv, N, C]`` on CPU.

        The ``N`` blocks are those that the last ``q_len`` of ``k_len`` positions touch; -1 marks an
        empty slot. Rows that see every key in any case (see ``full_rows``) have none.
        """
        side, blocks = self.window_blocks // 2, -(-k_len // self.block)
        row = np.arange((k_len - q_len) // self.block, blocks)
        first = min(self.global_blocks, blocks)
        last = blocks if causal else max(first, blocks - self.last_global_blocks)
        # Candidates are the blocks from `first` to `last` less the window's.
        start = np.clip(row - side, first, last)
        end = np.full_like(start, last) if causal else np.clip(row + side + 1, first, last)
        candidates = last - first - (end - start)
        everything = np.zeros_like(row, dtype=bool) if causal else (row < first) | (row >= last)
        candidates[everything] = 0
        heads = np.arange(kv_heads)[:, None]
        random = distinct(self.random_blocks, candidates, self.seed, heads, row)
        random = np.where(random < 0, -1, random + first)
        random += (random >= start[:, None]) * (end - start)[:, None]
        fixed = np.array([*range(first), *range(last, blocks)], dtype=np.int64)
        seen = (abs(fixed - row[:, None]) <= side) | everything[:, None]
        if causal:
            seen |= fixed > row[:, None]
        fixed = np.where(seen, -1, fixed)
        found = np.concatenate([np.broadcast_to(fixed, (kv_heads, *fixed.shape)), random], -1)
        return torch.from_numpy(found)

    def pattern(self, q_len: int, k_len: int, kv_heads: int, causal: bool) -> BlockPattern:
        reach = self.window_blocks // 2 * self.block
        band = Band(tile=self.block, left=reach, right=0 if causal else reach)
        blocks = self.key_blocks(q_len, k_len, kv_heads, causal)
        return BlockPattern(
            causal=causal,
            bands=(band,) * kv_heads,
            block=self.block,
            tokens=tokens_of_blocks(blocks, self.block, k_len),
        )

    def full_rows(self, k_len: int) -> Tensor | None:
        blocks = -(-k_len // self.block)
        row = torch.arange(k_len, device="cpu")
        at = row // self.block
        rows = row[(at < self.global_blocks) | (at >= blocks - self.last_global_blocks)]
        return rows if len(rows) else None
