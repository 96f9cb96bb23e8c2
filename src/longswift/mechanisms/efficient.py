"""Efficient Attention: softmax over features for queries, softmax over positions for keys.

``out_i = sum_d softmax_d(q_i)_d * sum_j softmax_j(k_d)_j v_j``: every feature holds one mean of the
values, weighted by ``exp(k_jd)``, and a query mixes these D means. In causal order the second
softmax runs over the keys up to i, so every row has normalisers of its own, one per feature; its
weights are not negative and add up to 1.

| | time per query and head | memory beyond inputs and output | state |
|---|---|---|---|
| forward, backward | O((C + D) Dv) | O(L) | D (Dv + 1) numbers per KV head |

Shen et al., 2021, arXiv 1812.01243; the causal form keeps the bidirectional one's normalisers.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar

from torch import Tensor

from longswift.core.mechanism import Call
from longswift.core.states import ExponentialState
from longswift.mechanisms.recurrent import Recurrent, State


@dataclass(frozen=True, kw_only=True)
class Efficient(Recurrent):
    """Attention through one mean of the values per feature.

    No score of a query and a key exists, so ``scale`` has nothing to act on and no effect. Rows add
    up to 1 without a common normaliser: ``lse`` is 0, and ``-inf`` where no key is seen.
    """

    name: ClassVar[str] = "efficient"
    kernel: ClassVar[str] = "attend_exponential"

    def feature_count(self, head_dim: int) -> int:
        return head_dim

    def _attend(
        self,
        backend: ModuleType,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        call: Call,
        state: State | None = None,
        key_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, State]:
        assert state is None or isinstance(state, ExponentialState)
        found = backend.attend_exponential(
            q,
            k,
            v,
            causal=call.causal,
            per_feature=True,
            chunk=self.chunk,
            state=state,
            key_mask=key_mask,
        )
        return found.out, found.log_normaliser, found.state
