"""A state carried over runs of chunks, recomputed run by run in the backward pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longswift.core.blocks import block_runs
from longswift.core.once import Saved, once
from longswift.core.softmax import accumulator_dtype

# Bytes one run may hold.
_RUN_BYTES = 4 << 20


class Piece(NamedTuple):
    """Queries answered and keys absorbed together.

    Attributes:
        queries: First and one-past-last query row.
        keys: First and one-past-last key, absorbed into the state.
        chunks: Equal chunks that both are cut into.
    """

    queries: tuple[int, int]
    keys: tuple[int, int]
    chunks: int

    def halves(self) -> list[Piece]:
        """Two smaller pieces with the same result; queries and keys are the same tokens."""
        start, stop = self.keys
        size = (stop - start) // self.chunks
        chunks = self.chunks // 2
        middle = start + (chunks * size if chunks else size // 2)
        shift = self.queries[0] - start
        first = Piece((start + shift, middle + shift), (start, middle), max(1, chunks))
        rest = max(1, self.chunks - chunks)
        return [first, Piece((middle + shift, stop + shift), (middle, stop), rest)]


class Step(ABC):
    """One run of chunks: what a kernel does with a piece, differentiable by autograd."""

    @abstractmethod
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, piece: Piece, state: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Output ``[B, Hq, rows, Dv]``, normaliser ``[B, Hq, rows]`` and the state after it."""

    def fits(self, k: Tensor, piece: Piece, state: tuple[Tensor, ...]) -> bool:
        """Whether the piece can be computed at once; if not, its halves are tried."""
        return True


def plan(
    q_len: int, k_len: int, *, causal: bool, chunk: int, own_chunk: bool, chunk_bytes: int
) -> Iterator[Piece]:
    """Pieces in order; each query and key is in at most one.

    Args:
        q_len: Queries; causal ones are the last of the keys.
        k_len: Keys.
        causal: Causal order.
        chunk: Tokens per chunk.
        own_chunk: Queries see their own chunk (causally); if not, chunks lie on a grid counted
            from key 0, and an incomplete last one is not absorbed.
        chunk_bytes: Bytes that one chunk takes.
    """
    most = max(1, _RUN_BYTES // max(1, chunk_bytes))
    ahead = k_len
    if causal:
        ahead = k_len - q_len if own_chunk else (k_len - q_len) // chunk * chunk
    for start in range(0, ahead, most * chunk):
        yield Piece((0, 0), (start, min(ahead, start + most * chunk)), 1)
    if not causal:
        for start in range(0, q_len, most * chunk):
            yield Piece((start, min(q_len, start + most * chunk)), (k_len, k_len), 1)
    elif own_chunk:
        for run in block_runs(q_len, q_len, chunk, most):
            rows = run.row, run.row + run.count * run.rows
            yield Piece(rows, (ahead + rows[0], ahead + rows[1]), run.count)
    else:
        for run in block_runs(q_len, k_len, chunk, most):
            start = run.position // chunk * chunk
            stop = start + run.count * chunk
            keys = (start, stop) if stop <= k_len else (start, start)
            yield Piece((run.row, run.row + run.count * run.rows), keys, run.count)


def scan(
    step: Step, pieces: Iterator[Piece], q: Tensor, k: Tensor, v: Tensor, state: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Output, normaliser and last state, in the accumulator dtype and differentiable once.

    Memory beyond the result is that of one run, plus one state per run with gradients.
    """
    tensors = (q, k, v, *state)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        out, normaliser, *last = _Scan.apply(step, pieces, *tensors)
        return out, normaliser, tuple(last)
    with torch.no_grad():
        out, normaliser, last_state, _ = _forward(step, pieces, q, k, v, state)
    return out, normaliser, last_state


def _parts(piece: Piece, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, keys = slice(*piece.queries), slice(*piece.keys)
    return q[:, :, rows], k[:, :, keys], v[:, :, keys]


def _forward(
    step: Step,
    pieces: Iterator[Piece],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, tuple[Tensor, ...], list[tuple[Piece, tuple[Tensor, ...]]]]:
    acc = accumulator_dtype(q.dtype)
    out = torch.empty(*q.shape[:3], v.shape[3], dtype=acc, device=q.device)
    normaliser = torch.empty(q.shape[:3], dtype=acc, device=q.device)
    done = []
    for planned in pieces:
        waiting = [planned]
        while waiting:
            piece = waiting.pop()
            q_part, k_part, v_part = _parts(piece, q, k, v)
            if not step.fits(k_part, piece, state):
                waiting.extend(reversed(piece.halves()))
                continue
            done.append((piece, state))
            rows = slice(*piece.queries)
            out[:, :, rows], normaliser[:, :, rows], state = step(
                q_part, k_part, v_part, piece, state
            )
    return out, normaliser, state, done


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        step: Step,
        pieces: Iterator[Piece],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *state: Tensor,
    ) -> tuple[Tensor, ...]:
        out, normaliser, last, ctx.done = _forward(step, pieces, q, k, v, state)
        ctx.step = step
        # The state is kept with its runs, and here to notice when it is changed in place.
        ctx.save_for_backward(q, k, v, *state)
        # An output must not be an input.
        return (
            out,
            normaliser,
            *(x.clone() if x is y else x for x, y in zip(last, state, strict=True)),
        )

    @staticmethod
    @once
    def backward(ctx: Any, saved: Saved, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        d_out, d_normaliser, *d_state = grad_outputs
        q, k, v, *_ = saved
        d_q, d_k, d_v = (torch.zeros_like(x) for x in (q, k, v))
        with torch.autocast(q.device.type, enabled=False):
            for piece, state in reversed(ctx.done):
                parts = (*_parts(piece, q, k, v), *state)
                leaves = [x.detach().requires_grad_() for x in parts]
                rows, keys = slice(*piece.queries), slice(*piece.keys)
                with torch.enable_grad():
                    out, normaliser, after = ctx.step(*leaves[:3], piece, tuple(leaves[3:]))
                results = [out, normaliser, *after]
                grads = [d_out[:, :, rows], d_normaliser[:, :, rows], *d_state]
                kept = [i for i, x in enumerate(results) if x.requires_grad]
                found = torch.autograd.grad(
                    [results[i] for i in kept],
                    leaves,
                    [grads[i] for i in kept],
                    allow_unused=True,
                    materialize_grads=True,
                )
                d_q[:, :, rows], d_k[:, :, keys], d_v[:, :, keys] = found[:3]
                d_state = list(found[3:])
        return None, None, d_q, d_k, d_v, *d_state
