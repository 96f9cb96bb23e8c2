"""Kernels of linear attention: sums of outer products per chunk, their scan, and reading them.

Products are as precise as fp32, whatever the inputs.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from longswift.kernels.triton.forward import load_heads

# Lengths are plain numbers to a kernel: Triton would compile again for 1 and for multiples of 16.
_LENGTHS = ("length", "lines", "keys", "chunk", "chunks")


@triton.jit(do_not_specialize=_LENGTHS)
def chunk_sums(
    Y,
    U,
    EXTRA,
    STATES,
    length,
    chunk,
    chunks,
    y_b,
    y_h,
    y_l,
    u_b,
    u_h,
    u_l,
    HKV: tl.constexpr,
    G: tl.constexpr,
    F: tl.constexpr,
    DV: tl.constexpr,
    BF: tl.constexpr,
    BV: tl.constexpr,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    ACC: tl.constexpr,
    EXACT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Sums of ``y u^T`` and ``y`` (times the extra channel) over one chunk, one place later."""
    batch = (tl.program_id(1) // HKV).to(tl.int64)
    head = (tl.program_id(1) % HKV).to(tl.int64)
    feature = tl.program_id(2) // tl.cdiv(DV, BV) * BF
    channel = tl.program_id(2) % tl.cdiv(DV, BV) * BV
    Y += batch * y_b + head * G * y_h + feature
    U += batch * u_b + head * G * u_h + channel
    group = tl.arange(0, N) // ROWS
    s = tl.zeros([BF, BV], ACC)
    z = tl.zeros([BF], ACC)
    first = tl.program_id(0) * chunk
    end = tl.minimum(first + chunk, length)
    for start in range(first, end, ROWS):
        index = start + tl.arange(0, N) % ROWS
        exists = (index < end) & (group < G)
        row = index
        if REVERSE:
            row = length - 1 - index
        y = load_heads(Y, row, group, exists, y_h, y_l, F - feature, BF).to(ACC)
        u = load_heads(U, row, group, exists, u_h, u_l, DV - channel, BV).to(ACC)
        s += tl.dot(tl.trans(y), u, input_precision=EXACT, out_dtype=ACC)
        if WEIGHTED:
            line = ((batch * HKV + head) * G + group) * length + row
            y *= tl.load(EXTRA + line, mask=exists, other=0.0)[:, None]
        z += tl.sum(y, 0)
    STATES += ((batch * HKV + head) * (chunks + 1) + tl.program_id(0) + 1) * F * (DV + 1)
    at = feature + tl.arange(0, BF)
    column = channel + tl.arange(0, BV)
    inside = (at < F)[:, None] & (column < DV)[None, :]
    tl.store(STATES + at[:, None] * DV + column[None, :], s, mask=inside)
    if channel == 0:
        tl.store(STATES + F * DV + at, z, mask=at < F)


@triton.jit(do_not_specialize=_LENGTHS)
def scan(STATES, chunks, SIZE: tl.constexpr, N: tl.constexpr, ACC: tl.constexpr):
    """Every state becomes the sum of all up to it."""
    at = tl.program_id(0) * N + tl.arange(0, N)
    STATES += tl.program_id(1).to(tl.int64) * (chunks + 1) * SIZE
    total = tl.zeros([N], ACC)
    for _ in range(0, chunks + 1):
        total += tl.load(STATES + at, mask=at < SIZE, other=0.0)
        tl.store(STATES + at, total, mask=at < SIZE)
        STATES += SIZE


@triton.jit(do_not_specialize=_LENGTHS)
def read(
    X,
    Y,
    U,
    EXTRA,
    STATES,
    LIMIT,
    OUT,
    NORM,
    lines,
    keys,
    chunk,
    chunks,
    s_x,
    s_u,
    x_b,
    x_h,
    x_l,
    y_b,
    y_h,
    y_l,
    u_b,
    u_h,
    u_l,
    HKV: tl.constexpr,
    LINE_G: tl.constexpr,
    KEY_G: tl.constexpr,
    SIZE: tl.constexpr,
    DX: tl.constexpr,
    DU: tl.constexpr,
    BX: tl.constexpr,
    BU: tl.constexpr,
    ROWS: tl.constexpr,
    M: tl.constexpr,
    KEY_ROWS: tl.constexpr,
    N: tl.constexpr,
    ACC: tl.constexpr,
    EXACT: tl.constexpr,
    LEAST: tl.constexpr,
    NORMED: tl.constexpr,
    DIVIDED: tl.constexpr,
    OF_LINES: tl.constexpr,
    OF_KEYS: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """What each line gets from the sums before its tile's chunk and from the keys behind them."""
    problem = tl.program_id(1).to(tl.int64)
    batch, head = problem // HKV, problem % HKV
    index = tl.program_id(0) * ROWS + tl.arange(0, M) % ROWS
    group = tl.arange(0, M) // ROWS
    exists = (index < lines) & (group < LINE_G)
    limit = tl.load(LIMIT + index, mask=exists, other=0)
    high = tl.max(limit, 0)
    # Limits never decrease: the first line's says which chunks every line sees whole.
    low = tl.load(LIMIT + tl.program_id(0) * ROWS)
    whole = tl.where(low < keys, low // chunk, chunks)
    row = index
    if REVERSE:
        row = lines - 1 - index
    line = (problem * LINE_G + group) * lines + row
    X += batch * x_b + head * LINE_G * x_h
    Y += batch * y_b + head * KEY_G * y_h
    U += batch * u_b + head * KEY_G * u_h + tl.program_id(2) * BU
    STATES += (problem * (chunks + 1) + whole) * SIZE
    column = tl.program_id(2) * BU + tl.arange(0, BU)
    out = tl.zeros([M, BU], ACC)
    norm = tl.zeros([M], ACC)
    for start in range(0, DX, BX):
        at = start + tl.arange(0, BX)
        x = load_heads(X + start, row, group, exists, x_h, x_l, DX - start, BX).to(ACC)
        inside = (at < DX)[:, None] & (column < DU)[None, :]
        s = tl.load(STATES + at[:, None] * s_x + column[None, :] * s_u, mask=inside, other=0.0)
        out += tl.dot(x, s, input_precision=EXACT, out_dtype=ACC)
        if NORMED:
            z = tl.load(STATES + DX * DU + at, mask=at < DX, other=0.0)
            norm += tl.sum(x * z[None, :], 1)
    if OF_LINES or OF_KEYS:
        z = tl.load(STATES + DX * DU + column, mask=column < DU, other=0.0)
        term = tl.full([M], 1.0, ACC)
        if OF_LINES:
            term = tl.load(EXTRA + line, mask=exists, other=0.0)
        out += term[:, None] * z[None, :]
    key_group = tl.arange(0, N) // KEY_ROWS
    for first in range(tl.minimum(whole * chunk, keys), high, KEY_ROWS):
        key_index = first + tl.arange(0, N) % KEY_ROWS
        real = (key_index < high) & (key_group < KEY_G)
        key = key_index
        if REVERSE:
            key = keys - 1 - key_index
        weights = tl.zeros([M, N], ACC)
        for start in range(0, DX, BX):
            x = load_heads(X + start, row, group, exists, x_h, x_l, DX - start, BX).to(ACC)
            y = load_heads(Y + start, key, key_group, real, y_h, y_l, DX - start, BX).to(ACC)
            weights += tl.dot(x, tl.trans(y), input_precision=EXACT, out_dtype=ACC)
        if OF_LINES:
            weights += term[:, None]
        if OF_KEYS:
            at = (problem * KEY_G + key_group) * keys + key
            weights += tl.load(EXTRA + at, mask=real, other=0.0)[None, :]
        weights = tl.where(real[None, :] & (key_index[None, :] < limit[:, None]), weights, 0.0)
        u = load_heads(U, key, key_group, real, u_h, u_l, DU - tl.program_id(2) * BU, BU).to(ACC)
        out += tl.dot(weights, u, input_precision=EXACT, out_dtype=ACC)
        norm += tl.sum(weights, 1)
    if NORMED:  # noqa: SIM102 (known when it is compiled, the other is not)
        # Not in the mask: the interpreter of Triton 3.9 takes no mask made of a scalar.
        if tl.program_id(2) == 0:
            tl.store(NORM + line, norm, mask=exists)
    if DIVIDED:
        fine = norm > LEAST
        out = tl.where(fine[:, None], out / tl.where(fine, norm, 1.0)[:, None], 0.0)
    inside = exists[:, None] & (column < DU)[None, :]
    tl.store(OUT + line[:, None] * DU + column[None, :], out, mask=inside)
