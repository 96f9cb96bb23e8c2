"""Infini-attention: exact attention inside a segment, a compressive memory of all earlier ones.

Segment 4 (rows are queries)::

    segment 1   segment 2   segment 3
    m m m m     . . . .     . . . .
    m m m m     . . . .     . . . .        . . x    own segment, exact and causal
    m m m m     m m m m     x . . .        m        earlier segments, through M and z
    m m m m     m m m m     x x . .

The memory of a KV head is a matrix ``M`` and a normaliser ``z``. With ``s(x) = elu(x) + 1`` and
queries and keys *before* rotation, a query reads ``s(q) M / (s(q) . z)``; a learned gate per query
head mixes that with the exact part, ``sigmoid(b) memory + (1 - sigmoid(b)) local``. A segment
enters the memory when it is complete. While the memory is empty the exact part counts alone.

| | per head |
|---|---|
| time, forward and backward | O(L * (segment + D) * D) |
| state | D * (D + 1) numbers and fewer than ``segment`` tokens |

Munkhdalai et al., 2024, arXiv 2404.07143. The paper has two rules to store a segment: ``linear``
and the delta rule, which stores only what the memory does not say yet (``delta_segment``, against
the memory before the segment; ``delta_token``, token by token, is its exact sequential form). With
the paper's normaliser the delta rule loses the beginning of a text; ``delta_unit`` is the delta
rule without one, on features of length one, which reads ``s(q) M / |s(q)|``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from longswift.core.errors import ConfigError, check_positive, problem
from longswift.core.pattern import Band, BlockPattern
from longswift.core.states import LinearState
from longswift.kernels import dispatch
from longswift.mechanisms.linear import elu1
from longswift.memory.base import (
    LayerShape,
    MemoryAttention,
    MemoryConfig,
    Project,
    Tokens,
    rotate,
    wide,
)
from longswift.memory.rules import RULES
from longswift.memory.state import State

# sigmoid(8) leaves a gradient of 3e-4, sigmoid(100) none at all.
_FARTHEST_GATE = 8.0


@dataclass(frozen=True, kw_only=True)
class Infini(MemoryConfig):
    """Infini-attention.

    Attributes:
        segment: Tokens per segment; positions count a row's real tokens.
        update: ``linear``, ``delta_unit``, ``delta_token`` or ``delta_segment``.
        gate_init: Initial value of every head's gate, before the sigmoid. 0 mixes evenly and has
            the largest gradient; far from 0 a gate cannot learn.
        detach_every: Gradients through the memory stop at every so many segments; None: never.
    """

    name: ClassVar[str] = "infini"

    segment: int = 512
    update: str = "linear"
    gate_init: float = 0.0
    detach_every: int | None = None

    def __post_init__(self) -> None:
        check_positive("Infini", segment=self.segment)
        if self.detach_every is not None:
            check_positive("Infini", detach_every=self.detach_every)
        if self.update not in RULES:
            raise ConfigError(
                problem(
                    "Infini.update",
                    expected=f"one of {', '.join(RULES)}",
                    got=repr(self.update),
                    fix="'linear' is a good first choice.",
                )
            )
        number = isinstance(self.gate_init, int | float) and not isinstance(self.gate_init, bool)
        if not number or not abs(self.gate_init) <= _FARTHEST_GATE:
            raise ConfigError(
                problem(
                    "Infini.gate_init",
                    expected=f"a number from {-_FARTHEST_GATE} to {_FARTHEST_GATE}",
                    got=repr(self.gate_init),
                    fix="A gate that starts saturated has no gradient; use 0.",
                )
            )

    @property
    def reach(self) -> int:
        return self.segment

    def keys_per_query(self, length: int, shape: LayerShape) -> float:
        complete, rest = divmod(length, self.segment)
        own = (complete * self.segment * (self.segment + 1) + rest * (rest + 1)) / (2 * length)
        # A product with the matrix is as much work as scoring and summing D / 2 keys: one to read
        # per query, one to store per key, and one more per key to see what is known already.
        stored = 1.0 if self.update == "linear" else 2.0
        if self.update in ("delta_unit", "delta_token"):
            stored += 1.5 * self.segment / shape.head_dim
        return own + shape.head_dim / 2 * (1 + stored * shape.kv_heads / shape.heads)

    def build(self, shape: LayerShape) -> InfiniAttention:
        return InfiniAttention(self, shape)


class InfiniAttention(MemoryAttention):
    """Module of ``Infini``; its one parameter is the gate.

    Attributes:
        gate_bias: ``[Hq]``. Named a bias, because weight decay would pull it towards an even mix;
            Transformers' Trainer decays no biases. It learns with a larger rate than the rest.
    """

    config: Infini

    def __init__(self, config: Infini, shape: LayerShape) -> None:
        super().__init__()
        self.config = config
        self.gate_bias = nn.Parameter(torch.empty(shape.heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gate_bias, self.config.gate_init)

    def initial(self, tokens: Tokens) -> State:
        k, v = wide(tokens.k[:, :, :0]), wide(tokens.v[:, :, :0])
        batch, heads, _, width = k.shape
        sums = {"matrix": k.new_zeros(batch, heads, width, v.shape[-1])}
        if RULES[self.config.update].divides:
            sums["norm"] = k.new_zeros(batch, heads, width)
        return State((0,) * batch, sums, _kept(tokens, 0, 0))

    def step(
        self, tokens: Tokens, state: State, project: Project, scale: float
    ) -> tuple[Tensor, State]:
        segment = self.config.segment
        past, held = divmod(state.seen[0], segment)
        # The buffer starts where the unfinished segment started.
        buffer = {
            name: torch.cat([state.kept[name][..., :held, :], new], dim=-2)
            for name, new in _kept(tokens, 0, None).items()
        }
        angles = {name: buffer[name] for name in tokens.angles}
        k, v = buffer["k"], buffer["v"]
        pattern = BlockPattern(causal=True, bands=(Band(tile=segment, left=0),) * k.shape[1])
        _, backend = dispatch.resolve("auto", k.device)
        turned = rotate(tokens.q, tokens.angles), rotate(k, angles)
        out = backend.attend(*turned, v, pattern, scale).out
        matrix = state.sums["matrix"]
        sums = LinearState(matrix, state.sums.get("norm", matrix[..., :0, 0]))
        memory, sums = self._memory(tokens.q, k, v, sums, past)
        # The queries of the text's first segment find an empty memory.
        first = 0 if past else min(segment - held, tokens.q.shape[2])
        gate = torch.sigmoid(self.gate_bias.to(memory.dtype)).view(1, -1, 1, 1)
        mixed = torch.lerp(out[:, :, first:].to(memory.dtype), memory[:, :, first:], gate)
        out = torch.cat([out[:, :, :first], mixed.to(out.dtype)], dim=2)
        # Views would keep what the whole prompt took alive.
        kept = k.shape[2] % segment
        rest = {name: x[..., x.shape[-2] - kept :, :].clone() for name, x in buffer.items()}
        seen = (state.seen[0] + tokens.q.shape[2],) * len(state.seen)
        after = {"matrix": sums.s, "norm": sums.z}
        return out, State(seen, {name: after[name].clone() for name in state.sums}, rest)

    def _memory(
        self, q: Tensor, k: Tensor, v: Tensor, sums: LinearState, past: int
    ) -> tuple[Tensor, LinearState]:
        """What each query reads from the complete segments before its own, and all of them.

        Args:
            q: The last ``Lq`` positions, not rotated.
            k: From the start of an unfinished segment on, not rotated.
            v: Like ``k``.
            sums: The memory before ``k``.
            past: Complete segments in ``sums``.
        """
        segment, length, held = self.config.segment, k.shape[2], k.shape[2] - q.shape[2]
        linear, every = self.config.update == "linear", self.config.detach_every
        rule = RULES[self.config.update]
        # The linear rule needs a border only where gradients stop.
        size = segment if not linear else None if every is None else every * segment
        _, backend = dispatch.resolve("auto", k.device, q, k, v, kernel="attend_linear")
        start, parts = 0, []
        while start < length:
            at = past + start // segment
            end = length if size is None else min(length, start + size - at * segment % size)
            if every is not None and at % every == 0:
                sums = LinearState(sums.s.detach(), sums.z.detach())
            query = q[:, :, max(start - held, 0) : end - held]
            key, value = k[:, :, start:end], v[:, :, start:end]
            if linear:
                out, _, sums = backend.attend_linear(
                    query,
                    key,
                    value,
                    causal=True,
                    chunk=segment,
                    q_map=elu1,
                    k_map=elu1,
                    state=sums,
                    own_chunk=False,
                )
            else:
                f = elu1(wide(query)).reshape(*k.shape[:2], -1, k.shape[3])
                out = rule.read(f, sums).view(*query.shape[:3], v.shape[3])
                if end - start == segment:
                    sums = rule.update(elu1(wide(key)), wide(value), sums)
            parts.append(out)
            start = end
        return torch.cat(parts, dim=2), sums


def _kept(tokens: Tokens, start: int, end: int | None) -> dict[str, Tensor]:
    parts = {"k": tokens.k, "v": tokens.v, **tokens.angles}
    return {name: x[..., start:end, :] for name, x in parts.items()}
