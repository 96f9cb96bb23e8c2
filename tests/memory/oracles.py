"""Infini-attention and Transformer-XL written a second time: loops over rows, heads and tokens."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longswift.memory.base import LayerShape, MemoryAttention, MemoryConfig, Tokens, rotate
from longswift.memory.compressive import Infini
from longswift.memory.segment import TransformerXL


class Layer(NamedTuple):
    """A memory and the projections of the layer around it."""

    memory: MemoryAttention
    projections: nn.ModuleDict
    shape: LayerShape

    @classmethod
    def make(
        cls, config: MemoryConfig, shape: LayerShape, dtype: torch.dtype = torch.float64
    ) -> Layer:
        """A layer whose parameters are all random."""
        widths = {"q": shape.heads, "k": shape.kv_heads, "v": shape.kv_heads}
        projections = nn.ModuleDict(
            {n: nn.Linear(shape.hidden, h * shape.head_dim, bias=False) for n, h in widths.items()}
        )
        memory = config.build(shape)
        with torch.no_grad():
            for parameter in memory.parameters():
                parameter.normal_()
            for projection in projections.values():
                projection.weight.mul_(3)
        return cls(memory.to(dtype), projections.to(dtype), shape)

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, not rotated."""
        k, v = (self.heads(self.projections[n](hidden)) for n in ("k", "v"))
        return k, v

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.shape.head_dim)).transpose(1, 2)

    def tokens(self, hidden: Tensor, positions: Tensor | None) -> Tokens:
        """The call's tokens; ``positions [B, L]`` rotate, None does not."""
        angles = {} if positions is None else turning(positions, self.shape.head_dim, hidden.dtype)
        q = self.heads(self.projections["q"](hidden))
        return Tokens(hidden, q, *self.project(hidden), **angles)

    def __call__(self, hidden: Tensor, positions: Tensor | None, **options: Any) -> Any:
        return self.memory(self.tokens(hidden, positions), project=self.project, **options)

    def parameters(self) -> list[nn.Parameter]:
        return [*self.memory.parameters(), *self.projections.parameters()]


def turning(positions: Tensor, width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Rotary angles of half of the channels (rounded to an even number)."""
    turned = max(2, width // 4 * 2)
    speed = 100.0 ** -(torch.arange(turned // 2, dtype=dtype) / (turned // 2))
    angle = positions[..., None].to(dtype) * speed
    angle = torch.cat([angle, angle], dim=-1)
    return {"cos": angle.cos(), "sin": angle.sin()}


def infini(layer: Layer, tokens: Tokens, scale: float) -> Tensor:
    """One unpadded row; ``tokens`` has batch size 1."""
    config: Any = layer.memory.config
    assert isinstance(config, Infini)
    unit = config.update == "delta_unit"
    gate = torch.sigmoid(layer.memory.gate_bias)
    groups = layer.shape.heads // layer.shape.kv_heads
    q, k, v = tokens.q[0], tokens.k[0], tokens.v[0]
    q_turned, k_turned = (rotate(x[None], tokens.angles)[0] for x in (q, k))

    def positive(x: Tensor) -> Tensor:
        return torch.where(x > 0, x + 1, x.clamp_max(0).exp())

    heads = []
    for h in range(layer.shape.heads):
        g = h // groups
        matrix, norm = k.new_zeros(k.shape[-1], v.shape[-1]), k.new_zeros(k.shape[-1])
        rows = []
        for start in range(0, q.shape[1], config.segment):
            end = min(start + config.segment, q.shape[1])
            if config.detach_every and start // config.segment % config.detach_every == 0:
                matrix, norm = matrix.detach(), norm.detach()
            for i in range(start, end):
                scores = torch.stack([q_turned[h, i] @ k_turned[g, j] for j in range(start, i + 1)])
                local = (scores * scale).softmax(0) @ v[g, start : i + 1]
                if start:
                    f = positive(q[h, i])
                    far = f @ matrix / (f.norm() if unit else f @ norm)
                    local = gate[h] * far + (1 - gate[h]) * local
                rows.append(local)
            if end - start == config.segment:
                before = matrix, norm
                for j in range(start, end):
                    f = positive(k[g, j])
                    value = v[g, j]
                    if unit:
                        f = f / f.norm()
                        value = value - f @ matrix
                    elif config.update != "linear":
                        m, z = before if config.update == "delta_segment" else (matrix, norm)
                        if start or (config.update == "delta_token" and j > start):
                            value = value - (f @ m) / (f @ z)
                    matrix, norm = matrix + torch.outer(f, value), norm + f
        heads.append(torch.stack(rows))
    return torch.stack(heads)[None]


def transformer_xl(layer: Layer, tokens: Tokens, scale: float) -> Tensor:
    """One unpadded row; gradients stop where a query's key is in an earlier segment."""
    config: Any = layer.memory.config
    memory: Any = layer.memory
    assert isinstance(config, TransformerXL)
    groups = layer.shape.heads // layer.shape.kv_heads
    k_far, v_far = layer.project(tokens.hidden.detach())
    q_turned = rotate(tokens.q, tokens.angles)[0]
    near = rotate(tokens.k, tokens.angles)[0], tokens.k[0], tokens.v[0]
    far = rotate(k_far, tokens.angles)[0], k_far[0], v_far[0]
    half = math.ceil(layer.shape.hidden / 2)
    width = layer.shape.head_dim

    def relative(g: int, distance: int) -> Tensor:
        if config.clamp is not None:
            distance = min(distance, config.clamp)
        waves = [math.sin(distance / 10_000 ** (c / half)) for c in range(half)]
        waves += [math.cos(distance / 10_000 ** (c / half)) for c in range(half)]
        at = torch.tensor(waves[: layer.shape.hidden], dtype=tokens.hidden.dtype)
        return memory.position_weight[g * width : (g + 1) * width] @ at

    heads = []
    for h in range(layer.shape.heads):
        g = h // groups
        u, w = memory.content_bias[h], memory.position_bias[h]
        rows = []
        for i in range(tokens.q.shape[2]):
            start = i - i % config.segment
            first = i - config.memory + 1 if config.same_length else start - config.memory
            scores, values = [], []
            for j in range(max(0, first), i + 1):
                turned, plain, value = (x[g, j] for x in (near if j >= start else far))
                score = q_turned[h, i] @ turned + u @ plain
                scores.append((score + (tokens.q[0, h, i] + w) @ relative(g, i - j)) * scale)
                values.append(value)
            rows.append(torch.stack(scores).softmax(0) @ torch.stack(values))
        heads.append(torch.stack(rows))
    return torch.stack(heads)[None]


ORACLES = {"infini": infini, "transformer_xl": transformer_xl}


def oracle(
    layer: Layer, hidden: Tensor, positions: Tensor | None, real: Tensor, scale: float
) -> Tensor:
    """Every row alone, its real tokens only; 0 at padding. ``real`` is bool ``[B, L]``."""
    compute = ORACLES[layer.memory.config.name]
    out = hidden.new_zeros(
        hidden.shape[0], layer.shape.heads, hidden.shape[1], layer.shape.head_dim
    )
    for row in range(hidden.shape[0]):
        where = real[row].nonzero().flatten()
        if where.numel() == 0:
            continue
        at = None if positions is None else positions[row : row + 1, where]
        tokens = layer.tokens(hidden[row : row + 1, where], at)
        index = (torch.tensor(row), slice(None), where)
        full = out.clone()
        full[index] = compute(layer, tokens, scale)[0]
        out = full
    return out
