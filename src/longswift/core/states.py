"""What attention without a growing cache carries from one call to the next: sums of fixed size."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from longswift.core.errors import ConfigError, problem

# Features of tokens: ``[..., D]`` to ``[..., F]``.
FeatureMap = Callable[[Tensor], Tensor]


class LinearState(NamedTuple):
    """Sums over the keys seen so far, in fp32 (fp64 for fp64 input).

    Attributes:
        s: ``[B, Hkv, F, Dv]``, the sum of ``phi(k) v^T``.
        z: ``[B, Hkv, F]``, the sum of ``phi(k)``.
    """

    s: Tensor
    z: Tensor

    @classmethod
    def empty(cls, shape: tuple[int, int, int, int], like: Tensor) -> LinearState:
        """No key seen yet; ``shape`` is ``(B, Hkv, F, Dv)``, dtype and device those of ``like``."""
        return cls(like.new_zeros(shape), like.new_zeros(shape[:3]))


class ExponentialState(NamedTuple):
    """Keys seen so far under features ``exp(u)``, kept so that nothing over- or underflows.

    Attributes:
        mean: ``[B, Hkv, F, Dv]``, per feature the mean of v weighted by ``exp(u)``.
        log_z: ``[B, Hkv, F]``, per feature the log-sum-exp of u; ``-inf`` before the first key.
    """

    mean: Tensor
    log_z: Tensor

    @classmethod
    def empty(cls, shape: tuple[int, int, int, int], like: Tensor) -> ExponentialState:
        """No key seen yet; ``shape`` is ``(B, Hkv, F, Dv)``, dtype and device those of ``like``."""
        nothing = torch.full(shape[:3], float("-inf"), dtype=like.dtype, device=like.device)
        return cls(like.new_zeros(shape), nothing)


class LinearResult(NamedTuple):
    """Output of a linear-attention kernel; everything is in fp32 (fp64 for fp64 input).

    Attributes:
        out: ``[B, Hq, Lq, Dv]``.
        normaliser: ``[B, Hq, Lq]``, what the output was (or would be) divided by.
        state: Sums after the last key.
    """

    out: Tensor
    normaliser: Tensor
    state: LinearState


class ExponentialResult(NamedTuple):
    """Output of attention with exponential features, in fp32 (fp64 for fp64 input).

    Attributes:
        out: ``[B, Hq, Lq, Dv]``, a weighted mean of values.
        log_normaliser: ``[B, Hq, Lq]``, 0 where every feature has a normaliser of its own.
        state: What the keys left behind.
    """

    out: Tensor
    log_normaliser: Tensor
    state: ExponentialState


def has_weight(normaliser: Tensor) -> Tensor:
    """Where a sum of weights is positive and far enough from underflow to be divided by."""
    return normaliser > least_weight(normaliser.dtype)


def least_weight(dtype: torch.dtype) -> float:
    """The largest sum of weights that counts as none."""
    return float(torch.finfo(dtype).tiny ** 0.8)


def check_own_chunk(own_chunk: bool, causal: bool) -> None:
    """Refuses queries that see no chunk of their own where there is no order of chunks.

    Raises:
        ConfigError: ``own_chunk=False`` without causal order.
    """
    if not causal and not own_chunk:
        raise ConfigError(
            problem(
                "own_chunk",
                expected="causal=True with own_chunk=False",
                got="causal=False",
                fix="Bidirectional queries see every chunk.",
            )
        )
