"""Attention by Triton kernels of this project, on any GPU.

``forward`` and ``backward`` hold kernels for bands and gathered tokens in one pass, which take a
pattern as integer tables; the remainder is computed by torch and merged. Without gradients, where
whole blocks share their lists, ``rest`` computes gathered tokens and remainder. ``scoring`` holds
the selection's first stage, ``linear`` and ``sums`` linear attention. On a CPU the kernels run in
Triton's interpreter, for tests.
Triton: Tillet et al., 2019. Tiling and recomputation: Dao, 2023, arXiv 2307.08691.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from longswift.core.bias import ScoreBias
from longswift.core.inputs import tracked
from longswift.core.once import Saved, once
from longswift.core.pattern import BlockPattern
from longswift.core.remainder import attend_remainder
from longswift.core.softmax import accumulator_dtype, merge
from longswift.core.summary import KeySummary
from longswift.core.types import Partial
from longswift.kernels.triton.limits import checked, on_their_device, refusal
from longswift.kernels.triton.linear import attend_linear
from longswift.kernels.triton.tables import Tables, tables
from longswift.kernels.triton.whole import attend as attend_whole
from longswift.kernels.triton.whole import is_whole

__all__ = [
    "WRITES_INTO",
    "attend",
    "attend_bands",
    "attend_linear",
    "best_blocks",
    "choose_by_bounds",
    "refusal",
    "verify",
]

# `attend_bands` takes the memory of its result, and `attend` leaves its own there.
WRITES_INTO = True


def verify(device: torch.device) -> tuple[bool, str]:
    """Usable with the ``triton`` package on a GPU it compiles for, or in its interpreter."""
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed: pip install 'longswift[gpu]'"
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            from longswift.kernels.triton.probe import interpreter_fails

            failure = interpreter_fails()
            return failure is None, failure or "Triton's interpreter, for tests only"
        return False, "Triton compiles for GPUs; on a CPU it runs only with TRITON_INTERPRET=1"
    if device.type != "cuda":
        return False, f"the kernels are not used on {device.type}"
    from torch.utils._triton import has_triton

    if not has_triton():
        return False, "Triton does not compile for this GPU"
    return True, "Triton kernels"


@on_their_device
@torch.no_grad()
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
    q, k, v = checked(q, k, v, bias)
    found = None
    if bias is None and q.is_cuda and scale > 0.0 and is_whole(pattern, q.shape[2], k.shape[2]):
        found = attend_whole(q, k, v, pattern.causal, scale)
    if found is None:
        found = _bands(q, k, v, pattern, scale, bias, into)
    return found if into is None or found is into else _copied(found, into)


@on_their_device
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
    """Attention of an unpadded batch under ``pattern``.

    Args:
        q: ``[B, Hq, Lq, D]``.
        k: ``[B, Hkv, Lk, D]``.
        v: ``[B, Hkv, Lk, Dv]``.
        pattern: Which keys are seen.
        scale: Factor on the scores.
        bands: The result of ``attend_bands``, overwritten by the result if that has its dtype; it
            has no gradients and is not used with them.
        summary: Page summaries of ``k`` and ``v``, used for the remainder.
        bias: Additions to the scaled scores; a remainder column gets the mean over its tokens.

    Raises:
        UnsupportedError: The kernels cannot compute these inputs; see ``refusal``.
    """
    q, k, v = checked(q, k, v, bias)
    given, parts = bands, []
    if tracked(q, k, v) or bias is not None and bias.requires_grad:
        values = None if bias is None else bias.values
        table = _tables(pattern, q, k)
        parts, given = [Partial(*_Attend.apply(q, k, v, values, table, scale, bias))], None
    elif _rest_takes(q, k, v, pattern, bias):
        from longswift.kernels.triton.rest import attend_rest

        bands = bands or attend_bands(q, k, v, pattern, scale)
        part = attend_rest(q, k, v, pattern, scale, bands, summary)
        return part if part.out.dtype == q.dtype else Partial(part.out.to(q.dtype), part.lse)
    elif bands is None and bias is not None:
        parts = [_forward(q, k, v, _tables(pattern, q, k), scale, bias)]
    else:
        parts = [attend_bands(q, k, v, pattern, scale, bias) if bands is None else bands]
        if pattern.tokens is not None and pattern.tokens.shape[3]:
            table = _tables(pattern, q, k, band=False)
            parts.append(_forward(q, k, v, table, scale, bias, band=False))
    if pattern.pool is not None:
        parts.append(attend_remainder(q, k, v, pattern, scale, summary, bias))
    found = merge(*parts)
    if given is not None and given.out.dtype == q.dtype:
        return given if len(parts) == 1 else _copied(found, given)
    return Partial(found.out.to(q.dtype), found.lse)


@on_their_device
def best_blocks(
    rows: Tensor, keys: Tensor, outside: Tensor, skip: int, most: int
) -> tuple[Tensor, Tensor]:
    """Key blocks with the largest bounds; see ``scoring.best_blocks``."""
    from longswift.kernels.triton import scoring

    return scoring.best_blocks(rows, keys, outside, skip, most)


@on_their_device
def choose_by_bounds(
    q: Tensor, k: Tensor, band_lse: Tensor, pattern: BlockPattern, tokens: Tensor, **options: Any
) -> bool:
    """Key tokens by centroids; see ``choosing.choose_by_bounds``."""
    from longswift.kernels.triton import choosing

    return choosing.choose_by_bounds(q, k, band_lse, pattern, tokens, **options)


def _rest_takes(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, bias: ScoreBias | None
) -> bool:
    from longswift.kernels.triton.rest import takes

    return takes(q, k, v, pattern, bias)


def _bands(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    scale: float,
    bias: ScoreBias | None,
    into: Partial | None,
) -> Partial:
    """``attend_bands`` by this project's kernels, in ``into`` where they can write there."""
    from longswift.kernels.triton import bands

    if bias is not None or not bands.takes(pattern.bands, scale, q.shape[2], k.shape[2]):
        bare = BlockPattern(causal=pattern.causal, bands=pattern.bands, block=pattern.block)
        return _forward(q, k, v, _tables(bare, q, k), scale, bias)
    place = into
    if place is None or place.out.stride(3) != 1 or place.lse.stride(2) != 1:
        acc = accumulator_dtype(q.dtype)
        out = torch.empty(*q.shape[:3], v.shape[3], dtype=acc, device=q.device)
        place = Partial(out, torch.empty(q.shape[:3], dtype=acc, device=q.device))
    bands.attend(q, k, v, pattern.bands, pattern.causal, scale, *place)
    return place


def _copied(found: Partial, into: Partial) -> Partial:
    """``into`` with the values of ``found``."""
    for place, value in zip(into, found, strict=True):
        place.copy_(value)
    return into


def _tables(pattern: BlockPattern, q: Tensor, k: Tensor, *, band: bool = True) -> Tables:
    return tables(pattern, q.shape[0], q.shape[2], k.shape[2], q.device, band=band)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tables,
    scale: float,
    bias: ScoreBias | None,
    *,
    band: bool = True,
) -> Partial:
    from longswift.kernels.triton.forward import forward

    return forward(q, k, v, table, scale, bias, band=band)


class _Attend(torch.autograd.Function):
    """Scores are recomputed in the backward pass: memory O(n). Differentiable once."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        values: Tensor | None,
        table: Tables,
        scale: float,
        bias: ScoreBias | None,
    ) -> tuple[Tensor, Tensor]:
        """``values`` are those of ``bias``, named once more so that gradients reach them."""
        out, lse = _forward(q, k, v, table, scale, bias)
        ctx.save_for_backward(q, k, v, values, out, lse)
        ctx.table, ctx.scale = table, scale
        ctx.place = (0, 1) if bias is None else (bias.zero, bias.step)
        return out, lse

    @staticmethod
    @once
    def backward(ctx: Any, saved: Saved, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        from longswift.kernels.triton.backward import backward

        q, k, v, values, out, lse = saved
        d_out, d_lse = grad_outputs
        bias = d_values = None
        if values is not None:
            bias = ScoreBias(values=values, zero=ctx.place[0], step=ctx.place[1])
            if ctx.needs_input_grad[3]:
                d_values = torch.zeros(values.shape, dtype=values.dtype, device=values.device)
        grads = backward(q, k, v, ctx.table, ctx.scale, bias, out, lse, d_out, d_lse, d_values)
        d_q, d_k, d_v = (grad.to(x.dtype) for grad, x in zip(grads, (q, k, v), strict=True))
        return d_q, d_k, d_v, d_values, None, None, None
