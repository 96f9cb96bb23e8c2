"""What a fidelity measurement compares: a mechanism or a profile, and two baselines beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from longswift.core.mechanism import Call, Mechanism
from longswift.core.softmax import accumulator_dtype
from longswift.core.types import AttentionResult, AttentionStats
from longswift.mechanisms.patterned import full_pattern
from longswift.mechanisms.profile import Profile

WINDOW, UNIFORM, FULL = "window", "uniform", "full"


@dataclass(frozen=True, kw_only=True)
class Uniform(Mechanism):
    """Every visible key weighs the same: what is left of attention when nothing is looked up."""

    name: ClassVar[str] = "uniform"
    supports_cross: ClassVar[bool] = True
    # A bias is part of the scores that are left out.
    supports_bias: ClassVar[bool] = True

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> AttentionResult:
        (q_len, k_len), acc = (q.shape[2], k.shape[2]), accumulator_dtype(q.dtype)
        if call.causal:
            count = torch.arange(k_len - q_len, k_len, device=q.device, dtype=acc) + 1
            # Running sums in double precision: a text can be long.
            total = v.cumsum(2, dtype=torch.float64)[:, :, k_len - q_len :].to(acc)
        else:
            count = torch.full((q_len,), float(k_len), device=q.device, dtype=acc)
            total = v.sum(2, keepdim=True, dtype=acc).expand(-1, -1, q_len, -1)
        mean = (total / count[:, None]).repeat_interleave(q.shape[1] // k.shape[1], 1)
        stats = AttentionStats(
            mechanism=self.name,
            backend="torch",
            mode="static",
            keys_per_query=float(count.mean()),
            density=1.0,
            dense_rows=0.0,
        )
        lse = count.log().expand(q.shape[:3])
        return AttentionResult(mean.to(q.dtype), lse, stats)

    def _visible(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        q_len, k_len, groups = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
        pattern = full_pattern(k_len, k.shape[1], call.causal, q_len)
        return pattern.visible(q_len, k_len, groups, q.device)


class Rival:
    """What the full-attention layers of a model run.

    Args:
        name: How rows call it.
        mechanism: For every layer, or a profile.
    """

    def __init__(self, name: str, mechanism: Mechanism | Profile) -> None:
        self.name = name
        self.mechanism = mechanism
        self._default = mechanism.attention if isinstance(mechanism, Profile) else mechanism
        self._layers: Mapping[int, Mechanism] = (
            mechanism.mechanisms() if isinstance(mechanism, Profile) else {}
        )

    def choose(self, layer: int | None) -> Mechanism:
        """The mechanism of a layer, always the same object."""
        return self._default if layer is None else self._layers.get(layer, self._default)

    def used(self, call: Any) -> bool:
        """Whether an observed call was this rival's; layers with a window of their own are not."""
        return call.mechanism is self.choose(call.layer)
