"""What mechanisms with a state of fixed size share: dispatch, statistics, and stepping by state."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from longswift.core.errors import InputError, check_positive, problem
from longswift.core.inputs import check_finite, check_inputs, check_scale
from longswift.core.mechanism import Call, Mechanism
from longswift.core.softmax import accumulator_dtype
from longswift.core.states import ExponentialState, LinearState
from longswift.core.types import AttentionResult, AttentionStats
from longswift.kernels import dispatch
from longswift.mechanisms.patterned import dense_keys

State = LinearState | ExponentialState


class StepResult(NamedTuple):
    """Output of ``Recurrent.step``.

    Attributes:
        out: ``[B, Hq, L, Dv]`` in the dtype of the query.
        lse: ``[B, Hq, L]`` as in ``AttentionResult``.
        state: What to pass to the next step; its size does not depend on what was read.
    """

    out: Tensor
    lse: Tensor
    state: State


@dataclass(frozen=True, kw_only=True)
class Recurrent(Mechanism):
    """Attention whose past fits into a state of fixed size.

    In the statistics ``keys_per_query`` is arithmetic, not choice: the number of keys whose
    scoring and summing costs as many multiplications as reading and updating the state and
    weighting the keys of the query's own chunk.

    Attributes:
        chunk: Tokens whose weights are formed explicitly; changes the speed, never the result.
    """

    supports_cross: ClassVar[bool] = True
    # The function of a backend that ``_attend`` calls.
    kernel: ClassVar[str]

    chunk: int = 128

    def __post_init__(self) -> None:
        check_positive(type(self).__name__, chunk=self.chunk)

    @abstractmethod
    def feature_count(self, head_dim: int) -> int:
        """Features per head: the height of the state."""

    @abstractmethod
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
        """Output and lse in the accumulator dtype, and the state after these keys."""

    def step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: State | None = None,
        *,
        key_mask: Tensor | None = None,
        scale: float | None = None,
        backend: str = "auto",
    ) -> StepResult:
        """Read new tokens, one or many, after those that ``state`` remembers; causal.

        ``O(L F Dv)`` time, whatever was read before. Cutting a text into steps anywhere gives what
        one call over the whole text gives.

        Args:
            q: ``[B, Hq, L, D]`` of the new tokens.
            k: ``[B, Hkv, L, D]`` of the same tokens.
            v: ``[B, Hkv, L, Dv]``.
            state: What the previous step returned, None at the start of a text.
            key_mask: bool ``[B, L]``, True = real token; others leave no trace and return 0.
            scale: Factor on the scores, ``D ** -0.5`` when None.
            backend: As in a call.

        Raises:
            InputError: Wrong shapes, dtypes, devices, NaN, or a state of another shape.
        """
        check_inputs(q, k, v, key_mask, True)
        if q.shape[2] != k.shape[2]:
            raise InputError(
                problem(
                    "lengths",
                    expected="q and k of the same new tokens",
                    got=f"Lq={q.shape[2]}, Lk={k.shape[2]}",
                    fix="Keys before them belong in the state; call the mechanism for a KV cache.",
                )
            )
        shape = (k.shape[0], k.shape[1], self.feature_count(k.shape[3]), v.shape[3])
        if state is not None and tuple(state[0].shape) != shape:
            raise InputError(
                problem(
                    "state",
                    expected=f"the state of such inputs, {shape}",
                    got=tuple(state[0].shape),
                    fix="Pass what the previous step returned, or None at the start of a text.",
                )
            )
        check_finite(q=q, k=k, v=v)
        call = Call(causal=True, scale=check_scale(scale, q.shape[3]))
        module = dispatch.resolve(backend, q.device, q, k, v, kernel=self.kernel)[1]
        with torch.autocast(q.device.type, enabled=False):
            out, lse, after = self._attend(module, q, k, v, call, state, key_mask)
        if key_mask is not None:
            hidden = ~key_mask[:, None]
            out = out.masked_fill(hidden.unsqueeze(3), 0.0)
            lse = lse.masked_fill(hidden, float("-inf"))
        return StepResult(out.to(q.dtype), lse, after)

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> AttentionResult:
        name, module = dispatch.resolve(call.backend, q.device, q, k, v, kernel=self.kernel)
        out, lse, _ = self._attend(module, q, k, v, call)
        return AttentionResult(out.to(q.dtype), lse, self._stats(name, q, k, v, call.causal))

    def _visible(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        return every_key(q, k, call.causal)

    def _stats(self, backend: str, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> AttentionStats:
        (_, heads, q_len, dim), (kv_heads, k_len), v_dim = q.shape, k.shape[1:3], v.shape[3]
        features = self.feature_count(dim)
        products = features * v_dim * (1 + kv_heads / heads * k_len / q_len)
        if causal:
            products += (min(self.chunk, q_len) + 1) / 2 * (features + v_dim)
        keys = products / (dim + v_dim)
        size = torch.finfo(accumulator_dtype(q.dtype)).bits // 8
        return AttentionStats(
            mechanism=self.name,
            backend=backend,
            mode="static",
            keys_per_query=keys,
            density=keys / dense_keys(q_len, k_len, causal),
            dense_rows=0.0,
            extra={
                "features": features,
                "state_bytes_per_sequence": kv_heads * features * (v_dim + 1) * size,
            },
        )


def every_key(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """``visible`` of outputs that depend on every key they may, bool ``[1, 1, Lq, Lk]``."""
    q_len, k_len = q.shape[2], k.shape[2]
    seen = torch.ones(1, 1, q_len, k_len, dtype=torch.bool, device=q.device)
    return seen.tril(k_len - q_len) if causal else seen
