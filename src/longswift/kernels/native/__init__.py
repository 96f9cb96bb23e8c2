"""MS-SWIFT's inner loops in C++: windows, the choice of key tokens by bounds, gathered attention.

Products go to oneDNN's small-matrix kernels, a block of queries at a time, so that scores never
leave the cache; torch's threads take blocks. Gradients are recomputed likewise. Position biases and
fp64 are the eager kernel's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longswift.core import compiled
from longswift.core.bias import ScoreBias
from longswift.core.errors import UnsupportedError, problem
from longswift.core.inputs import tracked
from longswift.core.pattern import BlockPattern
from longswift.core.rectangles import is_whole
from longswift.core.summary import KeySummary
from longswift.core.types import Partial
from longswift.kernels import eager
from longswift.kernels.eager.whole import takes as takes_whole
from longswift.kernels.eager.whole import with_gradients as whole_with_gradients
from longswift.kernels.native.choosing import choose_by_bounds
from longswift.kernels.native.factors import in_pairs
from longswift.kernels.native.gradients import pattern_gradients, whole_gradients
from longswift.kernels.native.outside import Outside, with_whole_rows
from longswift.kernels.native.pieces import batches, pieces
from longswift.kernels.native.whole import attend_by_rows, attend_whole
from longswift.kernels.native.windows import attend_windows

__all__ = [
    "DTYPES",
    "VECTOR",
    "WRITES_INTO",
    "attend",
    "attend_bands",
    "attend_whole",
    "choose_by_bounds",
    "refusal",
    "verify",
]

# `attend_bands` takes the memory of its result, and `attend` adds to it where it is.
WRITES_INTO = True
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Channels are packed in vectors of so many.
VECTOR = 16


def verify(device: torch.device) -> tuple[bool, str]:
    """Usable on a CPU for which the kernels have been compiled."""
    if device.type != "cpu":
        return False, f"the compiled kernels run on a CPU, not on {device.type}"
    if compiled.operators() is None:
        return False, compiled.reason() or "the compiled kernels do not load"
    return True, "C++ compiled for this processor"


def refusal(
    q: Tensor, k: Tensor, v: Tensor, bias: ScoreBias | None = None, kernel: str = "attend"
) -> str | None:
    """Why these inputs cannot be computed here, or None."""
    if kernel != "attend":
        return f"{kernel}: the compiled kernels are those of softmax attention"
    if compiled.operators() is None:
        return compiled.reason() or "the compiled kernels do not load"
    if q.dtype not in DTYPES:
        return f"{q.dtype}: the compiled kernels know fp32, bf16 and fp16"
    if q.shape[3] % VECTOR or v.shape[3] % VECTOR:
        return f"heads of {q.shape[3]} and {v.shape[3]}: both must be multiples of {VECTOR}"
    return None


def attend_bands(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    scale: float,
    bias: ScoreBias | None = None,
    into: Partial | None = None,
) -> Partial:
    """Attention over the pattern's bands alone, without gradients, in the memory of ``into``."""
    _refuse(q, k, v)
    found = None
    if bias is None and scale > 0.0 and q.numel() and k.numel():
        with torch.no_grad():
            if is_whole(pattern, q.shape[2], k.shape[2]):
                found = attend_by_rows(q, k, v, causal=pattern.causal, scale=scale)
            else:
                found = attend_windows(q, k, v, pattern, scale, into)
                if found is not None:
                    return found
    if found is None:
        found = eager.attend_bands(q, k, v, pattern, scale, bias)
    if into is None:
        return found
    for place, value in zip(into, found, strict=True):
        place.copy_(value)
    return into


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    scale: float,
    *,
    bands: Partial | None = None,
    summary: KeySummary | None = None,
    bias: ScoreBias | None = None,
) -> Partial:
    """Attention of an unpadded batch under ``pattern``; see ``kernels.eager.attend``."""
    _refuse(q, k, v)
    if bands is None:
        bands = attend_bands(q, k, v, pattern, scale, bias)
    if bias is not None:
        return eager.attend(q, k, v, pattern, scale, bands=bands, summary=summary, bias=bias)
    with torch.no_grad():
        # Added to where they are; the fused kernel's sums do not lie next to each other.
        found = Partial(*with_whole_rows(bands.out.to(q.dtype), bands.lse.to(torch.float32)))
        if pattern.tokens is not None or pattern.pool is not None:
            _merge_gathered(q, k, v, pattern, scale, summary, *found)
    if not tracked(q, k, v):
        return found
    if takes_whole(pattern, q, k, scale):
        return whole_with_gradients(q, k, v, found, pattern.causal, scale, whole_gradients)
    return eager.with_gradients(q, k, v, found, pattern, scale, compute=pattern_gradients)


def _merge_gathered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    scale: float,
    summary: KeySummary | None,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Adds gathered tokens and the remainder to ``out`` and ``lse`` of the bands, in place."""
    outside = Outside.of(k, v, pattern, q.shape[2], summary)
    edges, sums, sizes = outside.edges, outside.sums, outside.sizes
    operators = compiled.loaded()
    q = in_pairs(q)
    for places in batches(pieces(k, edges.shape[1])):
        if pattern.by_row:
            given = *outside[:3], *sums, edges, out, lse
            operators.merge_by_row(q, k, v, *given, places, sizes, scale, pattern.causal)
        else:
            given = outside.tokens, *sums, edges, out, lse
            operators.merge(q, k, v, *given, places, sizes, scale, pattern.causal)


def _refuse(q: Tensor, k: Tensor, v: Tensor) -> None:
    reason = refusal(q, k, v)
    if reason is not None:
        raise UnsupportedError(
            problem(
                "backend 'native'", expected="inputs it can compute", got=reason, fix="Use 'auto'."
            )
        )
