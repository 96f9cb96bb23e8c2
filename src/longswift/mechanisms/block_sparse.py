"""Attention under a layout of blocks that the caller draws.

With ``layout=("x..", "xx.", "x.x")`` and blocks of 2 tokens, causal (rows are queries)::

    x . . . . .
    x x . . . .
    x x x . . .
    x x x x . .
    x x . . x .
    x x . . x x

| | time | memory beyond inputs and output |
|---|---|---|
| forward, backward | O(visible blocks * block^2 * D) | O(L * most blocks in a row) |

Blocks next to the diagonal that every row sees are read as views, the others are gathered.
Sparse Transformers (Child et al., 2019, arXiv 1904.10509) made layouts of blocks popular.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from longswift.core.blocks import tokens_of_blocks
from longswift.core.errors import ConfigError, InputError, check_positive, problem
from longswift.core.pattern import Band, BlockPattern
from longswift.mechanisms.patterned import Patterned

Layout = tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class BlockSparse(Patterned):
    """Each block of queries sees the blocks of keys that a layout marks.

    Attributes:
        layout: One for all KV heads, ``[blocks, blocks]``, or one per KV head, ``[Hkv, blocks,
            blocks]``: a bool tensor or array, nested sequences of truth values, or rows of text in
            which ``x`` is visible and ``.`` is not. Kept as text, per head, so that a
            configuration can be compared, hashed and saved. Causal attention hides what lies
            after the query.
        block: Tokens per block; blocks are counted from the row's first real token.
        beyond: Rows of blocks below the layout: ``"diagonal"`` repeats its last row, moved along
            the diagonal; ``"refuse"`` raises ``InputError``. Columns right of the layout are
            hidden from the rows it has.
    """

    name: ClassVar[str] = "block_sparse"

    layout: Any = ("x..", "xx.", "xxx")
    block: int = 64
    beyond: str = "diagonal"

    def __post_init__(self) -> None:
        check_positive("BlockSparse", block=self.block)
        object.__setattr__(self, "layout", _as_text(self.layout))
        if self.beyond not in ("diagonal", "refuse"):
            raise ConfigError(
                problem(
                    "BlockSparse.beyond",
                    expected="'diagonal' or 'refuse'",
                    got=repr(self.beyond),
                    fix="Leave it at 'diagonal', or use 'refuse' for a fixed length.",
                )
            )

    def visible_blocks(self, q_len: int, k_len: int, kv_heads: int, causal: bool) -> Tensor:
        """Which blocks of keys each block of queries sees, bool ``[Hkv, N, blocks]`` on CPU."""
        layout = _as_bool(self.layout)
        size, blocks = layout.shape[1], -(-k_len // self.block)
        if len(self.layout) not in (1, kv_heads):
            raise InputError(
                problem(
                    "BlockSparse.layout",
                    expected=f"one layout, or {kv_heads}: one per KV head",
                    got=f"{len(self.layout)} layouts",
                    fix="A group of query heads shares the layout of its KV head.",
                )
            )
        if blocks > size and self.beyond == "refuse":
            raise InputError(
                problem(
                    "BlockSparse.layout",
                    expected=f"at most {size * self.block} tokens, {size} blocks of {self.block}",
                    got=f"{k_len} tokens",
                    fix="Give a larger layout, larger blocks, or beyond='diagonal'.",
                )
            )
        row = torch.arange((k_len - q_len) // self.block, blocks, device="cpu")[:, None]
        column = torch.arange(blocks, device="cpu")
        inside = column - (row - (size - 1)).clamp(min=0)
        seen = layout[:, row.clamp(max=size - 1), inside.clamp(0, size - 1)]
        seen = seen & (inside >= 0) & (inside < size)
        if causal:
            seen = seen & (column <= row)
        return seen.expand(kv_heads, -1, -1)

    def pattern(self, q_len: int, k_len: int, kv_heads: int, causal: bool) -> BlockPattern:
        seen = self.visible_blocks(q_len, k_len, kv_heads, causal).clone()
        if not causal:
            # These rows are computed apart; here they would only widen the lists of the others.
            seen[:, seen.all(2).all(0)] = False
        first = (k_len - q_len) // self.block
        bands = tuple(self._band(seen[head], first, causal) for head in range(kv_heads))
        distance = torch.arange(seen.shape[2], device="cpu") - torch.arange(
            first, first + seen.shape[1], device="cpu"
        ).unsqueeze(1)
        for head, band in enumerate(bands):
            left, right = band.left // self.block, band.right // self.block
            seen[head] &= (distance < -left) | (distance > right)
        width = int(seen.sum(2).max())
        order = seen.to(torch.uint8).argsort(dim=2, descending=True, stable=True)[..., :width]
        tokens = tokens_of_blocks(torch.where(seen.gather(2, order), order, -1), self.block, k_len)
        # Without a band the triangle of the query's own block is gathered, row by row.
        cut = causal and any(band.right < 0 for band in bands)
        return BlockPattern(
            causal=causal,
            bands=bands,
            block=self.block,
            tokens=tokens,
            visible_from=tokens if cut else None,
        )

    def full_rows(self, k_len: int) -> Tensor | None:
        seen = self.visible_blocks(k_len, k_len, len(self.layout), causal=False)
        dense = seen.all(2).all(0).repeat_interleave(self.block)[:k_len]
        return dense.nonzero().flatten() if bool(dense.any()) else None

    def _band(self, seen: Tensor, first: int, causal: bool) -> Band:
        """The blocks around the diagonal that every row sees, ``seen [N, blocks]``."""
        row = torch.arange(first, first + seen.shape[0], device="cpu")

        def reach(direction: int) -> int:
            """Blocks to one side that all rows see, -1 if some row does not even see its own."""
            steps = -1
            while steps + 1 < seen.shape[1]:
                column = row + direction * (steps + 1)
                exists = (column >= 0) & (column < seen.shape[1])
                at = column.clamp(0, seen.shape[1] - 1)[:, None]
                if not bool((seen.gather(1, at)[:, 0] | ~exists).all()):
                    break
                steps += 1
            return steps

        left = reach(-1)
        if left < 0:
            return Band(tile=self.block, left=0, right=-self.block)
        right = 0 if causal else reach(1)
        return Band(tile=self.block, left=left * self.block, right=right * self.block)


def _as_text(layout: Any) -> Layout:
    """The layout of each head (or of all) as rows of ``x`` and ``.``."""

    def row_of(row: Any) -> str:
        if isinstance(row, str):
            return row
        if any(hasattr(cell, "__len__") for cell in row):
            raise TypeError("deeper than a layout per head")
        return "".join("x" if cell else "." for cell in row)

    def is_row(row: Any) -> bool:
        return isinstance(row, str) or not hasattr(row[0], "__len__")

    try:
        nested = layout.tolist() if hasattr(layout, "tolist") else layout
        heads = [nested] if is_row(nested[0]) else nested
        text = tuple(tuple(row_of(row) for row in head) for head in heads)
    except (TypeError, IndexError, KeyError):
        text = ()
    size = len(text[0]) if text else 0
    square = all(len(head) == size and all(len(row) == size for row in head) for head in text)
    if not size or not square or set("".join(map("".join, text))) - set("x."):
        got = tuple(layout.shape) if hasattr(layout, "shape") else repr(layout)[:80]
        raise ConfigError(
            problem(
                "BlockSparse.layout",
                expected="truth values [blocks, blocks] or [Hkv, blocks, blocks], "
                "or rows of 'x' and '.'",
                got=got,
                fix="For example layout=('x..', 'xx.', 'x.x').",
            )
        )
    return text


def _as_bool(layout: Layout) -> Tensor:
    """bool ``[heads, blocks, blocks]`` on CPU."""
    letters = np.frombuffer("".join(map("".join, layout)).encode(), dtype=np.uint8)
    size = len(layout[0])
    return torch.from_numpy(letters == ord("x")).view(len(layout), size, size)
