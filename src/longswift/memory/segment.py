"""Transformer-XL: segments that also see the layer inputs of the segments before them.

Segments of 3 with a memory of 2 (rows are queries; ``d`` is seen, but its history is not)::

    x . . . . . . .
    x x . . . . . .
    x x x . . . . .
    . d d x . . . .
    . d d x x . . .
    . d d x x x . .
    . . . . d d x .

The memory is the layer's *input*, detached, so that depth times memory is the reach of the model
and gradients reach back one segment. Scores are ``(q_i + u) k_j + (q_i + w) W R_{i-j}`` with
learned ``u``, ``w``, ``W`` and sinusoids ``R`` of the distance. In a layer that rotates queries and
keys the rotation stays and the learned part comes on top.

| | |
|---|---|
| time, forward and backward | O(L * (memory + segment) * D) per head |
| memory beyond inputs and output | scores of one segment, in training of all |
| state | fewer than ``memory + segment`` layer inputs |

Dai et al., 2019, arXiv 1901.02860.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from longswift.core.errors import ConfigError, check_positive, problem
from longswift.core.softmax import softmax_partial
from longswift.memory.base import (
    LayerShape,
    MemoryAttention,
    MemoryConfig,
    Project,
    Tokens,
    rotate,
    wide,
)
from longswift.memory.state import State


@dataclass(frozen=True, kw_only=True)
class TransformerXL(MemoryConfig):
    """Segment recurrence with relative positions.

    Attributes:
        segment: Tokens per segment; gradients stop between segments.
        memory: Tokens seen before the segment.
        same_length: Every query sees exactly ``memory`` keys, itself included, instead of all of
            memory and segment up to itself.
        clamp: Distances beyond this one count as this one; None: all differ.
    """

    name: ClassVar[str] = "transformer_xl"

    segment: int = 512
    memory: int = 512
    same_length: bool = False
    clamp: int | None = None

    def __post_init__(self) -> None:
        check_positive("TransformerXL", segment=self.segment, memory=self.memory)
        if self.clamp is not None:
            check_positive("TransformerXL", clamp=self.clamp)
        if not isinstance(self.same_length, bool):
            raise ConfigError(
                problem(
                    "TransformerXL.same_length",
                    expected="True or False",
                    got=repr(self.same_length),
                    fix="False sees more, True as much everywhere.",
                )
            )

    @property
    def reach(self) -> int:
        return self.memory if self.same_length else self.memory + self.segment

    def first_key(self, position: int) -> int:
        """First token that the query at ``position`` sees."""
        if self.same_length:
            return max(0, position - self.memory + 1)
        return max(0, position - position % self.segment - self.memory)

    def keys_per_query(self, length: int, shape: LayerShape) -> float:
        return sum(at - self.first_key(at) + 1 for at in range(length)) / length

    def build(self, shape: LayerShape) -> TransformerXLAttention:
        return TransformerXLAttention(self, shape)


class TransformerXLAttention(MemoryAttention):
    """Module of ``TransformerXL``.

    All parameters start at zero: attention by content (and by the layer's own rotation) alone.

    Attributes:
        content_bias: ``u [Hq, D]``.
        position_bias: ``w [Hq, D]``.
        position_weight: ``W [Hkv * D, hidden]``; the heads of a group share it, as they share keys.
    """

    config: TransformerXL

    def __init__(self, config: TransformerXL, shape: LayerShape) -> None:
        super().__init__()
        self.config, self.shape = config, shape
        self.content_bias = nn.Parameter(torch.empty(shape.heads, shape.head_dim))
        self.position_bias = nn.Parameter(torch.empty(shape.heads, shape.head_dim))
        width = shape.kv_heads * shape.head_dim
        self.position_weight = nn.Parameter(torch.empty(width, shape.hidden))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in (self.content_bias, self.position_bias, self.position_weight):
            nn.init.zeros_(parameter)

    def initial(self, tokens: Tokens) -> State:
        nothing = {name: x[..., :0, :] for name, x in _kept(tokens).items()}
        return State((0,) * tokens.q.shape[0], kept=nothing)

    def step(
        self, tokens: Tokens, state: State, project: Project, scale: float
    ) -> tuple[Tensor, State]:
        seen, length = state.seen[0], tokens.q.shape[2]
        first = self.config.first_key(seen)
        held = {name: x[..., : seen - first, :] for name, x in state.kept.items()}
        past = {name: torch.cat([held[name], x], dim=-2) for name, x in _kept(tokens).items()}
        own = {"k": tokens.k, "v": tokens.v}
        behind = self._behind(tokens, held, own, project)
        parts, start = [], seen
        while start < seen + length:
            end = min(start + self.config.segment - start % self.config.segment, seen + length)
            lowest, mine = self.config.first_key(start) - first, slice(start - seen, end - seen)
            keys = {
                name: torch.cat([behind[name][:, :, lowest : start - first], x[:, :, mine]], dim=2)
                for name, x in own.items()
            }
            angles = {name: past[name][:, lowest : end - first] for name in tokens.angles}
            parts.append(self._attend(tokens.q[:, :, mine], keys, angles, scale))
            start = end
        if not torch.is_grad_enabled():
            past |= behind
        # A view would keep the whole prompt alive.
        keep = seen + length - self.config.first_key(seen + length)
        kept = {name: x[..., x.shape[-2] - keep :, :].detach().clone() for name, x in past.items()}
        return torch.cat(parts, dim=2), State((seen + length,) * len(state.seen), kept=kept)

    def _behind(
        self, tokens: Tokens, held: dict[str, Tensor], own: dict[str, Tensor], project: Project
    ) -> dict[str, Tensor]:
        """Keys and values of memory and tokens, as later segments see them."""
        if torch.is_grad_enabled():
            # Layer inputs have no history here, but their projection is learned from.
            hidden = torch.cat([held["hidden"], tokens.hidden.detach()], dim=1)
            k, v = project(hidden)
            return {"k": k, "v": v}
        if "k" not in held:
            k, v = project(held["hidden"])
            held = {"k": k, "v": v}
        return {name: torch.cat([held[name], x], dim=2) for name, x in own.items()}

    def _attend(
        self,
        q: Tensor,
        keys: dict[str, Tensor],
        angles: dict[str, Tensor],
        scale: float,
    ) -> Tensor:
        """Attention of one segment's queries, the last of them at the last key."""
        k, v = keys["k"], keys["v"]
        batch, kv_heads, k_len, width = k.shape
        q_len = q.shape[2]
        query = torch.arange(k_len - q_len, k_len, device=q.device)
        distance = query[:, None] - torch.arange(k_len, device=q.device)
        mine = {name: x[:, k_len - q_len :] for name, x in angles.items()}

        def grouped(x: Tensor) -> Tensor:
            return x.reshape(-1, kv_heads, q.shape[1] // kv_heads, x.shape[-2], width)

        turned = grouped(wide(rotate(q, mine)))
        ka, va = wide(rotate(k, angles)).unsqueeze(2), wide(v).unsqueeze(2)
        u, w = (
            grouped(x.to(ka.dtype).unsqueeze(1)) for x in (self.content_bias, self.position_bias)
        )
        scores = turned @ ka.mT + u @ wide(k).unsqueeze(2).mT
        by_distance = (grouped(wide(q)) + w) @ self._distances(k_len, ka).mT
        place = distance.clamp_min(0).expand(*by_distance.shape[:3], -1, -1)
        scores = (scores + by_distance.gather(-1, place)) * scale
        hidden = distance < 0
        if self.config.same_length:
            hidden |= distance >= self.config.memory
        out = softmax_partial(scores.masked_fill(hidden, float("-inf")), va).out
        return out.reshape(batch, -1, q_len, v.shape[-1]).to(q.dtype)

    def _distances(self, count: int, like: Tensor) -> Tensor:
        """``W R_d`` for distances 0, 1, ..., ``[1, Hkv, 1, count, D]``."""
        distance = torch.arange(count, device=like.device)
        if self.config.clamp is not None:
            distance = distance.clamp_max(self.config.clamp)
        half = -(-self.shape.hidden // 2)
        power = torch.arange(half, device=like.device, dtype=like.dtype) / half
        angle = distance.to(like.dtype)[:, None] * 10_000.0**-power
        waves = torch.cat([angle.sin(), angle.cos()], dim=-1)[:, : self.shape.hidden]
        turned = waves @ self.position_weight.to(like.dtype).mT
        heads = turned.view(count, self.shape.kv_heads, self.shape.head_dim)
        return heads.transpose(0, 1)[None, :, None]


def _kept(tokens: Tokens) -> dict[str, Tensor]:
    return {"hidden": tokens.hidden.detach(), **tokens.angles}
