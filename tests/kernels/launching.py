"""Compiles every Triton kernel as its launches would, for GPUs that are not there. Run as a module.

The host's own code runs with tensors on the CPU; where it would launch a kernel, the kernel is
compiled for the arguments at hand, through ``ptxas``, and nothing is run.
"""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from longswift import MSSwift
from longswift.core.bias import ScoreBias
from longswift.core.pattern import Band, BlockPattern
from longswift.core.states import LinearState
from longswift.kernels import dispatch
from longswift.kernels import triton as backend
from longswift.kernels.triton import choosing, launch, limits

# Shared memory that a program may have, by compute capability.
ROOM = {90: 232_448, 80: 166_912, 86: 101_376}
# Two numbers of 16 bits in a word, filled with a negative one as if it were a single number.
MISFILLED = re.compile(r"mov\.u32\s+%r\d+, 0xffffffffffff(?!ffff)[0-9a-f]{4};")


class Driver:
    """A GPU as far as compiling needs one."""

    def __init__(self, sm: int) -> None:
        self._target = GPUTarget("cuda", sm, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


def pretend(sm: int) -> dict[tuple[str, str], int]:
    """Makes launches compile; returns the shared memory of what they compiled, to be filled."""
    compiled: dict[tuple[str, str], int] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        kernel = kernel.result() if hasattr(kernel, "result") else kernel
        found = MISFILLED.search(kernel.asm["ptx"])
        assert found is None, f"{self.fn.__name__}: {found}"
        compiled[self.fn.__name__, kernel.hash] = kernel.metadata.shared
        return kernel

    driver.set_active(Driver(sm))
    JITFunction.run = compile_only
    for module in (backend, limits):
        module.refusal = lambda *inputs, **options: None
    backend.verify = lambda device: (True, "pretended")
    dispatch.trusted = lambda *asked: True
    choosing._ranks_in_fp8 = lambda device: sm >= 89
    for module in (choosing, launch):
        module.is_roomy = lambda device: ROOM[sm] >= launch._ROOM
    return compiled


def tensors(
    heads: tuple[int, int], length: int, dim: int, dtype: torch.dtype
) -> list[torch.Tensor]:
    """q, k and v as Transformers lays them out."""
    return [torch.zeros(1, length, h, dim, dtype=dtype).transpose(1, 2) for h in (*heads, heads[1])]


def choose_and_attend(
    heads: tuple[int, int], dim: int, dtype: torch.dtype, causal: bool = True, length: int = 4480
) -> None:
    """MS-SWIFT without gradients: windows, choice, gathered tokens and remainder."""
    q, k, v = tensors(heads, length, dim, dtype)
    with torch.no_grad():
        MSSwift(dense_below=0)(q, k, v, causal=causal, backend="triton")


def attend(heads: tuple[int, int], dim: int, dtype: torch.dtype) -> None:
    """All of that but the choice, and a single query."""
    q, k, v = tensors(heads, 512, dim, dtype)
    bands = (Band(tile=128, left=128),) * heads[1]
    tokens = torch.zeros(1, heads[1], 4, 16, dtype=torch.int32)
    pattern = BlockPattern(
        causal=True, bands=bands, block=128, tokens=tokens, pool=128, pool_grain=128
    )
    with torch.no_grad():
        backend.attend(q, k, v, pattern, 0.1)
        backend.attend(q[:, :, -1:], k, v, replace(pattern, tokens=tokens[:, :, :1]), 0.1)


def train(heads: tuple[int, int], dim: int, dtype: torch.dtype, biased: bool) -> None:
    """Bands and gathered tokens row by row, forward and backward."""
    q, k, v = (x.requires_grad_() for x in tensors(heads, 512, dim, dtype))
    tokens = torch.zeros(1, heads[1], 4, 16, dtype=torch.int32)
    bands = (Band(tile=128, left=128),) * heads[1]
    pattern = BlockPattern(
        causal=True, bands=bands, block=128, tokens=tokens, visible_from=tokens + 1
    )
    values = torch.zeros(heads[0], 1023, requires_grad=True)
    bias = ScoreBias(values=values, zero=511) if biased else None
    out, lse = backend.attend(q, k, v, pattern, 0.1, bias=bias)
    (out.float().sum() + lse.sum()).backward()


def linear(heads: tuple[int, int], dim: int, dtype: torch.dtype) -> None:
    """Linear attention, forward and backward."""
    q, k, v = (x.requires_grad_() for x in tensors(heads, 512, dim, dtype))
    state = LinearState(torch.zeros(1, heads[1], dim, dim), torch.zeros(1, heads[1], dim))
    found = backend.attend_linear(
        q, k, v, causal=True, chunk=64, q_map=torch.sigmoid, k_map=torch.sigmoid, state=state
    )
    (found[0].float().sum() + found[1].sum()).backward()


def main(sm: int) -> None:
    """Kernel and shared memory, a line each."""
    compiled = pretend(sm)
    half, single = torch.bfloat16, torch.float32
    if sm == 90:
        # The last block of queries is cut.
        choose_and_attend((8, 2), 128, half, length=4500)
        choose_and_attend((3, 1), 64, half, causal=False)
        attend((2, 2), 64, single)
        train((6, 2), 64, half, biased=True)
        train((2, 2), 64, half, biased=False)
        linear((6, 2), 64, half)
    else:
        choose_and_attend((8, 2), 128, half)
        choose_and_attend((2, 2), 256, single)
        attend((2, 2), 128, single)
        attend((2, 2), 256, half)
        train((2, 2), 128, half, biased=False)
        train((1, 1), 256, single, biased=False)
        linear((1, 1), 128, single)
    rows, keys = torch.zeros(1, 2, 3, 7, 192), torch.zeros(1, 2, 50, 192)
    backend.best_blocks(rows, keys, torch.ones(2, 3, 50, dtype=torch.bool), 2, 4)
    for (name, _), shared in compiled.items():
        print(name, shared)
        assert shared <= ROOM[sm], f"{name}: {shared} bytes of shared memory"


if __name__ == "__main__":
    main(int(sys.argv[1]))
