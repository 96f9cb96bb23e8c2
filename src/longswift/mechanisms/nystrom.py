"""Nystrom attention: the softmax matrix approximated through m landmark rows and columns.

``softmax(Q K^T) ~ softmax(Q K~^T) softmax(Q~ K~^T)^+ softmax(Q~ K^T)``, where the landmarks
``Q~, K~`` are means of m consecutive segments. Bidirectional only: every segment mean and the
inverse mix all positions, and no causal form is known.

| | time per query and head | memory beyond inputs and output |
|---|---|---|
| forward, backward | O(m (D + Dv) + m^3 iterations / L) | O(L) |

Xiong et al., 2021, arXiv 2102.03902; without its convolution, which has parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from longswift.core.errors import ConfigError, check_positive, problem
from longswift.core.mechanism import Call, Mechanism
from longswift.core.softmax import accumulator_dtype
from longswift.core.types import AttentionResult, AttentionStats
from longswift.kernels import dispatch
from longswift.mechanisms.recurrent import every_key


@dataclass(frozen=True, kw_only=True)
class Nystrom(Mechanism):
    """Bidirectional attention through segment means.

    With as many landmarks as tokens and the exact inverse it is softmax attention. Six iterations
    do not reach the inverse, and with fewer landmarks than tokens this is a virtue: the exact
    inverse of a badly conditioned matrix amplifies what the landmarks cannot describe.

    There is no normaliser: ``lse`` is 0. ``keys_per_query`` counts the landmarks each query sees,
    the keys each landmark sees, and the arithmetic of the inverse in units of a key.

    Attributes:
        landmarks: Segments (m); shorter inputs use one per token.
        iterations: Steps towards the pseudo-inverse, or None for the exact one.
    """

    name: ClassVar[str] = "nystrom"
    supports_causal: ClassVar[bool] = False

    landmarks: int = 64
    iterations: int | None = 6

    def __post_init__(self) -> None:
        check_positive("Nystrom", landmarks=self.landmarks)
        if self.iterations is not None and (
            type(self.iterations) is not int or self.iterations < 1
        ):
            raise ConfigError(
                problem(
                    "Nystrom.iterations",
                    expected="a positive integer, or None for the exact pseudo-inverse",
                    got=repr(self.iterations),
                    fix="Use iterations=6.",
                )
            )

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> AttentionResult:
        name, backend = dispatch.resolve(call.backend, q.device, kernel="attend_landmarks")
        out = backend.attend_landmarks(
            q, k, v, landmarks=self.landmarks, scale=call.scale, iterations=self.iterations
        )
        lse = torch.zeros(q.shape[:3], dtype=accumulator_dtype(q.dtype), device=q.device)
        return AttentionResult(out.to(q.dtype), lse, self._stats(name, q, v))

    def _stats(self, backend: str, q: Tensor, v: Tensor) -> AttentionStats:
        length, width = q.shape[2], q.shape[3] + v.shape[3]
        landmarks = min(self.landmarks, length)
        # The exact inverse costs about what twenty products do.
        products = 20 if self.iterations is None else 4 * self.iterations
        keys = 2 * landmarks + products * landmarks**3 / (width * length)
        return AttentionStats(
            mechanism=self.name,
            backend=backend,
            mode="static",
            keys_per_query=keys,
            density=keys / length,
            dense_rows=0.0,
            extra={"landmarks": landmarks},
        )

    def _visible(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        return every_key(q, k, call.causal)
