"""Compiles every Triton kernel to GPU machine code, which needs no GPU. Run as a module."""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from longswift.core.pattern import Band, BlockPattern
from longswift.kernels.triton import backward, forward, scoring
from longswift.kernels.triton.launch import Shape, precision
from longswift.kernels.triton.tables import tables

FLOATS = {"OUT", "LSE", "DELTA", "D_Q", "D_K", "D_V", "SHARES", "TARGET", "ROWS", "KEYS", "RANK"}
TABLES = {
    *(
        "FIRST",
        "END",
        "TOKENS",
        "SINCE",
        "UNTIL",
        "ROW_FIRST",
        "ROW_END",
        "ORDER",
        "STARTS",
        "COUNT",
    ),
}
SPECIAL = {"scale": "fp32", "OUTSIDE": "*i8", "INDEX": "*i64"}


def compile_for(kernel: Any, constants: dict[str, Any], inputs: str, warps: int, sm: int) -> int:
    """Bytes of shared memory of the compiled kernel."""
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("Q", "K", "V", "D_OUT"):
            signature[name] = "*" + inputs
        elif name in FLOATS:
            signature[name] = "*fp32"
        elif name in TABLES:
            signature[name] = "*i32"
        else:
            signature[name] = SPECIAL.get(name, "i32")
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    target = GPUTarget("cuda", sm, 32)
    return int(triton.compile(source, target=target, options={"num_warps": warps}).metadata.shared)


def attention(dtype: torch.dtype, dim: int, groups: int) -> tuple[dict[str, Any], int]:
    """Constants and warps of the attention kernels."""
    bands = (Band(tile=128, left=128),) * 2
    tokens = torch.zeros(1, 2, 4, 16, dtype=torch.int32)
    pattern = BlockPattern(causal=True, bands=bands, block=128, tokens=tokens)
    q, k = (torch.empty(1, h, 512, dim, dtype=dtype, device="meta") for h in (2 * groups, 2))
    shape = Shape.of(q, k, k, tables(pattern, 1, 512, 512, tokens.device))
    return shape.constants(), shape.warps


def main() -> None:
    """Kernel, head width, target and shared memory, a line each."""
    constants, warps = attention(torch.bfloat16, 64, 3)
    share = {"WIDTH": 64, "STRIDE": 128, "PAD": 64, "N": 16, "ACC": constants["ACC"]}
    for kernel, values in (
        (forward._forward, {**constants, "BAND": True}),
        (backward._d_queries, constants),
        (backward._d_band_keys, constants),
        (backward._d_slots, constants),
        (backward._add_shares, share),
    ):
        print(kernel.__name__, "bf16", 64, 90, compile_for(kernel, values, "bf16", warps, 90))
    constants, warps = attention(torch.float32, 32, 1)
    values = {**constants, "BAND": True}
    print("_forward", "fp32", 32, 80, compile_for(forward._forward, values, "fp32", warps, 80))
    rank = {"HKV": 2, "F": 192, "BF": scoring._FEATURES, "R": scoring._ROWS, "N": scoring._BLOCKS}
    best = {"BITS": scoring._BITS, "N": scoring._CANDIDATES}
    for kernel, values in ((scoring._rank, {**rank, "EXACT": precision()}), (scoring._best, best)):
        print(kernel.__name__, "fp32", 64, 80, compile_for(kernel, values, "fp32", 4, 80))


if __name__ == "__main__":
    main()
