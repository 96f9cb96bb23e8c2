"""The shape of every memory: a frozen configuration that builds a module, and rows grouped."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from longswift.core.errors import InputError, problem
from longswift.core.inputs import (
    check_finite,
    check_inputs,
    check_scale,
    check_transform,
    split_padding,
)
from longswift.core.softmax import accumulator_dtype
from longswift.core.tracing import untraced
from longswift.memory.state import State, join

Project = Callable[[Tensor], tuple[Tensor, Tensor]]


class LayerShape(NamedTuple):
    """Sizes of the attention layer a memory is built for."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int


class Tokens(NamedTuple):
    """One call's tokens, before positions are applied.

    Attributes:
        hidden: ``[B, L, hidden]``, what the projections read.
        q: ``[B, Hq, L, D]``, not rotated.
        k: ``[B, Hkv, L, D]``, not rotated.
        v: ``[B, Hkv, L, D]``.
        cos: ``[B, L, R]``, ``R <= D`` rotated channels, or None where the layer knows no rotation.
        sin: Like ``cos``.
    """

    hidden: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    cos: Tensor | None = None
    sin: Tensor | None = None

    @property
    def angles(self) -> dict[str, Tensor]:
        """``cos`` and ``sin`` by name, or nothing."""
        return {} if self.cos is None or self.sin is None else {"cos": self.cos, "sin": self.sin}

    def take(self, rows: list[int], positions: slice | Tensor) -> Tokens:
        """Some rows and positions."""
        # The token axis is the last but one of every tensor.
        return Tokens(*(None if x is None else x[rows][..., positions, :] for x in self))  # type: ignore[arg-type]


def rotate(x: Tensor, angles: dict[str, Tensor]) -> Tensor:
    """Apply rotary positions to the first ``R`` channels of ``x [B, H, L, D]``.

    Channel ``c`` is paired with ``c + R/2``; ``angles`` holds ``cos`` and ``sin [B, L, R]`` or
    nothing, which leaves ``x`` as it is.
    """
    if not angles:
        return x
    cos, sin = (angles[name].unsqueeze(1).to(x.dtype) for name in ("cos", "sin"))
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


@dataclass(frozen=True, kw_only=True)
class MemoryConfig(ABC):
    """Configuration of a memory; immutable, hashable, serialisable."""

    name: ClassVar[str]

    @abstractmethod
    def build(self, shape: LayerShape) -> MemoryAttention:
        """A new module with its parameters at their initial values."""

    @property
    @abstractmethod
    def reach(self) -> int:
        """Most keys any query sees one by one, itself included."""

    @abstractmethod
    def keys_per_query(self, length: int, shape: LayerShape) -> float:
        """Keys scored per query of a text, mean over its queries.

        Work on sums of the past counts as the keys that cost as many multiplications.

        Args:
            length: Tokens of the text.
            shape: Sizes of the layer.
        """

    def to_dict(self) -> dict[str, Any]:
        """Name and every field, JSON-ready; ``memory_from_dict`` is the inverse."""
        return {"name": self.name, **{f.name: getattr(self, f.name) for f in fields(self)}}


class MemoryAttention(nn.Module, ABC):
    """Causal attention that carries a ``State``.

    Results do not depend on how a text is cut into calls. Padding is invisible: rows with the same
    real tokens and the same past are computed together, as if the padding were not there.
    """

    config: MemoryConfig

    @abstractmethod
    def reset_parameters(self) -> None:
        """Put the parameters to their initial values."""

    @abstractmethod
    def initial(self, tokens: Tokens) -> State:
        """The state of rows that have read nothing; ``tokens`` tells sizes, types and device."""

    @abstractmethod
    def step(
        self, tokens: Tokens, state: State, project: Project, scale: float
    ) -> tuple[Tensor, State]:
        """Attend for an unpadded batch whose rows have all read the same number of tokens."""

    @untraced
    def forward(
        self,
        tokens: Tokens,
        *,
        project: Project,
        key_mask: Tensor | None = None,
        state: State | None = None,
        scale: float | None = None,
    ) -> tuple[Tensor, State]:
        """Attend causally to these tokens and to the past.

        Args:
            tokens: The new tokens.
            project: From ``hidden [B, L, hidden]`` to un-rotated ``k`` and ``v [B, Hkv, L, D]``.
            key_mask: bool ``[B, L]``, True = real token; padding anywhere. None: all are real.
            state: What the previous call returned, None for a new text.
            scale: Factor on the scores, ``D ** -0.5`` when None.

        Returns:
            ``[B, Hq, L, D]`` in the dtype of ``q``, 0 at padding, and the new state.

        Raises:
            InputError: Wrong shapes, dtypes, devices, NaN, or a state of another batch.
        """
        q, k, v = tokens.q, tokens.k, tokens.v
        check_transform("auto")
        check_inputs(q, k, v, key_mask, causal=False)
        check_finite(q=q, k=k, v=v)
        batch, _, length, _ = q.shape
        if length != k.shape[2] or tokens.hidden.shape[:2] != (batch, length):
            raise InputError(
                problem(
                    type(self).__name__,
                    expected="hidden [B, L, hidden] and as many queries as keys",
                    got=f"hidden {tuple(tokens.hidden.shape)}, q {tuple(q.shape)}, "
                    f"k {tuple(k.shape)}",
                    fix="Pass the new tokens only; the state holds the past.",
                )
            )
        if state is None:
            state = self.initial(tokens)
        if len(state.seen) != batch:
            raise InputError(
                problem(
                    "state",
                    expected=f"{batch} rows",
                    got=len(state.seen),
                    fix="Use a state of this batch, or State.select its rows.",
                )
            )
        scale = check_scale(scale, q.shape[-1])
        device, cast = q.device.type, torch.is_autocast_enabled(q.device.type)

        def project_as_outside(hidden: Tensor) -> tuple[Tensor, Tensor]:
            with torch.autocast(device, enabled=cast):
                return project(hidden)

        # Autocast would round scores and sums that are to stay in fp32.
        with torch.autocast(device, enabled=False):
            return self._grouped(tokens, state, key_mask, project_as_outside, scale)

    def _grouped(
        self, tokens: Tokens, state: State, key_mask: Tensor | None, project: Project, scale: float
    ) -> tuple[Tensor, State]:
        batch, _, length, _ = tokens.q.shape
        groups = _groups(key_mask, state.seen, batch, length)
        if len(groups) == 1 and groups[0][1] == slice(0, length) and length:
            return self.step(tokens, state, project, scale)
        out = torch.zeros_like(tokens.q)
        parts, order = [], []
        for rows, where in groups:
            past = state.select(rows)
            real = tokens.take(rows, where)
            order += rows
            if real.q.shape[2] == 0:
                parts.append(past)
                continue
            result, past = self.step(real, past, project, scale)
            parts.append(past)
            index = torch.arange(length, device=out.device)[where]
            at = torch.tensor(rows, device=out.device)[:, None, None]
            heads = torch.arange(out.shape[1], device=out.device)[None, :, None]
            out = out.index_put((at, heads, index[None, None]), result)
        return out, join(parts, order)


def _groups(
    key_mask: Tensor | None, seen: tuple[int, ...], batch: int, length: int
) -> list[tuple[list[int], slice | Tensor]]:
    """Rows that have read equally much and have the same real tokens, and where those are."""
    same_tokens: list[tuple[list[int], slice | Tensor]] = [(list(range(batch)), slice(0, length))]
    if key_mask is not None and not bool(key_mask.all()):
        split = split_padding(key_mask, length, length, aligned=True)
        same_tokens = [(group.rows, group.keys) for group in split]
    groups = []
    for rows, where in same_tokens:
        for count in sorted({seen[row] for row in rows}):
            groups.append(([row for row in rows if seen[row] == count], where))
    return groups


def wide(x: Tensor) -> Tensor:
    """``x`` in the type that sums and scores are kept in."""
    return x.to(accumulator_dtype(x.dtype))
