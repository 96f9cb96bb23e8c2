"""Antidiagonal block scores (XAttention, Xu et al., 2025, arXiv 2503.16428).

Queries and keys are folded by ``stride``: every folded score sums one antidiagonal of a
``stride x stride`` tile, ``1 / stride`` of full attention's work. Softmax over the folded keys,
summed per key block, over the query block's rows and the GQA group; whole blocks are taken, best
first. No exact second stage. A position bias enters with its mean over the antidiagonal.

Cost per query and head: ``D n / stride`` multiply-adds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from longswift.core.bias import ScoreBias
from longswift.core.blocks import BlockRun, row_positions, stack_queries
from longswift.core.errors import ConfigError, UnsupportedError, problem
from longswift.core.softmax import accumulator_dtype
from longswift.mechanisms.selectors.base import (
    EMPTY,
    Request,
    Selection,
    Selector,
    by_run,
    candidate_blocks,
)

_HIDDEN = float("-inf")


@dataclass(frozen=True, kw_only=True)
class Antidiagonal(Selector):
    """Whole key blocks by antidiagonal sums.

    A budget below ``key_block`` tokens chooses nothing, and is refused. ``coverage`` is a share of
    the summed block scores here, not of every row's attention.

    Attributes:
        key_block: Keys per selected block; a power of two.
        stride: Folding factor, a power of two that divides ``key_block``.
    """

    name: ClassVar[str] = "antidiagonal"
    supports_bias: ClassVar[bool] = True

    stride: int = 8

    def __post_init__(self) -> None:
        self._check_power(key_block=self.key_block, stride=self.stride)
        if self.key_block % self.stride:
            raise ConfigError(
                problem(
                    "Antidiagonal.stride",
                    expected=f"a divisor of key_block={self.key_block}",
                    got=self.stride,
                    fix="Use 4, 8 or 16.",
                )
            )

    def choosing_cost(self, budget: int, keys: float, dim: int) -> float:
        """Folded scores."""
        return keys / self.stride / 2 if budget else 0.0

    def select(self, request: Request) -> Selection:
        """See the module docstring."""
        if request.strict:
            raise UnsupportedError(
                problem(
                    "selector 'antidiagonal'",
                    expected="causality='shared' (its sums mix all rows of a block)",
                    got="strict causality, the default while training",
                    fix="Train with selector='bounds', or accept the leak with causality='shared'.",
                )
            )
        if request.budget < self.key_block:
            raise ConfigError(
                problem(
                    "selector 'antidiagonal'",
                    expected=f"key_tokens of at least one block ({self.key_block})",
                    got=request.budget,
                    fix="Raise key_tokens, or use a smaller key_block.",
                )
            )
        acc = accumulator_dtype(request.q.dtype)
        missing = -request.k.shape[2] % self.key_block
        # Repeating the last key, not zeros: a zero key scores 0, which is a lot among negatives.
        last = request.k[:, :, -1:].expand(-1, -1, missing, -1)
        keys = torch.cat([request.k, last], 2).to(acc)
        keys = keys.unflatten(2, (-1, self.stride)).flatten(3)
        bias = request.bias
        if bias is not None:
            bias = bias.antidiagonals(self.stride, self.key_block)
        return by_run(
            request,
            request.k.shape[2] // self.stride,
            lambda run, _: Selection(self._choose(request, run, keys, acc, bias), None),
        )

    def _choose(
        self,
        request: Request,
        run: BlockRun,
        keys: Tensor,
        acc: torch.dtype,
        bias: ScoreBias | None,
    ) -> Tensor:
        """Tokens ``[B, Hkv, N, <= budget]``."""
        batch, kv_heads, k_len, _ = request.k.shape
        outside, width = candidate_blocks(request, run, self.key_block)
        blocks = min(request.budget // self.key_block, width)
        if blocks == 0 or not bool(outside.any()):
            return torch.empty(
                batch, kv_heads, run.count, 0, dtype=torch.long, device=request.k.device
            )
        q = stack_queries(request.q, run, kv_heads).to(acc) * (request.scale / self.stride)
        q = q.unflatten(3, (request.groups, run.rows))
        last = q[..., -1:, :].expand(*q.shape[:4], -run.rows % self.stride, -1)
        q = torch.cat([q, last], 4)
        folded = q.unflatten(4, (-1, self.stride)).flip(5).flatten(5).flatten(3, 4)
        per_block = self.key_block // self.stride
        scores = folded.flatten(2, 3) @ keys[:, :, : width * per_block].transpose(2, 3)
        scores = scores.view(*folded.shape[:4], width * per_block)
        if bias is not None:
            # Of every folded row the last token meets the first of a folded key.
            position = row_positions(run, q.device)[:, :: self.stride] + (self.stride - 1)
            tile = torch.arange(width * per_block, device=q.device).expand(1, kv_heads, 1, -1)
            scores = scores + bias.at(tile, position)
        scores = scores.unflatten(4, (width, per_block))
        scores.masked_fill_(~outside[:, :, None, :, None], _HIDDEN)
        probs = torch.softmax(scores.flatten(4), -1).nan_to_num_()
        rank = probs.view_as(scores).sum((3, 5)).masked_fill_(~outside, float(EMPTY))
        rank[..., : request.sinks // self.key_block] = EMPTY
        value, index = rank.topk(blocks, dim=-1)
        taken = value > EMPTY
        if request.coverage is not None:
            mass = value.clamp(min=0.0)
            before = mass.cumsum(-1) - mass
            total = rank.clamp(min=0.0).sum(-1, keepdim=True)
            taken &= before < request.coverage * total
        inside = torch.arange(self.key_block, device=index.device)
        tokens = (index.unsqueeze(-1) * self.key_block + inside).flatten(3)
        barred = ~taken.repeat_interleave(self.key_block, 3)
        barred |= (tokens < request.sinks) | (tokens >= k_len)
        return tokens.masked_fill_(barred, EMPTY)
