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
from torch.autograd.function import once_differentiable

from longswift.core.bias import ScoreBias
from longswift.core.pattern import BlockPattern
from longswift.core.remainder import attend_remainder
from longswift.core.softmax import merge
from longswift.core.summary import KeySummary
from longswift.core.types import Partial
from longswift.kernels.triton.limits import checked, refusal
from longswift.kernels.triton.linear import attend_linear
from longswift.kernels.triton.tables import Tables, tables

__all__ = [
    "attend",
    "attend_bands",
    "attend_linear",
    "best_blocks",
    "choose_by_bounds",
    "refusal",
    "verify",
]


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


@torch.no_grad()
def attend_bands(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    scale: float,
    bias: ScoreBias | None = None,
) -> Partial:
    """Attention over the pattern's bands alone, without gradients."""
    q, k, v = checked(q, k, v, bias)
    bare = BlockPattern(causal=pattern.causal, bands=pattern.bands, block=pattern.block)
    return _forward(q, k, v, _tables(bare, q, k), scale, bias)


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
        bands: The result of ``attend_bands``, overwritten by the whole one where a kernel goes on
            from it; it has no gradients and is not used with them.
        summary: Page summaries of ``k`` and ``v``, used for the remainder.
        bias: Additions to the scaled scores; a remainder column gets the mean over its tokens.

    Raises:
        UnsupportedError: The kernels cannot compute these inputs; see ``refusal``.
    """
    q, k, v = checked(q, k, v, bias)
    tracked = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if not tracked and _rest_takes(q, k, v, pattern, bias):
        from longswift.kernels.triton.rest import attend_rest

        bands = bands or attend_bands(q, k, v, pattern, scale)
        part = attend_rest(q, k, v, pattern, scale, bands, summary)
        return Partial(part.out.to(q.dtype), part.lse)
    table = _tables(pattern, q, k)
    if tracked or bias is not None and bias.requires_grad:
        values = None if bias is None else bias.values
        parts = [Partial(*_Attend.apply(q, k, v, values, table, scale, bias))]
    elif bands is None:
        parts = [_forward(q, k, v, table, scale, bias)]
    else:
        parts = [bands]
        if table.tokens.shape[3]:
            parts.append(_forward(q, k, v, table, scale, bias, band=False))
    if pattern.pool is not None:
        parts.append(attend_remainder(q, k, v, pattern, scale, summary, bias))
    out, lse = merge(*parts)
    return Partial(out.to(q.dtype), lse)


def best_blocks(
    rows: Tensor, keys: Tensor, outside: Tensor, skip: int, most: int
) -> tuple[Tensor, Tensor]:
    """Key blocks with the largest bounds; see ``scoring.best_blocks``."""
    from longswift.kernels.triton import scoring

    return scoring.best_blocks(rows, keys, outside, skip, most)


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


def _tables(pattern: BlockPattern, q: Tensor, k: Tensor) -> Tables:
    return tables(pattern, q.shape[0], q.shape[2], k.shape[2], q.device)


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
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        from longswift.kernels.triton.backward import backward

        q, k, v, values, out, lse = ctx.saved_tensors
        d_out, d_lse = grad_outputs
        bias = d_values = None
        if values is not None:
            bias = ScoreBias(values=values, zero=ctx.place[0], step=ctx.place[1])
            if ctx.needs_input_grad[3]:
                d_values = torch.zeros(values.shape, dtype=values.dtype, device=values.device)
        grads = backward(q, k, v, ctx.table, ctx.scale, bias, out, lse, d_out, d_lse, d_values)
        d_q, d_k, d_v = (grad.to(x.dtype) for grad, x in zip(grads, (q, k, v), strict=True))
        return d_q, d_k, d_v, d_values, None, None, None
