"""Bands without a reach or a bias, by a kernel that needs no tables."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from longswift.core.pattern import Band
from longswift.kernels.triton import band_kernels
from longswift.kernels.triton.launch import accumulator, padded, precision, rows_of_tile

# Lengths and bands of which the kernel's 32-bit sums are sure.
_LONGEST = 1 << 29


class Cut(NamedTuple):
    """How a problem is cut.

    Attributes:
        lines: Most query lines of a program, rows times heads of a group.
        keys: Keys of a step.
        warps: Warps of a program.
        stages: Steps in flight.
        described: Whether keys are fetched by the GPU's copy engine (TMA), where it has one.
        registers: Most registers of a thread, or None: 128 let two programs of 8 warps share a
            multiprocessor.
    """

    lines: int
    keys: int
    warps: int
    stages: int
    described: bool = False
    registers: int | None = None

    def options(self) -> dict[str, int]:
        """What Triton's compiler is told."""
        found = {"num_warps": self.warps, "num_stages": self.stages}
        if self.registers is not None and not torch.version.hip:
            found["maxnreg"] = self.registers
        return found


# By bytes of a number and channels of the wider of keys and values.
CUTS = {
    (2, 64): Cut(128, 64, 8, 3, described=True, registers=128),
    (2, 128): Cut(128, 64, 8, 2, described=True, registers=128),
    (2, 256): Cut(64, 32, 4, 2, described=True),
    (4, 64): Cut(64, 32, 4, 2),
    (4, 128): Cut(32, 16, 4, 2),
    (4, 256): Cut(16, 16, 8, 2),
}


def takes(bands: tuple[Band, ...], scale: float, q_len: int, k_len: int) -> bool:
    """Whether the kernel computes these bands."""
    small = max(q_len, k_len) < _LONGEST and all(band.tile < _LONGEST for band in bands)
    return small and scale > 0.0 and all(band.reach is None for band in bands)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bands: tuple[Band, ...],
    causal: bool,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Attention over bands that ``takes`` accepts.

    Args:
        q: ``[B, Hq, Lq, D]``, unit stride along D, like k, v and out.
        k: ``[B, Hkv, Lk, D]``.
        v: ``[B, Hkv, Lk, Dv]``.
        bands: One per KV head.
        causal: Whether keys after a query are hidden.
        scale: Factor on the scores, above 0.
        out: ``[B, Hq, Lq, Dv]`` to write to, of any dtype.
        lse: ``[B, Hq, Lq]`` to write to, unit stride along Lq.
    """
    batch, heads, q_len, dim = q.shape
    kv_heads, k_len, v_dim = k.shape[1], k.shape[2], v.shape[3]
    if out.numel() == 0 and lse.numel() == 0:
        return
    cut = cut_of(q.dtype, dim, v_dim)
    rows = rows_of_tile(cut.lines, heads // kv_heads, q_len)
    before = (k_len - q_len) % rows
    tile, left, right = _numbers(bands[0])
    keys, values, described = _sources(k, v, cut)
    band_kernels.bands[(triton.cdiv(before + q_len, rows), batch * kv_heads)](
        q,
        keys,
        values,
        out,
        lse,
        None if len(set(bands)) == 1 else _table(bands, q.device),
        scale,
        tile,
        left,
        right,
        q_len,
        k_len,
        before,
        batch,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *out.stride()[:3],
        *lse.stride()[:2],
        **constants(q.dtype, heads // kv_heads, dim, v_dim, rows, cut),
        CAUSAL=causal,
        DESCRIBED=described,
        **cut.options(),
    )


def cut_of(dtype: torch.dtype, dim: int, v_dim: int) -> Cut:
    """The entry of ``CUTS``."""
    width = max(64, padded(max(dim, v_dim)))
    # fp64 is for the interpreter, to which sizes are all one.
    return CUTS[min(dtype.itemsize, 4), width]


def constants(
    dtype: torch.dtype, groups: int, dim: int, v_dim: int, rows: int, cut: Cut
) -> dict[str, Any]:
    """Compile-time arguments that depend on neither lengths nor bands."""
    return {
        "G": groups,
        "D": dim,
        "DV": v_dim,
        "D_PAD": padded(dim),
        "DV_PAD": padded(v_dim),
        "ROWS": rows,
        "M": rows * triton.next_power_of_2(groups),
        "N": cut.keys,
        "ACC": accumulator(dtype),
        "EXACT": precision(),
    }


def _numbers(band: Band) -> tuple[int, int, int]:
    """Tile, left and right, what lies beyond every text cut off."""
    return band.tile, min(band.left, _LONGEST), max(-_LONGEST, min(band.right, _LONGEST))


@functools.lru_cache(maxsize=64)
def _table(bands: tuple[Band, ...], device: torch.device) -> Tensor:
    """Head, tile, left and right of every KV head, int32 ``[Hkv, 4]``, the widest band first."""
    order = sorted(range(len(bands)), key=lambda h: -bands[h].tile - bands[h].left)
    lines = [(head, *_numbers(bands[head])) for head in order]
    return torch.tensor(lines, dtype=torch.int32, device=device)


def _sources(k: Tensor, v: Tensor, cut: Cut) -> tuple[Any, Any, bool]:
    """Keys and values as the kernel takes them, and whether they are descriptors."""
    if not cut.described or not _has_copy_engine(k.device) or not all(map(_describable, (k, v))):
        return k, v, False
    from triton.tools.tensor_descriptor import TensorDescriptor

    found = (TensorDescriptor.from_tensor(x, [1, 1, cut.keys, x.shape[3]]) for x in (k, v))
    return *found, True


@functools.cache
def _has_copy_engine(device: torch.device) -> bool:
    if importlib.util.find_spec("triton.tools.tensor_descriptor") is None or torch.version.hip:
        return False
    # The interpreter copies as such an engine does.
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= (9, 0)


def _describable(x: Tensor) -> bool:
    """What the copy engine asks for: lines that begin at multiples of 16 bytes, and fill a tile."""
    grain = 16 // x.dtype.itemsize
    aligned = x.data_ptr() % 16 == 0 and all(s > 0 and s % grain == 0 for s in x.stride()[:3])
    return aligned and x.shape[3] == padded(x.shape[3])
