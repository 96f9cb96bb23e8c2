"""Compiles every Triton kernel to GPU machine code, which needs no GPU. Run as a module."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from longswift.core.bias import ScoreBias
from longswift.core.pattern import Band, BlockPattern
from longswift.kernels.triton import (
    backward_kernels,
    band_kernels,
    bands,
    forward,
    linear_kernels,
    scoring,
    shares,
    sums,
)
from longswift.kernels.triton.launch import Shape, bias_options, precision, rows_of_tile
from longswift.kernels.triton.tables import tables

FLOATS = {"OUT", "LSE", "DELTA", "D_Q", "D_K", "D_V", "SHARES", "TARGET", "ROWS", "KEYS", "RANK"}
FLOATS |= {"EXTRA", "STATES", "NORM", "BIAS", "D_BIAS"}
TABLES = {"FIRST", "END", "TOKENS", "SINCE", "UNTIL", "ROW_FIRST", "ROW_END"}
TABLES |= {"ORDER", "STARTS", "COUNT", "LIMIT", "HEADS"}
SPECIAL = {"scale": "fp32", "OUTSIDE": "*i8", "INDEX": "*i64"}


def compile_for(kernel: Any, constants: dict[str, Any], inputs: str, warps: int, sm: int) -> int:
    """Bytes of shared memory of the compiled kernel."""
    constants = dict(constants)
    options = {"num_warps": warps}
    for name in ("num_stages", "maxnreg"):
        if name in constants:
            options[name] = constants.pop(name)
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("K", "V") and constants.get("DESCRIBED"):
            width = constants["D_PAD" if name == "K" else "DV_PAD"]
            signature[name] = f"tensordesc<{inputs}[1,1,{constants['N']},{width}]>"
        elif name in ("Q", "K", "V", "D_OUT", "X", "Y", "U"):
            signature[name] = "*" + inputs
        elif name in FLOATS:
            signature[name] = "*fp32"
        elif name in TABLES:
            signature[name] = "*i32"
        else:
            signature[name] = SPECIAL.get(name, "i32")
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    target = GPUTarget("cuda", sm, 32)
    return int(triton.compile(source, target=target, options=options).metadata.shared)


def attention(dtype: torch.dtype, dim: int, groups: int) -> tuple[dict[str, Any], int]:
    """Constants and warps of the attention kernels."""
    bands = (Band(tile=128, left=128),) * 2
    tokens = torch.zeros(1, 2, 4, 16, dtype=torch.int32)
    pattern = BlockPattern(causal=True, bands=bands, block=128, tokens=tokens)
    q, k = (torch.empty(1, h, 512, dim, dtype=dtype, device="meta") for h in (2 * groups, 2))
    shape = Shape.of(q, k, k, tables(pattern, 1, 512, 512, tokens.device))
    return shape.constants(), shape.warps


def lean(dtype: torch.dtype, dim: int, groups: int, described: bool) -> tuple[dict[str, Any], int]:
    """Constants and warps of the kernel of bands alone."""
    cut = bands.cut_of(dtype, dim, dim)
    rows = rows_of_tile(cut.lines, groups, 512)
    constants = bands.constants(dtype, groups, dim, dim, rows, cut)
    options = {name: value for name, value in cut.options().items() if name != "num_warps"}
    variant = {"CAUSAL": True, "DESCRIBED": described and cut.described}
    return {**constants, **options, **variant}, cut.warps


def linear(dim: int, groups: int) -> list[tuple[Any, dict[str, Any]]]:
    """Kernels of linear attention with their constants, the heaviest variant of each."""
    tile = {"ACC": tl.float32, "EXACT": precision()}
    tall, wide, size = min(sums._TALL, dim), min(sums._WIDE, dim), dim * (dim + 1)
    stacked = triton.next_power_of_2(groups)
    rows, key_rows = (rows_of_tile(x, groups, 128) for x in (sums._LINES, sums._KEYS))
    total = {"HKV": 2, "G": groups, "F": dim, "DV": dim, "BF": tall, "BV": wide, **tile}
    total |= {"ROWS": key_rows, "N": key_rows * stacked, "WEIGHTED": True, "REVERSE": True}
    shape = {"HKV": 2, "SIZE": size, "DX": dim, "DU": dim, "BX": tall, "BU": wide, **tile}
    lines = {"LINE_G": groups, "ROWS": rows, "M": rows * stacked}
    shape |= {**lines, "KEY_G": 1, "KEY_ROWS": sums._KEYS, "N": sums._KEYS, "LEAST": 1e-30}
    plain = {"NORMED": True, "DIVIDED": True, "OF_LINES": False, "OF_KEYS": False}
    turned = {"NORMED": False, "DIVIDED": False, "OF_LINES": True, "OF_KEYS": False}
    return [
        (linear_kernels.chunk_sums, total),
        (linear_kernels.scan, {"SIZE": size, "N": sums._SCANNED, "ACC": tl.float32}),
        (linear_kernels.read, {**shape, **plain, "REVERSE": False, "EXTRA": None}),
        (linear_kernels.read, {**shape, **turned, "REVERSE": True, "NORM": None}),
    ]


def main() -> None:
    """Kernel, head width, target and shared memory, a line each."""
    constants, warps = attention(torch.bfloat16, 64, 3)
    some = ScoreBias(values=torch.empty(6, 1023), zero=511)
    biased, plain = bias_options(some), {**bias_options(None), "BIAS": None}
    share = {"WIDTH": 64, "STRIDE": 128, "PAD": 64, "N": 16, "ACC": constants["ACC"]}
    for kernel, values in (
        (forward._forward, {**constants, "BAND": True, **biased}),
        (forward._forward, {**constants, "BAND": True, **plain}),
        (backward_kernels.d_queries, {**constants, "TRACKED": True, **biased}),
        (backward_kernels.d_queries, {**constants, "TRACKED": False, "D_BIAS": None, **plain}),
        (backward_kernels.d_band_keys, {**constants, **biased}),
        (backward_kernels.d_slots, {**constants, **biased}),
        (shares._add_shares, share),
    ):
        print(kernel.__name__, "bf16", 64, 90, compile_for(kernel, values, "bf16", warps, 90))
    constants, warps = attention(torch.float32, 32, 1)
    values = {**constants, "BAND": True, **plain}
    print("_forward", "fp32", 32, 80, compile_for(forward._forward, values, "fp32", warps, 80))
    for dtype, name, dim, groups, sm, described in (
        (torch.bfloat16, "bf16", 128, 4, 90, True),
        (torch.bfloat16, "bf16", 64, 3, 90, True),
        (torch.bfloat16, "bf16", 128, 1, 80, False),
        (torch.bfloat16, "bf16", 256, 1, 80, False),
        (torch.float32, "fp32", 128, 1, 80, False),
        (torch.float32, "fp32", 256, 1, 80, False),
    ):
        values, warps = lean(dtype, dim, groups, described)
        print("bands", name, dim, sm, compile_for(band_kernels.bands, values, name, warps, sm))
    rank = {"HKV": 2, "F": 192, "BF": scoring._FEATURES, "R": scoring._ROWS, "N": scoring._BLOCKS}
    best = {"BITS": scoring._BITS, "N": scoring._CANDIDATES}
    for kernel, values in ((scoring._rank, {**rank, "EXACT": precision()}), (scoring._best, best)):
        print(kernel.__name__, "fp32", 64, 80, compile_for(kernel, values, "fp32", 4, 80))
    for dtype, dim, groups, sm in (("bf16", 64, 3, 90), ("fp32", 128, 1, 80)):
        for kernel, values in linear(dim, groups):
            print(kernel.__name__, dtype, dim, sm, compile_for(kernel, values, dtype, 4, sm))


if __name__ == "__main__":
    main()
