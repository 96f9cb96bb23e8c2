"""Validation of q, k, v and the key mask, and the split of padded batches into plain rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from longswift.core import compiled
from longswift.core.errors import InputError, UnsupportedError, problem

if TYPE_CHECKING:
    from longswift.core.summary import KeySummary

# The transform of torch.func that is under way, or None; not public.
_transform: Callable[[], object] = torch._C._functorch.peek_interpreter_stack
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class RowGroup(NamedTuple):
    """Batch rows that share one set of real keys, so that they form a batch without padding.

    Attributes:
        rows: Batch indices of the group.
        keys: Indices of the real keys, or a slice when they are contiguous.
        queries: Indices of the real queries, or a slice when they are contiguous.
    """

    rows: list[int]
    keys: slice | Tensor
    queries: slice | Tensor


def check_inputs(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, causal: bool) -> None:
    """Raise ``InputError`` unless q, k, v and key_mask satisfy the layout contract.

    Args:
        q: ``[B, Hq, Lq, D]``.
        k: ``[B, Hkv, Lk, D]`` with ``Hq % Hkv == 0``.
        v: ``[B, Hkv, Lk, Dv]``.
        key_mask: bool ``[B, Lk]``, True for real tokens, or None.
        causal: Causal attention needs ``Lq <= Lk`` (bottom-right alignment).
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.dim() != 4:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise InputError(
                problem(
                    name,
                    expected="a 4-D tensor [batch, heads, length, head_dim]",
                    got=got,
                    fix="Unsqueeze missing dimensions or transpose(1, 2) a [B, L, H, D] tensor.",
                )
            )
        if x.dtype not in FLOATS:
            raise InputError(
                problem(name, expected="a floating dtype", got=x.dtype, fix="Call .float() on it.")
            )
        if x.layout is not torch.strided:
            raise InputError(
                problem(
                    name,
                    expected="a dense tensor",
                    got=x.layout,
                    fix="Call .to_dense() on it.",
                )
            )
        if x.shape[3] == 0:
            raise InputError(
                problem(
                    name,
                    expected="heads at least one channel wide",
                    got=tuple(x.shape),
                    fix="Check the last dimension.",
                )
            )
    if not (q.dtype == k.dtype == v.dtype) or not (q.device == k.device == v.device):
        raise InputError(
            problem(
                "q, k, v",
                expected="one dtype and one device",
                got=f"{q.dtype}/{q.device}, {k.dtype}/{k.device}, {v.dtype}/{v.device}",
                fix="Convert them with .to(dtype, device) first.",
            )
        )
    if q.device.type == "meta":
        raise InputError(
            problem(
                "q, k, v",
                expected="tensors with values",
                got="device meta",
                fix="Load the weights before the first forward pass.",
            )
        )
    batch, q_heads, q_len, head_dim = q.shape
    kv_heads, k_len = k.shape[1], k.shape[2]
    if k.shape[0] != batch or k.shape[3] != head_dim or k.shape[:3] != v.shape[:3]:
        raise InputError(
            problem(
                "shapes",
                expected="q [B, Hq, Lq, D], k [B, Hkv, Lk, D], v [B, Hkv, Lk, Dv]",
                got=f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}",
                fix="Make batch, key length and head dimension agree.",
            )
        )
    if kv_heads == 0 or q_heads % kv_heads:
        raise InputError(
            problem(
                "heads",
                expected="query heads a multiple of key/value heads",
                got=f"{q_heads} query heads and {kv_heads} key/value heads",
                fix="Grouped-query attention needs Hq % Hkv == 0.",
            )
        )
    if causal and q_len > k_len:
        raise InputError(
            problem(
                "lengths",
                expected="Lq <= Lk when causal (query i sits at key position Lk - Lq + i)",
                got=f"Lq={q_len}, Lk={k_len}",
                fix="Pass the keys of every query, or causal=False for cross attention.",
            )
        )
    if key_mask is not None:
        check_key_mask(key_mask, batch, k_len)


def check_key_mask(key_mask: Tensor, batch: int, length: int) -> None:
    """Raise ``InputError`` unless a mask is bool ``[batch, length]``."""
    fits = isinstance(key_mask, Tensor) and tuple(key_mask.shape) == (batch, length)
    if fits and key_mask.dtype == torch.bool:
        return
    mask_dtype = getattr(key_mask, "dtype", type(key_mask).__name__)
    raise InputError(
        problem(
            "key_mask",
            expected=f"a bool tensor of shape {(batch, length)}, True for real tokens",
            got=f"{mask_dtype} {tuple(getattr(key_mask, 'shape', ()))}",
            fix="Convert an HF attention_mask with attention_mask.bool().",
        )
    )


def under_autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs in autocast's dtype, as PyTorch's own attention takes them there.

    Rotated queries and keys are fp32 under autocast, values are not; a cache makes them fp32, too.
    """
    given = q, k, v
    if not all(isinstance(x, Tensor) and x.dtype in FLOATS[:3] for x in given):
        return given
    device = q.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return given
    dtype = torch.get_autocast_dtype(device)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def check_scale(scale: float | None, head_dim: int) -> float:
    """The factor on the scores, ``head_dim ** -0.5`` when None.

    Raises:
        InputError: Not a finite number.
    """
    if scale is None:
        return max(head_dim, 1) ** -0.5
    if not isinstance(scale, int | float) or not math.isfinite(scale):
        raise InputError(
            problem(
                "scale",
                expected="a finite number, or None for head_dim ** -0.5",
                got=repr(scale),
                fix="Pass the model's own scaling.",
            )
        )
    return float(scale)


def check_summary(summary: KeySummary, k: Tensor) -> None:
    """Raise ``InputError`` unless ``summary`` can describe the keys ``k [B, Hkv, Lk, D]``."""
    pages = max(0, k.shape[2] - min(summary.start, default=0)) // summary.page
    expected = (*k.shape[:2], pages, k.shape[3])
    if tuple(summary.k_min.shape) != expected or len(summary.start) != k.shape[0]:
        raise InputError(
            problem(
                "summary",
                expected=f"the complete pages of these keys, {expected}",
                got=tuple(summary.k_min.shape),
                fix="Pass the summary of exactly these keys, or None.",
            )
        )


def check_finite(**tensors: Tensor) -> None:
    """Raise ``InputError`` when a tensor holds NaN or infinity.

    One pass over each tensor on CPU; skipped on accelerators, where reading the answer would stall
    the stream.
    """
    read = {
        name: x.detach() if x.requires_grad else x
        for name, x in tensors.items()
        if x.device.type == "cpu" and x.numel()
    }
    name = _first_not_finite(read) if read else None
    if name is not None:
        raise InputError(
            problem(
                name,
                expected="finite values",
                got="NaN or infinity",
                fix="Look for an overflow in the layer that produced it.",
            )
        )


def _first_not_finite(tensors: dict[str, Tensor]) -> str | None:
    operators = compiled.operators()
    if operators is not None and all(x.ndim == 4 and x.stride(3) == 1 for x in tensors.values()):
        found = operators.first_not_finite(list(tensors.values()))
        return None if found < 0 else list(tensors)[found]
    for name, x in tensors.items():
        # 16-bit sums accumulate in fp32; an fp16 overflow only costs the second look.
        if not math.isfinite(x.sum().item()) and not torch.isfinite(x).all():
            return name
    return None


def _span(indices: Tensor) -> slice | Tensor:
    """A slice for contiguous ascending indices, the indices themselves otherwise."""
    if indices.numel() == 0:
        return slice(0, 0)
    first, last = int(indices[0]), int(indices[-1])
    return slice(first, last + 1) if last - first + 1 == indices.numel() else indices


def split_padding(key_mask: Tensor, q_len: int, k_len: int, aligned: bool) -> list[RowGroup]:
    """Group batch rows by their real keys, so that kernels never meet a padded token.

    Args:
        key_mask: bool ``[B, Lk]``.
        q_len: Number of queries.
        k_len: Number of keys.
        aligned: True when query i sits at key ``Lk - Lq + i``; a query on a padded key is then
            padding itself and belongs to no group (its output is 0).
    """
    groups: dict[bytes, RowGroup] = {}
    for row, mask in enumerate(key_mask.cpu()):
        key = mask.numpy().tobytes()
        if key in groups:
            groups[key].rows.append(row)
            continue
        keys = _span(mask.nonzero().flatten())
        queries: slice | Tensor = slice(0, q_len)
        if aligned:
            queries = _span(mask[k_len - q_len :].nonzero().flatten())
        groups[key] = RowGroup([row], keys, queries)
    return list(groups.values())


def take(x: Tensor, rows: list[int], positions: slice | Tensor) -> Tensor:
    """Rows and positions of a ``RowGroup`` in ``[B, H, L, D]``; a view when both are contiguous."""
    if rows == list(range(rows[0], rows[0] + len(rows))):
        x = x[rows[0] : rows[0] + len(rows)]
    else:
        x = x[rows]
    return x[:, :, positions.to(x.device) if isinstance(positions, Tensor) else positions]


def indices(positions: slice | Tensor, device: torch.device) -> Tensor:
    """Positions of a ``RowGroup``, one by one."""
    if isinstance(positions, Tensor):
        return positions.to(device)
    return torch.arange(positions.start, positions.stop, device=device)


def places(group: RowGroup, heads: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of a group's rows, of all heads and of its queries, to broadcast to ``[R, H, L]``."""
    rows = torch.tensor(group.rows, device=device)
    query = indices(group.queries, device)
    return rows[:, None, None], torch.arange(heads, device=device)[:, None], query


def tracked(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether gradients are recorded."""
    return torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)


def check_transform(backend: str) -> None:
    """Refuse what happens inside ``torch.func.vmap``, and ``grad`` unless of the reference.

    Raises:
        UnsupportedError: It is under way.
    """
    transform: Any = _transform()
    if transform is None:
        return
    kind = transform.key()
    kinds = torch._C._functorch.TransformType
    if kind == kinds.Vmap or kind == kinds.Grad and backend != "reference":
        raise UnsupportedError(
            problem(
                f"torch.func.{kind.name.lower()}",
                expected="a call outside of it",
                got="one inside",
                fix="Put what vmap would add into the batch; differentiate with torch.autograd, or "
                "use backend='reference' inside torch.func.grad.",
            )
        )


def are_plain(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether these are dense tensors of no other class, q and k with 4 axes, and nothing else is
    under way: tangents, transforms, autocast.
    """
    return (
        type(q) is type(k) is type(v) is Tensor
        and q.layout is k.layout is v.layout is torch.strided
        and q.dim() == k.dim() == 4
        and _transform() is None
        and not torch._C._is_any_autocast_enabled()
        # Nobody follows tangents: to ask each tensor takes a tenth of a short call.
        and (forward_ad._current_level < 0 or not carry_tangents(q, k, v))
    )


def carry_tangents(*inputs: Tensor) -> bool:
    """Whether forward-mode differentiation follows one of them."""
    return any(forward_ad.unpack_dual(x).tangent is not None for x in inputs)
