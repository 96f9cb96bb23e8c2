"""Attention by PyTorch's FlexAttention: compiled on a GPU, its dense definition on a CPU.

The bands are one call under a ``BlockMask`` built from block indices; the gathered tokens are a
second one over copies of their keys and values, each block of queries a problem of its own; the
remainder is a third part. The parts merge by log-sum-exp, and gradients are FlexAttention's own.

One compiled function serves every length and selection: shapes are dynamic, masks read tensors.
Head counts, head dimensions, dtypes and scales are compiled in.
FlexAttention: Dong et al., 2024, arXiv 2412.05496.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longswift.core.bias import ScoreBias
from longswift.core.blocks import block_count
from longswift.core.errors import UnsupportedError, problem
from longswift.core.pattern import BlockPattern
from longswift.core.remainder import attend_remainder
from longswift.core.softmax import accumulator_dtype, merge
from longswift.core.summary import KeySummary
from longswift.core.types import Partial


def verify(device: torch.device) -> tuple[bool, str]:
    """Usable where FlexAttention compiles, and on a CPU to check results."""
    if device.type == "cpu":
        return True, "FlexAttention uncompiled: dense, quadratic memory, for tests only"
    if device.type != "cuda":
        return False, f"FlexAttention is not used on {device.type}"
    from torch.utils._triton import has_triton

    if not has_triton():
        return False, "FlexAttention compiles through Triton, which does not work on this GPU"
    return True, "FlexAttention, compiled"


def refusal(
    q: Tensor, k: Tensor, v: Tensor, bias: ScoreBias | None = None, kernel: str = "attend"
) -> str | None:
    """Why a function of this backend cannot compute these inputs, or None."""
    if kernel != "attend":
        return f"{kernel}: FlexAttention is softmax attention"
    if bias is not None:
        return "a position bias: no kernel of this backend adds one"
    if q.device.type == "cpu":
        return None
    if q.dtype == torch.float64:
        return "fp64: FlexAttention's kernels accumulate in fp32"
    if min(q.shape[3], v.shape[3]) < 16:
        return f"heads of {min(q.shape[3], v.shape[3])}: FlexAttention needs 16 channels"
    return None


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
    _refuse(q, k, v, bias)
    return _bands(q, k, v, pattern, scale)


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
        bands: The result of ``attend_bands``; it has no gradients and is not used with them.
        summary: Page summaries of ``k`` and ``v``, used for the remainder.
        bias: Refused unless None.

    Raises:
        UnsupportedError: FlexAttention cannot compute these inputs; see ``refusal``.
    """
    _refuse(q, k, v, bias)
    if bands is None or torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        bands = _bands(q, k, v, pattern, scale)
    parts = [bands]
    if pattern.tokens is not None and pattern.tokens.shape[3]:
        parts.append(_gathered(q, k, v, pattern, scale))
    if pattern.pool is not None:
        parts.append(attend_remainder(q, k, v, pattern, scale, summary))
    out, lse = merge(*parts)
    return Partial(out.to(q.dtype), lse)


def _refuse(q: Tensor, k: Tensor, v: Tensor, bias: ScoreBias | None) -> None:
    reason = refusal(q, k, v, bias)
    if reason is not None:
        raise UnsupportedError(
            problem(
                "backend 'flex'",
                expected="inputs FlexAttention computes on this device",
                got=reason,
                fix="Use backend='eager'.",
            )
        )


def _bands(q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, scale: float) -> Partial:
    from longswift.kernels.flex.masks import band_blocks

    groups = q.shape[1] // k.shape[1]
    mask = band_blocks(pattern, q.shape[2], k.shape[2], groups, q.device)
    return _flex(q, k, v, mask, scale)


def _gathered(q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, scale: float) -> Partial:
    """Every block of queries over its own copy of the tokens it gathers."""
    from longswift.kernels.flex.masks import gathered_blocks

    batch, heads, q_len, _ = q.shape
    kv_heads, k_len, block = k.shape[1], k.shape[2], pattern.block
    offset = k_len - q_len
    count = block_count(q_len, k_len, block)
    # A single block, as in decoding, needs no rows added.
    rows, before = (block, offset % block) if count > 1 else (q_len, 0)
    padding = (0, 0, before, count * rows - before - q_len)
    blocks = torch.nn.functional.pad(q, padding).unflatten(2, (count, rows))
    blocks = blocks.transpose(1, 2).flatten(0, 1)
    start = offset - before + torch.arange(count, device=q.device)[:, None] * rows
    slots, since, until = (x.expand(batch, -1, -1, -1).long() for x in pattern.slots(q.device))
    since, until = (
        (x - start).clamp(0, rows).transpose(1, 2).flatten(0, 1).int().contiguous()
        for x in (since, until)
    )
    batches = torch.arange(batch, device=q.device).view(-1, 1, 1, 1)
    kv = torch.arange(kv_heads, device=q.device).view(-1, 1, 1)
    keys, values = (x[batches, kv, slots].transpose(1, 2).flatten(0, 1) for x in (k, v))
    mask = gathered_blocks(since, until, rows, heads // kv_heads)
    out, lse = _flex(blocks, keys, values, mask, scale)
    kept = slice(before, before + q_len)
    out = out.unflatten(0, (batch, count)).transpose(1, 2).flatten(2, 3)[:, :, kept]
    lse = lse.unflatten(0, (batch, count)).transpose(1, 2).flatten(2, 3)[:, :, kept]
    return Partial(out, lse)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float) -> Partial:
    """One call, its output in the accumulator dtype."""
    call = _dense if q.device.type == "cpu" else _fused
    out, lse = call(q, k, v, mask, scale)
    return Partial(out.to(accumulator_dtype(q.dtype)), lse)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float) -> tuple[Tensor, Tensor]:
    from torch.fx.experimental import _config as shapes

    # Dynamo fails at its ninth variant: here every shape of heads is one, and every scale.
    dynamo = torch._dynamo.config.patch(
        recompile_limit=sys.maxsize, accumulated_recompile_limit=sys.maxsize, specialize_float=True
    )
    # Lengths that happen to equal a number of heads are no constants.
    with dynamo, shapes.patch(use_duck_shape=False):  # type: ignore[attr-defined]
        return _compiled()(q, k, v, mask, scale)


@functools.cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_call, dynamic=True, fullgraph=True)


def _call(q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float) -> tuple[Tensor, Tensor]:
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    out, aux = flex_attention(
        q,
        k,
        v,
        block_mask=mask,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        # Its template for short queries has no tile for some numbers of rows, such as 70.
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
        return_aux=AuxRequest(lse=True),
    )
    assert aux.lse is not None
    return out, aux.lse


def _dense(q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float) -> tuple[Tensor, Tensor]:
    """The operator's own definition: the public call has no gradients on a CPU."""
    from torch._higher_order_ops.flex_attention import flex_attention
    from torch.nn.attention.flex_attention import _identity

    out, lse, *_ = flex_attention(q, k, v, _identity, mask.as_tuple(), scale, {})
    return out, lse * math.log(2)
