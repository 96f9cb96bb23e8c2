"""Reading a long sequence in overlapping chunks with an encoder that only reads short ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from longswift.core.errors import ConfigError, InputError, problem
from longswift.core.inputs import check_key_mask, split_padding
from longswift.core.softmax import accumulator_dtype

_MERGES = ("centre", "linear", "mean")


@dataclass(frozen=True, kw_only=True)
class OverlappedChunks:
    """Runs an encoder over chunks that overlap, and merges what it says about each token.

    Chunks of ``chunk`` tokens start every ``chunk - overlap`` tokens; the last one ends with the
    sequence and may be shorter. A sequence of at most ``chunk`` tokens is encoded as it is. Cost:
    ``chunk / (chunk - overlap)`` times the tokens, in calls of at most ``chunk`` tokens.

    Attributes:
        chunk: Most tokens the encoder gets at once.
        overlap: Tokens that neighbouring chunks share, less than ``chunk``.
        merge: How the chunks that hold a token share in its result, with weights that sum to one:

            * ``"centre"``: the chunk in which the token is farther from a cut (half of the
              overlap is dropped on either side);
            * ``"linear"``: a cross-fade, weights rise and fall linearly over the overlap;
            * ``"mean"``: equal weights.
    """

    chunk: int
    overlap: int
    merge: str = "centre"

    def __post_init__(self) -> None:
        for field, fine, expected, fix in (
            (
                "chunk",
                type(self.chunk) is int and self.chunk > 0,
                "a positive number of tokens",
                "Use the longest input the encoder was trained on.",
            ),
            (
                "overlap",
                type(self.overlap) is int and 0 <= self.overlap < self.chunk,
                f"a number of tokens from 0 to {self.chunk} - 1",
                "A quarter of the chunk is a good start.",
            ),
            ("merge", self.merge in _MERGES, f"one of {', '.join(_MERGES)}", "Use 'centre'."),
        ):
            if not fine:
                got = repr(getattr(self, field))
                raise ConfigError(
                    problem(f"OverlappedChunks.{field}", expected=expected, got=got, fix=fix)
                )

    def plan(self, length: int) -> list[tuple[int, int]]:
        """First and one-past-last token of every chunk; together they cover every token."""
        if length <= self.chunk:
            return [(0, length)]
        step = self.chunk - self.overlap
        count = -(-(length - self.chunk) // step) + 1
        return [(i * step, min(i * step + self.chunk, length)) for i in range(count)]

    def weights(self, length: int) -> list[Tensor]:
        """Share of every chunk of the plan in each of its tokens, fp64; sums to one over chunks."""
        plan = self.plan(length)
        shares = [self._ramp(start, end, length) for start, end in plan]
        total = torch.zeros(length, dtype=torch.float64, device="cpu")
        for (start, end), share in zip(plan, shares, strict=True):
            total[start:end] += share
        return [s / total[start:end] for (start, end), s in zip(plan, shares, strict=True)]

    def _ramp(self, start: int, end: int, length: int) -> Tensor:
        """Unnormalised shares of one chunk; edges of the sequence are no cuts."""
        place = torch.arange(start, end, dtype=torch.float64, device="cpu")
        if self.merge == "mean":
            return torch.ones_like(place)
        everywhere = torch.full_like(place, math.inf)
        before = place - start + 1 if start > 0 else everywhere
        after = end - place if end < length else everywhere
        if self.merge == "linear":
            return torch.minimum(before, after).clamp(max=self.overlap + 1)
        dropped = self.overlap // 2
        return ((before > dropped) & (after > self.overlap - dropped)).to(place.dtype)

    def __call__(
        self,
        encode: Callable[..., Tensor],
        *inputs: Tensor,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        """Encode a long sequence.

        Args:
            encode: Called with the same slice ``[B, l, ...]`` of every input, ``l <= chunk``;
                returns ``[B, l, ...]``.
            *inputs: Tensors ``[B, L, ...]``, such as token ids or embeddings.
            key_mask: bool ``[B, L]``, True = real token, padding anywhere. Chunks are counted from
                a row's first real token and hold no padding; padded places of the result are 0.

        Returns:
            ``[B, L, ...]`` in the dtype of the encoder's output, differentiable.

        Raises:
            InputError: Shapes that do not fit, before or after encoding.
        """
        batch, length = self._extent(inputs, key_mask)
        if key_mask is None or bool(key_mask.all()):
            return self._encode(encode, inputs, length)
        out: Tensor | None = None
        for group in split_padding(key_mask, length, length, aligned=True):
            if isinstance(group.keys, slice):
                places = torch.arange(group.keys.start, group.keys.stop, device="cpu")
            else:
                places = group.keys
            if len(places) == 0:
                continue
            at = torch.tensor(group.rows, device="cpu")[:, None], places
            part = self._encode(encode, tuple(x[at] for x in inputs), len(places))
            if out is None:
                out = part.new_zeros(batch, length, *part.shape[2:])
            out = out.index_put(at, part)
        if out is None:
            raise InputError(
                problem(
                    "key_mask",
                    expected="at least one real token",
                    got="padding only",
                    fix="Leave such batches out: no encoder says how wide their result would be.",
                )
            )
        return out

    def _encode(
        self, encode: Callable[..., Tensor], inputs: tuple[Tensor, ...], length: int
    ) -> Tensor:
        """A batch without padding."""
        plan = self.plan(length)
        if len(plan) == 1:
            return _checked(encode(*inputs), inputs[0])
        parts: list[Tensor] = []
        total: Tensor | None = None
        for (start, end), share in zip(plan, self.weights(length), strict=True):
            piece = tuple(x[:, start:end] for x in inputs)
            part = _checked(encode(*piece), piece[0])
            if self.merge == "centre":
                # A choice, not a sum: exact for any dtype, and what is dropped may be anything.
                parts.append(part[:, share.to(part.device) > 0])
                continue
            if total is None:
                acc = accumulator_dtype(part.dtype)
                total = part.new_zeros(part.shape[0], length, *part.shape[2:], dtype=acc)
                dtype = part.dtype
            weight = share.to(part.device, total.dtype).view(-1, *[1] * (part.dim() - 2))
            total[:, start:end] += part * weight
        return torch.cat(parts, 1) if total is None else total.to(dtype)

    def _extent(self, inputs: tuple[Tensor, ...], key_mask: Tensor | None) -> tuple[int, int]:
        shapes = {tuple(x.shape[:2]) for x in inputs}
        if len(shapes) != 1 or any(x.dim() < 2 for x in inputs):
            raise InputError(
                problem(
                    "inputs",
                    expected="one or more tensors [B, L, ...] with the same B and L",
                    got=[tuple(x.shape) for x in inputs],
                    fix="Bind what is not sliced along the sequence to the encoder instead.",
                )
            )
        batch, length = shapes.pop()
        if key_mask is not None:
            check_key_mask(key_mask, batch, length)
        return batch, length


def _checked(out: Tensor, given: Tensor) -> Tensor:
    """The encoder's output, if it has a row for every token it was given."""
    if not isinstance(out, Tensor) or out.dim() < 2 or out.shape[:2] != given.shape[:2]:
        raise InputError(
            problem(
                "encoder",
                expected=f"a tensor {[*given.shape[:2], '...']}, one row per token",
                got=list(out.shape) if isinstance(out, Tensor) else type(out).__name__,
                fix="Return the hidden states, for example lambda x: model(x).last_hidden_state.",
            )
        )
    return out
