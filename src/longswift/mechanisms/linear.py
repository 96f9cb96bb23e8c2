"""Linear attention: the softmax's exponential replaced by a product of features.

``out_i = phi(q_i) S_i / (phi(q_i) . z_i)`` with ``S_i = sum phi(k_j) v_j^T`` and
``z_i = sum phi(k_j)`` over the keys j that query i sees: ``Q (K^T V)`` instead of ``(Q K^T) V``.

| | time per query and head | memory beyond inputs and output | state |
|---|---|---|---|
| forward, backward | O((C + D) Dv) | O(L) | D (Dv + 1) numbers per KV head |

Katharopoulos et al., 2020, arXiv 2006.16236.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import elu

from longswift.core.errors import ConfigError, problem
from longswift.core.mechanism import Call
from longswift.core.states import LinearState, has_weight
from longswift.mechanisms.recurrent import Recurrent, State


def elu1(x: Tensor) -> Tensor:
    """``elu(x) + 1``: ``x + 1`` for positive x, ``exp(x)`` otherwise; always positive."""
    return elu(x) + 1.0


_MAPS = {"elu1": elu1, "relu": torch.relu, "identity": None}


@dataclass(frozen=True, kw_only=True)
class Linear(Recurrent):
    """Attention with weights ``phi(q) . phi(k)``.

    There is no epsilon: a row is divided by its own sum of weights, and a row without weight (with
    ``relu`` a query may share no feature with any key) is exactly 0 with ``lse = -inf``. ``lse`` is
    the log of the sum of weights, or 0 with ``normalise=False``, where nothing is divided.

    A ``scale`` multiplies the weights: it cancels when they are normalised, and multiplies the
    output when they are not.

    Attributes:
        feature_map: ``"elu1"``, ``"relu"`` or ``"identity"``.
        normalise: Divide by the sum of weights. Not for ``"identity"``, whose weights may add up to
            anything, 0 included.
    """

    name: ClassVar[str] = "linear"
    kernel: ClassVar[str] = "attend_linear"

    feature_map: str = "elu1"
    normalise: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.feature_map not in _MAPS:
            raise ConfigError(
                problem(
                    "Linear.feature_map",
                    expected=f"one of {', '.join(_MAPS)}",
                    got=repr(self.feature_map),
                    fix="Use 'elu1'.",
                )
            )
        if self.feature_map == "identity" and self.normalise:
            raise ConfigError(
                problem(
                    "Linear.normalise",
                    expected="False with feature_map='identity'",
                    got=self.normalise,
                    fix="Products of raw queries and keys may be negative; pass normalise=False.",
                )
            )

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
        assert state is None or isinstance(state, LinearState)
        mapped = _MAPS[self.feature_map]
        found = backend.attend_linear(
            q,
            k,
            v,
            causal=call.causal,
            chunk=self.chunk,
            q_map=mapped,
            k_map=mapped,
            state=state,
            normalise=self.normalise,
            key_mask=key_mask,
        )
        if not self.normalise:
            return found.out * call.scale, torch.zeros_like(found.normaliser), found.state
        weight = has_weight(found.normaliser)
        log = torch.where(weight, found.normaliser, 1.0).log()
        return found.out, torch.where(weight, log, float("-inf")), found.state
