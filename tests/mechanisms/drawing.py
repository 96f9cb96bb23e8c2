"""Random attention inputs for the property tests, and the plainest possible softmax attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from longswift.core.bias import PositionBias
from longswift.core.mechanism import Mechanism
from longswift.core.types import AttentionResult
from longswift.extend.bias import ALiBi, ClippedBias, RelativeBias, T5Bias
from tests.mechanisms.table import Case

BIASES = ("none", "none", "none", "alibi", "slopes", "clipped", "t5")
MASKS = ("none", "left", "right", "both", "holes", "empty_row")


@dataclass(frozen=True, kw_only=True, repr=False)
class Inputs:
    """Arguments of one call."""

    q: Tensor
    k: Tensor
    v: Tensor
    causal: bool = True
    key_mask: Tensor | None = None
    scale: float | None = None
    bias: PositionBias | None = None

    def __repr__(self) -> str:
        q, k, v = (list(x.shape) for x in self.tensors)
        mask = None if self.key_mask is None else self.key_mask.int().tolist()
        return (
            f"Inputs(q={q}, k={k}, v={v}, {self.q.dtype}, contiguous={self.q.is_contiguous()}, "
            f"causal={self.causal}, scale={self.scale}, bias={self.bias}, key_mask={mask})"
        )

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    @property
    def options(self) -> dict[str, Any]:
        return {
            "causal": self.causal,
            "key_mask": self.key_mask,
            "scale": self.scale,
            "bias": self.bias,
        }

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What gradients are taken of: the tensors, and the bias's own if it is learned."""
        if isinstance(self.bias, RelativeBias):
            return *self.tensors, self.bias.table
        if isinstance(self.bias, ALiBi) and isinstance(self.bias.slopes, Tensor):
            return *self.tensors, self.bias.slopes
        return self.tensors

    def run(self, mechanism: Mechanism, **options: Any) -> AttentionResult:
        return mechanism(*self.tensors, **{**self.options, **options})

    def with_grad(self) -> Inputs:
        q, k, v, *learned = (x.detach().clone().requires_grad_() for x in self.leaves)
        bias = self.bias
        if learned:
            name = "slopes" if isinstance(bias, ALiBi) else "table"
            bias = replace(bias, **{name: learned[0]})  # type: ignore[type-var]
        return replace(self, q=q, k=k, v=v, bias=bias)

    def to(self, dtype: torch.dtype) -> Inputs:
        return replace(self, q=self.q.to(dtype), k=self.k.to(dtype), v=self.v.to(dtype))


def make_mask(kind: str, batch: int, length: int, generator: torch.Generator) -> Tensor | None:
    """Key mask with some real tokens in every row, but for the first one of ``empty_row``."""
    if kind == "none":
        return None
    mask = torch.ones(batch, length, dtype=torch.bool)
    for row in range(batch):
        cut = torch.randint(0, max(1, length), (2,), generator=generator).tolist()
        if kind in ("left", "both"):
            mask[row, : cut[0]] = False
        if kind in ("right", "both"):
            mask[row, max(cut[1], cut[0] * (kind == "both")) + 1 :] = False
        if kind == "holes":
            mask[row] = torch.rand(length, generator=generator) < 0.6
    if kind == "empty_row":
        mask[0] = False
    return mask


def make_bias(
    kind: str, heads: int, causal: bool, dtype: torch.dtype, generator: torch.Generator
) -> PositionBias | None:
    """A bias of some kind for ``heads`` query heads."""
    if kind == "none":
        return None
    if kind == "alibi":
        return ALiBi()
    if kind == "slopes":
        return ALiBi(slopes=torch.rand(heads, generator=generator, dtype=dtype))
    table = torch.randn(31 if kind == "clipped" else 10, heads, generator=generator, dtype=dtype)
    if kind == "clipped":
        return ClippedBias(table=2 * table)
    return T5Bias(table=2 * table, max_distance=40, bidirectional=not causal)


@st.composite
def inputs(
    draw: st.DrawFn,
    case: Case,
    *,
    causal: bool | None = None,
    max_len: int = 90,
    masks: tuple[str, ...] = MASKS,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64),
    chunked: bool = True,
    same_dv: bool = False,
    biases: tuple[str, ...] = BIASES,
) -> Inputs:
    """A random call of a case: shapes, padding, memory layout, dtype."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    if causal is None:
        causal = draw(st.sampled_from(case.directions))
    batch = draw(st.integers(1, 3))
    kv_heads = draw(st.sampled_from(case.kv_heads))
    groups = draw(st.integers(1, 3))
    k_len = draw(st.integers(1, max_len))
    q_len = k_len
    if chunked and causal:
        q_len = draw(st.sampled_from([k_len, 1, draw(st.integers(1, k_len))]))
    elif chunked and case.cross:
        q_len = draw(st.integers(1, max_len))
    dim = draw(st.sampled_from([4, 8, 16]))
    v_dim = dim if same_dv else draw(st.sampled_from([dim, dim, 5]))
    dtype = draw(st.sampled_from(dtypes))
    hf_layout = draw(st.booleans())

    def tensor(heads: int, length: int, width: int) -> Tensor:
        x = torch.randn(batch, length, heads, width, generator=generator, dtype=torch.float64)
        x = x.to(dtype).transpose(1, 2)
        return x if hf_layout else x.contiguous()

    bias = None
    if case.biased and (causal or q_len == k_len):
        kind = draw(st.sampled_from(biases))
        bias = make_bias(kind, kv_heads * groups, causal, dtype, generator)
    return Inputs(
        q=tensor(kv_heads * groups, q_len, dim),
        k=tensor(kv_heads, k_len, dim) * draw(st.sampled_from([1.0, 3.0])),
        v=tensor(kv_heads, k_len, v_dim),
        causal=causal,
        key_mask=make_mask(draw(st.sampled_from(masks)), batch, k_len, generator),
        scale=draw(st.sampled_from([None, 0.3])),
        bias=bias,
    )


def bias_matrix(x: Inputs) -> Tensor:
    """The bias of every pair in fp64, ``[B or 1, Hq, Lq, Lk]``; distances count real tokens."""
    (heads, q_len), k_len = x.q.shape[1:3], x.k.shape[2]
    if x.bias is None:
        return torch.zeros(1, heads, q_len, k_len, dtype=torch.float64)
    real = torch.ones(1, k_len, dtype=torch.bool) if x.key_mask is None else x.key_mask
    place = real.cumsum(1)
    offset = place[:, None, :] - place[:, k_len - q_len :, None]
    values = x.bias.values(offset.flatten(), heads).double()
    return values.view(heads, *offset.shape).transpose(0, 1)


def masked_softmax(x: Inputs, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Dense softmax attention under ``seen [B, Hq, Lq, Lk]`` in fp64: output and log-sum-exp."""
    groups = x.q.shape[1] // x.k.shape[1]
    q, k, v = (t.double() for t in x.tensors)
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scale = x.q.shape[-1] ** -0.5 if x.scale is None else x.scale
    scores = q @ k.transpose(-1, -2) * scale
    if x.bias is not None:
        scores = scores + bias_matrix(x)
    scores = scores.masked_fill(~seen, float("-inf"))
    lse = scores.logsumexp(-1)
    weights = torch.where(seen, (scores - lse.unsqueeze(-1)).exp(), 0.0)
    return weights @ v, lse


def allowed_pairs(x: Inputs) -> Tensor:
    """Which keys full attention would see, bool ``[B, Hq, Lq, Lk]``; padded queries see none."""
    batch, heads, q_len, _ = x.q.shape
    k_len = x.k.shape[2]
    key = torch.arange(k_len)
    position = torch.arange(k_len - q_len, k_len)[:, None]
    allowed = torch.ones(batch, 1, q_len, k_len, dtype=torch.bool)
    if x.causal:
        allowed = allowed & (key <= position)
    if x.key_mask is not None:
        allowed = allowed & x.key_mask[:, None, None, :]
        if x.causal or q_len == k_len:
            allowed = allowed & x.key_mask[:, None, k_len - q_len :, None]
    return allowed.expand(batch, heads, q_len, k_len)


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 1e-9, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 2e-4, "atol": 2e-5}
