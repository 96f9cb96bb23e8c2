"""Performer: softmax attention estimated with positive random features (FAVOR+).

For a standard normal w, ``exp(q . k) = E[exp(w . q - |q|^2 / 2) exp(w . k - |k|^2 / 2)]``. With m
draws of w the weights become products of m features, and attention becomes linear. The w are rows
of random orthogonal matrices, rescaled to the lengths of normal vectors, which keeps the estimate
unbiased and lowers its variance. Rows are normalised in the logarithm of the features: no epsilon
(which pulls the estimate towards uniform attention) and no shift by a maximum over the future.

| | time per query and head | memory beyond inputs and output | state |
|---|---|---|---|
| forward, backward | O((C + D + m) (m + Dv)) | O(L) | m (Dv + 1) numbers per KV head |

Choromanski et al., 2021, arXiv 2009.14794.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor

from longswift.core.errors import ConfigError, check_positive, problem
from longswift.core.mechanism import Call
from longswift.core.states import ExponentialState
from longswift.mechanisms.recurrent import Recurrent, State


@dataclass(frozen=True, kw_only=True)
class Performer(Recurrent):
    """Softmax attention estimated with ``features`` positive orthogonal random features.

    All heads share one projection, drawn from ``seed`` by a generator of its own. ``lse`` is the
    log of the estimated sum of exponentials.

    The variance grows with the exponential of ``scale * |q + k|^2``: for large queries and keys no
    affordable number of features helps.

    Attributes:
        features: Features per head (m).
        hyperbolic: Use half as many projections, each with both signs. The estimate of a single
            small ``q . k`` varies less; with many keys the two are about as good.
        seed: Seed of the projection.
    """

    name: ClassVar[str] = "performer"
    kernel: ClassVar[str] = "attend_exponential"

    features: int = 256
    hyperbolic: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("Performer", features=self.features)
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            raise ConfigError(
                problem(
                    "Performer.seed",
                    expected="an integer from 0 to 2**63 - 1",
                    got=repr(self.seed),
                    fix="Use seed=0.",
                )
            )
        if self.hyperbolic and self.features % 2:
            raise ConfigError(
                problem(
                    "Performer.features",
                    expected="an even number with hyperbolic=True",
                    got=self.features,
                    fix="Features come in pairs of both signs.",
                )
            )

    def redraw(self, seed: int) -> Performer:
        """The same configuration with another projection."""
        return replace(self, seed=seed)

    def feature_count(self, head_dim: int) -> int:
        return self.features

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
        root = math.sqrt(abs(call.scale))
        drawn = self.features // 2 if self.hyperbolic else self.features
        w = projection(drawn, q.shape[3], self.seed).to(q.device)

        def log_features(x: Tensor, factor: float) -> Tensor:
            x = x * factor
            along = x @ w.to(x.dtype).T
            if self.hyperbolic:
                along = torch.cat([along, -along], -1)
            return along - x.square().sum(-1, keepdim=True) / 2

        found = backend.attend_exponential(
            q,
            k,
            v,
            causal=call.causal,
            per_feature=False,
            chunk=self.chunk,
            q_map=functools.partial(log_features, factor=math.copysign(root, call.scale)),
            k_map=functools.partial(log_features, factor=root),
            state=state,
            key_mask=key_mask,
        )
        return found.out, found.log_normaliser - math.log(self.features), found.state


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)
def projection(count: int, dim: int, seed: int) -> Tensor:
    """``count`` random directions ``[count, dim]`` in fp64: orthogonal in blocks of ``dim``.

    Each row is distributed like a standard normal vector; rows of a block are at right angles.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = -(-count // dim), dim, dim
    normal, lengths = (
        torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") for _ in range(2)
    )
    basis, upper = torch.linalg.qr(normal)
    # Without the signs of the diagonal QR prefers some rotations to others.
    basis = basis * upper.diagonal(dim1=1, dim2=2).sign().unsqueeze(1)
    rows = basis.transpose(1, 2) * lengths.norm(dim=2, keepdim=True)
    return rows.flatten(0, 1)[:count].contiguous()
