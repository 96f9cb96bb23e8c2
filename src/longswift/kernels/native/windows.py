"""Windows: tiles of queries against the contiguous keys that each of them sees."""

from __future__ import annotations

import torch
from torch import Tensor

from longswift.core import compiled
from longswift.core.pattern import Band, BlockPattern
from longswift.core.rectangles import Job, band_heads, by_rows, by_tiles, jobs
from longswift.core.types import Partial
from longswift.kernels.native.factors import in_pairs
from longswift.kernels.native.pieces import batches

# Scores of one piece of work, and rows of a tile that share its packed keys.
_SCORES = 1 << 20
_ROWS = 512
# Wider tiles are as fast in torch's fused kernel, too.
_WIDEST = 8192
_FARTHEST = 1 << 40
# Bytes beyond which the C library maps memory anew for every call: a page fault is microseconds.
_MAPPED = 1 << 25


def attend_windows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    scale: float,
    into: Partial | None = None,
) -> Partial | None:
    """Attention over the pattern's bands, or None where a band is no narrow window."""
    q_len, k_len = q.shape[2], k.shape[2]
    work: list[tuple[int, ...]] = []
    for band, heads in band_heads(pattern.bands):
        found = jobs(band, q_len, k_len, pattern.causal)
        dense = len(found) == 1 and found[0].rows == q_len and found[0].width == k_len
        if not found or dense or max(job.width for job in found) > _WIDEST:
            return None
        for job in by_tiles(by_rows(found, _ROWS, pattern.causal), _SCORES):
            shape = _rectangle(job, band, pattern.causal)
            work += [(b, head, *shape) for b in range(k.shape[0]) for head in heads]
    # A tile without keys belongs to no job.
    holes = any(band.right < 0 for band in pattern.bands)
    out, lse = into or (
        torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype, device=q.device),
        torch.empty(q.shape[:3], dtype=torch.float32, device=q.device),
    )
    if holes:
        out.zero_()
        lse.fill_(float("-inf"))
    operators = compiled.loaded()
    if out.nbytes > _MAPPED:
        operators.use_large_pages(out)
    # Count, rows and width of a piece: the widest first.
    work.sort(key=lambda piece: -piece[5] * piece[6] * piece[7])
    q, k, v = in_pairs(q), in_pairs(k), in_pairs(v)
    for places in batches(work):
        operators.tiles(q, k, v, out, lse, places, scale)
    return Partial(out, lse)


def _rectangle(job: Job, band: Band, causal: bool) -> list[int]:
    """What the kernel calls a rectangle: the job, and how far its rows see."""
    behind, ahead = band.reach or (_FARTHEST, _FARTHEST)
    return [*job[:7], behind, min(0, ahead) if causal else ahead]
