"""Key tokens by bounds, complete blocks of queries at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from longswift.core import compiled
from longswift.core.blocks import block_runs
from longswift.core.parallel import for_each
from longswift.core.pattern import BlockPattern
from longswift.core.pools import block_edges
from longswift.core.products import factor_dtype
from longswift.kernels.native.pieces import pieces

# Boxes of a panel: the columns of one product.
_WIDTH = 64


def choose_by_bounds(
    q: Tensor,
    k: Tensor,
    band_lse: Tensor,
    pattern: BlockPattern,
    tokens: Tensor,
    *,
    scale: float,
    key_block: int,
    row_group: int,
    key_radius: float,
    row_radius: float,
    proposed: int,
    sinks: int,
) -> None:
    """Chooses for every complete block of queries; what it chooses is what ``Bounds`` describes.

    Args:
        q: ``[B, Hq, Lq, D]``.
        k: ``[B, Hkv, Lk, D]``.
        band_lse: fp32 ``[B, Hq, Lq]``.
        pattern: Bands and blocks.
        tokens: int32 ``[B, Hkv, N, budget]`` filled with -1; complete blocks are written to.
        scale: Factor on the scores.
        key_block: Keys per box.
        row_group: Query rows per box.
        key_radius: Share of a key box's radius that counts.
        row_radius: Share of a row box's radius that counts.
        proposed: Key blocks proposed to a block of queries.
        sinks: Leading tokens never chosen.
    """
    operators = compiled.operators()
    assert operators is not None
    q_len, k_len = q.shape[2], k.shape[2]
    edges = block_edges(pattern, q_len, k_len)
    blocks = k_len // key_block if pattern.causal else -(-k_len // key_block)
    reach = int(edges[..., 0].max()) // key_block if pattern.causal else blocks
    boxes = _boxes(k, min(reach, blocks), key_block)
    sizes = [
        *(pattern.block, key_block, row_group, proposed, tokens.shape[3], sinks),
        min(-(-sinks // key_block), blocks),
    ]
    complete = [
        [*piece, run.row + (piece[2] - run.first) * run.rows]
        for run in block_runs(q_len, k_len, pattern.block, q_len)
        if run.rows == pattern.block
        for piece in pieces(k, run.count, run.first)
    ]
    band_lse = band_lse.contiguous()

    def choose(place: list[int], _: None) -> None:
        operators.choose(
            *(q, k, band_lse, boxes, edges, tokens, place, sizes),
            *(scale, key_radius, row_radius, pattern.causal),
        )

    for_each(complete, lambda: None, choose, q.device)


def _boxes(k: Tensor, count: int, key_block: int) -> Tensor:
    """Boxes around the first ``count`` blocks of keys, packed ``[B * Hkv, panels, 3D, width]``."""
    operators = compiled.operators()
    assert operators is not None
    batch, kv_heads, _, dim = k.shape
    panels = -(-count // _WIDTH)
    boxes = torch.empty(batch * kv_heads, panels, 3 * dim, _WIDTH, dtype=factor_dtype(k))
    work = [(b, h, p) for p in range(panels) for b in range(batch) for h in range(kv_heads)]

    def describe(place: tuple[int, int, int], _: None) -> None:
        operators.describe(k, boxes, *place, key_block)

    for_each(work, lambda: None, describe, k.device)
    return boxes
