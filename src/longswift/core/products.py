"""Batched matrix products through whichever library is fast on this processor."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from longswift.core.hardware import cpu_multiplies_fast, onednn_beats_blas
from longswift.core.softmax import accumulator_dtype

# Multiply-adds below which a call to oneDNN costs more than it saves.
_WORTH_A_CALL = 1 << 21
# Columns of one call. oneDNN compiles and keeps (about 1 MB) a product for every shape it meets.
_COLUMNS, _COLUMN_STEP = 1024, 256


def factor_dtype(x: Tensor) -> torch.dtype:
    """Dtype in which ``x`` is multiplied: its own, or fp32 where low precision is the slow path."""
    if x.device.type == "cpu" and not cpu_multiplies_fast(x.dtype):
        return accumulator_dtype(x.dtype)
    return x.dtype


def bmm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """``torch.bmm(a, b)`` for ``a [Z, R, K]`` and ``b [Z, K, N]``, without gradients.

    fp32 products on a CPU whose BLAS is slow go to oneDNN, one problem at a time.

    Args:
        a: Left factors, any strides.
        b: Right factors; fastest when every ``b[z]`` or its transpose is contiguous.
        out: ``[Z, R, N]``, any strides, perhaps of a wider dtype, or None.
    """
    problems, rows, inner = a.shape
    width = b.shape[2]
    widened = out is not None and out.dtype != a.dtype
    if not widened and not _by_onednn(a, rows * inner * width):
        return torch.bmm(a, b) if out is None else torch.bmm(a, b, out=out)
    if not _dense(b.stride(2), b.stride(1), inner):
        # oneDNN falls back to a scalar loop on rows or columns that lie apart.
        if not _dense(b.stride(1), b.stride(2), width):
            b = b.contiguous()
        if width > _COLUMNS:
            b = b.transpose(1, 2).contiguous().transpose(1, 2)
    if out is None:
        if problems == 1:
            return _multiply(a[0], b[0]).unsqueeze(0)
        out = torch.empty(problems, rows, width, dtype=a.dtype, device=a.device)
    for part in _columns(width):
        for left, right, result in zip(
            a.unbind(), b[..., part].unbind(), out[..., part].unbind(), strict=True
        ):
            result.copy_(mm(left, right))
    return out


def _columns(width: int) -> Iterator[slice]:
    """Slices of few different lengths that cover ``width`` columns; the last two may overlap."""
    for first in range(0, width, _COLUMNS):
        end = min(first + _COLUMNS, width)
        length = -(-(end - first) // _COLUMN_STEP) * _COLUMN_STEP
        yield slice(max(0, end - length), end)


def mm(a: Tensor, b: Tensor) -> Tensor:
    """``a [R, K] @ b [K, N]`` likewise; ``b`` or its transpose is contiguous."""
    if _by_onednn(a, a.shape[0] * b.numel()):
        return _multiply(a, b)
    return torch.mm(a, b)


def _by_onednn(a: Tensor, work: int) -> bool:
    return (
        work >= _WORTH_A_CALL
        and a.dtype == torch.float32
        and a.device.type == "cpu"
        and onednn_beats_blas()
    )


def _dense(outer: int, inner: int, extent: int) -> bool:
    return inner == 1 and outer == extent


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """``a [R, K] @ b [K, N]`` as a linear layer, the one fp32 product torch gives to oneDNN."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return product
