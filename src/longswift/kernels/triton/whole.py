"""Full attention by the fused operators of PyTorch, which vendors tune for every new GPU.

They are not called by a public name, so none is believed: before its first use on a device, for a
dtype and a head shape, an operator has to solve small problems as the definition says. What fails
there, or later, is passed over in favour of the next, and in the end of this project's kernel.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from longswift.core.pattern import BlockPattern
from longswift.core.softmax import softmax_partial
from longswift.core.types import Partial

Operator = Callable[[Tensor, Tensor, Tensor, bool, float], Partial]

# Channels and strides: 16 bytes of 16-bit numbers.
_GRAIN, _WIDEST = 8, 256
# Rows for which cuDNN's plan, made again for every length, is worth its milliseconds.
_WORTH_A_PLAN = 1024


class Heads(NamedTuple):
    """What decides whether an operator works.

    Attributes:
        device: Of the inputs.
        dtype: Of the inputs.
        dim: ``D``.
        v_dim: ``Dv``.
        groups: Query heads per KV head.
    """

    device: torch.device
    dtype: torch.dtype
    dim: int
    v_dim: int
    groups: int


def cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Partial:
    """cuDNN's kernel, ``q [B, Hq, Lq, D]``, ``k, v [B, Hkv, Lk, D]``."""
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, causal, False, scale=scale
    )[:2]
    return Partial(out, lse)


def flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Partial:
    """FlashAttention as PyTorch holds it, shapes as for ``cudnn``."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention(
        q, k, v, 0.0, causal, False, scale=scale
    )[:2]
    return Partial(out, lse)


def efficient(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Partial:
    """The memory-efficient kernel, which knows fp32; shapes as for ``cudnn``."""
    out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, None, True, 0.0, causal, scale=scale
    )[:2]
    return Partial(out, lse)


def by_group(operator: Operator) -> Operator:
    """``operator`` on problems of one KV head each, its keys and values repeated as views."""

    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Partial:
        groups = q.shape[1] // k.shape[1]
        apart = q.unflatten(1, (-1, groups)).flatten(0, 1)
        k, v = (x.flatten(0, 1).unsqueeze(1).expand(-1, groups, -1, -1) for x in (k, v))
        out, lse = operator(apart, k, v, causal, scale)
        # Some round the length of a row's sums up.
        lse = lse.flatten(2)[:, :, : q.shape[2]]
        return Partial(*(x.reshape(*q.shape[:2], *x.shape[2:]) for x in (out, lse)))

    return attend


# By name, best first.
OPERATORS: dict[str, Operator] = {
    "cudnn": cudnn,
    "cudnn, by group": by_group(cudnn),
    "flash": flash,
    "flash, by group": by_group(flash),
    "efficient, by group": by_group(efficient),
}


def is_whole(pattern: BlockPattern, q_len: int, k_len: int) -> bool:
    """Whether every query sees every key, or every key up to its own; False if in doubt."""
    offset = k_len - q_len
    for band in set(pattern.bands):
        last = (k_len - 1) // band.tile * band.tile
        end = offset // band.tile * band.tile + band.tile + band.right
        ahead = band.right >= 0 if pattern.causal else end >= k_len
        if band.reach is not None or last > band.left or not ahead:
            return False
    return True


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Partial | None:
    """Full attention without gradients by the best operator that is right here.

    Args:
        q: ``[B, Hq, Lq, D]``, unit stride along D, like k and v.
        k: ``[B, Hkv, Lk, D]``.
        v: ``[B, Hkv, Lk, Dv]``.
        causal: Bottom-right aligned, as everywhere.
        scale: Factor on the scores, above 0.

    Returns:
        ``out`` in the dtype of q and ``lse`` in fp32, or None where no operator computes this.
    """
    q_len, k_len = q.shape[2], k.shape[2]
    causal = causal and q_len > 1
    # Their causal mask is aligned top-left.
    if causal and q_len != k_len or not all(map(_fits, (q, k, v))):
        return None
    heads = Heads(q.device, q.dtype, q.shape[3], v.shape[3], q.shape[1] // k.shape[1])
    for name in OPERATORS:
        if q_len < _WORTH_A_PLAN and name.startswith("cudnn") or objection(name, heads):
            continue
        found = _attempt(name, q, k, v, causal, scale)
        if isinstance(found, Partial):
            return found
        warnings.warn(f"full attention: {name} is passed over: {found}", stacklevel=2)
    return None


@functools.cache
@torch.inference_mode(False)
@torch.no_grad()
def objection(name: str, heads: Heads) -> str | None:
    """Why an operator is not used for such heads: how it errs on small problems; or None."""
    scale = 1.5 * heads.dim**-0.5
    # Lengths that fill no tile, a square for the causal mask, and a single query.
    for q_len, k_len, causal in ((150, 150, True), (70, 150, False), (1, 150, False)):
        q, k, v = _problem(heads, q_len, k_len)
        found = _attempt(name, q, k, v, causal, scale)
        if isinstance(found, str):
            return found
        right = _definition(q, k, v, causal, scale)
        close = 2e-2 if heads.dtype.itemsize == 2 else 2e-5
        for what, got, expected in zip(("output", "log-sum-exp"), found, right, strict=True):
            worst = float((got - expected).abs().max())
            # NaN is not close to anything.
            if not worst <= close:
                return f"its {what} differs from the definition by {worst:.1e}"
    return None


def _fits(x: Tensor) -> bool:
    """Whether every operator can read a tensor: 16 bytes at a time."""
    aligned = x.data_ptr() % 16 == 0 and all(s > 0 and s % _GRAIN == 0 for s in x.stride()[:3])
    small = 0 < x.shape[3] <= _WIDEST and x.shape[3] % _GRAIN == 0
    return aligned and small and x.stride(3) == 1 and x.numel() > 0


def _attempt(
    name: str, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> Partial | str:
    """The result of an operator, or why there is none."""
    try:
        with torch.no_grad():
            out, lse = OPERATORS[name](q, k, v, causal, scale)
            lse = lse.reshape(q.shape[:3])
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, AttributeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    if out.shape != (*q.shape[:3], v.shape[3]):
        return f"its output is {tuple(out.shape)}"
    return Partial(out, lse.float())


def _problem(heads: Heads, q_len: int, k_len: int) -> tuple[Tensor, ...]:
    generator = torch.Generator("cpu").manual_seed(0)
    # More than one batch row and KV head, as views of [B, L, H, D].
    sizes = (q_len, 2 * heads.groups, heads.dim), (k_len, 2, heads.dim), (k_len, 2, heads.v_dim)
    made = (torch.randn(2, *size, generator=generator, device="cpu") for size in sizes)
    return tuple(x.to(heads.device, heads.dtype).transpose(1, 2) for x in made)


def _definition(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Partial:
    groups = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(groups, 1) for x in (k, v))
    scores = q.double() @ k.transpose(2, 3) * scale
    if causal:
        hidden = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return softmax_partial(scores, v)
