"""What the processor at hand computes quickly."""

from __future__ import annotations

import functools

import torch


@functools.cache
def cpu_multiplies_fast(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of a 16-bit ``dtype`` faster than fp32 ones.

    bf16 needs AMX or AVX512-BF16, fp16 needs AMX-FP16; elsewhere both are emulated, slower than
    fp32.
    """
    probes = {
        torch.bfloat16: ("_is_amx_tile_supported", "_is_avx512_bf16_supported"),
        torch.float16: ("_is_amx_fp16_supported",),
    }
    found = (getattr(torch.cpu, name, None) for name in probes.get(dtype, ()))
    return any(probe is not None and probe() for probe in found)
