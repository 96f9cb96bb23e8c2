"""Compiles every Triton kernel to GPU machine code, which needs no GPU. Run as a module."""

from __future__ import annotations

import re
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
    centroid_kernels,
    choosing,
    column_kernels,
    exact_kernels,
    forward,
    linear_kernels,
    picking_kernels,
    rest,
    rest_kernels,
    scoring,
    shares,
    sums,
)
from longswift.kernels.triton.launch import Shape, bias_options, precision, rows_of_tile
from longswift.kernels.triton.tables import tables

FLOATS = {"OUT", "LSE", "DELTA", "D_Q", "D_K", "D_V", "SHARES", "TARGET", "ROWS", "KEYS", "RANK"}
FLOATS |= {"EXTRA", "STATES", "NORM", "BIAS", "D_BIAS", "LOG"}
FLOATS |= {"SUMS", "TOTALS", "BAND_LSE", "K_SUM", "V_SUM", "K_GRAIN", "V_GRAIN"}
INPUTS = {"MEANS", "Q", "K", "V", "D_OUT", "X", "Y", "U", "MEAN_K", "MEAN_V"}
TABLES = {"FIRST", "END", "TOKENS", "SINCE", "UNTIL", "ROW_FIRST", "ROW_END"}
TABLES |= {"ORDER", "STARTS", "COUNT", "LIMIT", "BANDS", "HEADS"}
TABLES |= {"HALVES", "EDGES"}
CHOSEN = {
    "rank_keys": {"RANKS": "i16"},
    "pick_keys": {"RANKS": "i16", "INDEX": "i32"},
    "row_totals": {"INDEX": "i32"},
    "key_shares": {"RANKS": "fp32", "INDEX": "i32"},
    "pick_tokens": {"RANKS": "fp32", "INDEX": "i32"},
}
SPECIAL = {"scale": "fp32", "OUTSIDE": "*i8", "INDEX": "*i64"}
# A negative filler of a masked load of narrow integers: the upper ones of a word become -1.
MISFILLED = re.compile(r"mov\.[bsu]32\s+%\w+,\s*0xf{12}(?!ffff)[0-9a-f]{4}\b", re.IGNORECASE)


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
        elif name in INPUTS:
            signature[name] = "*" + inputs
        elif name in CHOSEN.get(kernel.__name__, ()):
            signature[name] = "*" + CHOSEN[kernel.__name__][name]
        elif name in FLOATS:
            signature[name] = "*fp32"
        elif name in TABLES:
            signature[name] = "*i32"
        else:
            signature[name] = SPECIAL.get(name, "i32")
    # As of aligned tensors whose strides are multiples of 16: only then are loads of whole words.
    even = {
        (p.num,): [["tt.divisibility", 16]]
        for p in kernel.params
        if signature[p.name].startswith("*")
        or signature[p.name] == "i32"
        and not p.do_not_specialize
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=even)
    target = GPUTarget("cuda", sm, 32)
    compiled = triton.compile(source, target=target, options=options)
    wrong = MISFILLED.search(compiled.asm["ptx"])
    if wrong:
        raise AssertionError(f"{kernel.__name__} fills words wrongly: {wrong[0]}")
    return int(compiled.metadata.shared)


def attention(dtype: torch.dtype, dim: int, groups: int) -> tuple[dict[str, Any], int]:
    """Constants and warps of the attention kernels."""
    bands = (Band(tile=128, left=128),) * 2
    tokens = torch.zeros(1, 2, 4, 16, dtype=torch.int32)
    pattern = BlockPattern(causal=True, bands=bands, block=128, tokens=tokens)
    q, k = (torch.empty(1, h, 512, dim, dtype=dtype, device="meta") for h in (2 * groups, 2))
    shape = Shape.of(q, k, k, tables(pattern, 1, 512, 512, tokens.device))
    return shape.constants(), shape.warps


def outside(dtype: torch.dtype, dim: int, groups: int) -> list[tuple[Any, dict[str, Any], int]]:
    """Kernels of what lies outside bands, with their constants and warps."""
    q, k = (torch.empty(1, h, 512, dim, dtype=dtype, device="meta") for h in (2 * groups, 2))
    seen = rest.outside_options(q, k, k, 128, True)
    filled = rest.column_options(k, k, seen["N"], True)
    seen |= {"COMPARED": True, "POOLED": True}
    return [
        (kernel, values, values.pop("num_warps"))
        for kernel, values in (
            (rest_kernels.attend_outside, seen),
            (column_kernels.fill_columns, filled),
        )
    ]


def chosen(dim: int, groups: int, tier: int) -> list[tuple[Any, dict[str, Any]]]:
    """Kernels of the choice by centroids, with their constants."""
    width = {"D": dim, "D_PAD": dim, "HKV": 2}
    heads, causal = {**width, "G": groups}, {"CAUSAL": True, "EXACT": "tf32"}
    tiles = {name: of[tier].options() for name, of in choosing._TILES.items()}
    halved = {"MEMBERS": 128, "PAD": 128, "AT_ONCE": 1, "STEP": choosing._HALVED // dim}
    sample = {"MANY": 4096, "EVERY": 8, "FIRST": 4, "TOGETHER": 16}
    exact = {"EXACT": precision()}
    return [
        (centroid_kernels.halve, {**heads, **halved, "WHOLE": False, "SPARE": 16, "num_warps": 8}),
        (
            centroid_kernels.average,
            {**heads, "MEMBERS": 4, "AT_ONCE": 32, "LARGEST": 3e38, "num_warps": 4},
        ),
        (centroid_kernels.log_sums, {**width, **causal, **sample, **tiles["log_sums"]}),
        (centroid_kernels.rank_keys, {**width, **causal, "GROUPS": 32, **tiles["rank_keys"]}),
        (
            picking_kernels.pick_keys,
            {"HKV": 2, "N": 2048, "TILE": 64, "CAUSAL": False, "num_warps": 8},
        ),
        (exact_kernels.row_totals, {**heads, **exact, "TOGETHER": 16, **tiles["row_totals"]}),
        (exact_kernels.key_shares, {**heads, **exact, **tiles["key_shares"]}),
        (picking_kernels.pick_tokens, {"N": 4096, "num_warps": 8}),
    ]


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
    constants, warps = attention(torch.bfloat16, 128, 1)
    fewer = {**constants, **plain, "num_stages": 2}
    for kernel, values in (
        (backward_kernels.d_queries, {**fewer, "TRACKED": False, "D_BIAS": None}),
        (backward_kernels.d_band_keys, fewer),
        (backward_kernels.d_slots, fewer),
    ):
        print(kernel.__name__, "bf16", 128, 86, compile_for(kernel, values, "bf16", warps, 86))
    constants, warps = attention(torch.float32, 32, 1)
    values = {**constants, "BAND": True, **plain}
    print("_forward", "fp32", 32, 80, compile_for(forward._forward, values, "fp32", warps, 80))
    for name, dim, groups, sm in (
        ("bfloat16", 128, 4, 90),
        ("bfloat16", 256, 1, 80),
        ("float32", 256, 1, 80),
    ):
        for kernel, values, warps in outside(getattr(torch, name), dim, groups):
            inputs = "bf16" if name == "bfloat16" else "fp32"
            shared = compile_for(kernel, values, inputs, warps, sm)
            print(kernel.__name__, inputs, dim, sm, shared)
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
    for inputs, dim, tier, sm in (("bf16", 128, 0, 90), ("fp32", 128, 1, 80), ("fp32", 256, 2, 80)):
        for kernel, values in chosen(dim, 4, tier):
            shared = compile_for(kernel, values, inputs, values.pop("num_warps"), sm)
            # The first of the tiles are for GPUs that have more.
            print(kernel.__name__, inputs, dim, sm, shared if tier else shared * 99 // 160)
    for kernel, values in chosen(128, 4, 0)[2:4]:
        shared = compile_for(kernel, values, "fp8e4nv", values.pop("num_warps"), 90)
        print(kernel.__name__, "fp8", 128, 90, shared)
    rank = {"HKV": 2, "F": 192, "BF": scoring._FEATURES, "R": scoring._ROWS, "N": scoring._BLOCKS}
    best = {"BITS": scoring._BITS, "N": scoring._CANDIDATES}
    for kernel, values in ((scoring._rank, {**rank, "EXACT": precision()}), (scoring._best, best)):
        print(kernel.__name__, "fp32", 64, 80, compile_for(kernel, values, "fp32", 4, 80))
    for dtype, dim, groups, sm in (("bf16", 64, 3, 90), ("fp32", 128, 1, 80)):
        for kernel, values in linear(dim, groups):
            print(kernel.__name__, dtype, dim, sm, compile_for(kernel, values, dtype, 4, sm))


if __name__ == "__main__":
    main()
