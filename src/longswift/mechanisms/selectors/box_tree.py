"""A tree of boxes around key blocks: only the children of the best nodes are bounded.

A node of level ``l`` is the box around ``branch ** l`` key blocks. From the first level at which a
query block has few nodes before it, the best ``kept`` nodes are opened, level by level, down to the
key blocks. A node that holds candidates and others is opened unseen: its box would tell of keys
that the query block must not know yet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longswift.core.products import bmm

# A level is bounded whole while it has at most this many times the nodes that opening would bound:
# nodes next to each other cost a quarter, and none is missed.
WHOLE = 4
_HIDDEN = float("-inf")


def levels_above(leaves: int, branch: int, kept: int) -> int:
    """Levels to climb above ``leaves`` key blocks before ``kept`` nodes of each are opened."""
    level = 0
    while leaves > WHOLE * kept * branch:
        leaves, level = -(-leaves // branch), level + 1
    return level


def enclose(low: Tensor, high: Tensor, branch: int) -> tuple[Tensor, Tensor]:
    """Boxes around every ``branch`` boxes ``[B, H, W, D]``; the last may hold fewer."""
    missing = -low.shape[2] % branch
    if missing:
        low, high = (
            torch.cat([x, x[:, :, -1:].expand(-1, -1, missing, -1)], 2) for x in (low, high)
        )
    return low.unflatten(2, (-1, branch)).amin(3), high.unflatten(2, (-1, branch)).amax(3)


def descend(
    rows: list[Tensor],
    levels: list[list[Tensor]],
    outside: Tensor,
    *,
    branch: int,
    kept: int,
    most: int,
    sinks: int,
    leaves: int | None,
) -> tuple[Tensor, Tensor]:
    """The best key blocks among those found, and whether each is a real choice, ``[B, Hkv, N, C]``.

    O(kept * branch) boxes a level.

    Args:
        rows: Factors ``[B, Hkv, N, R, *]``; the products with those of a box add up to its bound.
        levels: Factors ``[B * Hkv, nodes, *]`` of the boxes of every level, key blocks first.
        outside: Which key blocks are candidates, bool ``[Hkv, N, W]``.
        branch: Nodes of a level in one of the next.
        kept: Nodes opened a level.
        most: ``C``.
        sinks: Leading key blocks that are never chosen.
        leaves: Key blocks in all, where the last node may hold fewer than others; None where such a
            node is never seen, as in causal attention.
    """
    batch, kv_heads, count = rows[0].shape[:3]
    device, width = outside.device, outside.shape[2]
    before = torch.nn.functional.pad(outside.cumsum(2), (1, 0)).expand(batch, -1, -1, -1)
    top = len(levels) - 1
    shown = -(-width // branch**top)
    nodes = torch.arange(shown, device=device).expand(batch, kv_heads, count, -1)
    for level in range(top, -1, -1):
        size = branch**level
        first, end = nodes * size, (nodes + 1) * size
        found = before.gather(3, end.clamp(max=width)) - before.gather(3, first.clamp(max=width))
        whole = end if leaves is None else end.clamp(max=leaves)
        known = (found == whole - first) & (found > 0)
        bound = _bounds(rows, levels[level], nodes)
        bound.masked_fill_(~known.unsqueeze(3), _HIDDEN)
        rank = torch.log_softmax(bound, -1).amax(3)
        rank = torch.where(known, rank, torch.where(found > 0, float("inf"), _HIDDEN))
        rank.masked_fill_(end <= sinks, _HIDDEN)
        value, index = rank.topk(min(kept if level else most, rank.shape[3]), dim=3, sorted=False)
        nodes, real = nodes.gather(3, index), value > _HIDDEN
        if level:
            # Behind the last key block nothing is found.
            nodes = nodes.masked_fill(~real, width)
            nodes = (nodes.unsqueeze(-1) * branch + torch.arange(branch, device=device)).flatten(3)
    return nodes.masked_fill(~real, 0), real


def _bounds(rows: list[Tensor], boxes: list[Tensor], nodes: Tensor) -> Tensor:
    """Bounds of rows and the boxes of ``nodes [B, Hkv, N, M]``, ``[B, Hkv, N, R, M]``."""
    problems, total = boxes[0].shape[:2]
    start = torch.arange(problems, device=nodes.device).view(*nodes.shape[:2], 1, 1) * total
    index = (nodes.clamp(max=total - 1) + start).flatten()
    bound: Tensor | None = None
    for left, right in zip(rows, boxes, strict=True):
        found = right.flatten(0, 1).index_select(0, index)
        found = found.view(-1, nodes.shape[3], right.shape[2]).transpose(1, 2)
        product = bmm(left.flatten(0, 2).to(right.dtype), found).to(left.dtype)
        bound = product if bound is None else bound.add_(product)
    assert bound is not None
    return bound.view(*rows[0].shape[:4], nodes.shape[3])
