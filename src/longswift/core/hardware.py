"""What the processor at hand computes quickly."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch


@functools.cache
def cpu_multiplies_fast(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of a 16-bit ``dtype`` faster than fp32 ones.

    bf16 needs AMX or AVX512-BF16, fp16 needs AMX-FP16; elsewhere both are emulated, slower than
    fp32.
    """
    dots = dtype == torch.bfloat16 and _probe("_is_avx512_bf16_supported")
    return dots or cpu_has_tile_unit(dtype)


@functools.cache
def cpu_has_tile_unit(dtype: torch.dtype) -> bool:
    """Whether this CPU has a unit for products of tiles (AMX) of a ``dtype``."""
    probes = {torch.bfloat16: "_is_amx_tile_supported", torch.float16: "_is_amx_fp16_supported"}
    return dtype in probes and _probe(probes[dtype])


def _probe(name: str) -> bool:
    probe = getattr(torch.cpu, name, None)
    return probe is not None and bool(probe())


@functools.cache
def onednn_beats_blas() -> bool:
    """Whether oneDNN multiplies fp32 matrices faster than the BLAS that ``torch.matmul`` calls.

    So on AMD: MKL does not use AVX-512 there, and half of the processor idles. Read off the names
    of the two rather than timed, so that every run of a program computes the same.
    """
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    return "AVX512" in torch.backends.cpu.get_cpu_capability() and "AMD" in _cpu_vendor()


def _cpu_vendor() -> str:
    """``AuthenticAMD``, ``GenuineIntel``, ..., or what Python knows where there is no /proc."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith("vendor_id")), "")


# Measured with the default configuration, see docs/performance.md.
_CROSSOVERS = {"cpu": 4096, "cuda": 16384}
# Bytes of keys and values that a device reads while MS-SWIFT chooses for a single row.
_READ_BY_ROW = {"cpu": 1 << 24, "cuda": 1 << 32}
# Queries that cost hardly more to read for than one does.
_READ_TOGETHER = 4
# Rows for which as many choices cost less than one for all of them, which looks at every key.
_DECODED = {"cpu": 8}


def crossover(device: torch.device | str) -> int:
    """Positions up to which full attention is cheaper on a device than MS-SWIFT is."""
    return _CROSSOVERS.get(torch.device(device).type, _CROSSOVERS["cpu"])


def decoded_rows(device: torch.device | str) -> int:
    """Rows of a call up to which each chooses for itself, as when they are decoded in turn."""
    return _DECODED.get(torch.device(device).type, 1)


def row_crossover(k: torch.Tensor, *, queries: int = 1, summarised: bool) -> int:
    """The same for few queries, which have all ``k [B, Hkv, Lk, D]`` and as wide values read.

    Without page summaries a choice would read all keys, too. Each query has a choice of its own,
    while keys are read once for some of them.
    """
    if not summarised:
        return k.shape[2]
    read = _READ_BY_ROW.get(k.device.type, 0) * min(queries, _READ_TOGETHER)
    return max(crossover(k.device), read // (2 * k.shape[1] * k.shape[3] * k.element_size()))
