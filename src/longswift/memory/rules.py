"""How a segment enters an associative memory, and how the memory is read.

``M [B, H, D, Dv]`` (``LinearState.s``) maps features of keys to values, ``z [B, H, D]`` sums the
features; both are fp32 or better, as sums over a long text stall in bf16 and overflow in fp16.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from longswift.core.states import LinearState
from longswift.kernels.eager.linear import divide


def read(f: Tensor, past: LinearState) -> Tensor:
    """What the memory holds for features ``f [B, H, L, D]``: ``f M / (f . z)``, 0 when empty."""
    return divide(f @ past.s, (f @ past.z.unsqueeze(-1)).squeeze(-1))


def add_linear(f: Tensor, v: Tensor, past: LinearState) -> LinearState:
    """``M + f^T v``: values of similar keys add up."""
    return LinearState(past.s + f.mT @ v, past.z + f.sum(-2))


def add_delta_segment(f: Tensor, v: Tensor, past: LinearState) -> LinearState:
    """``M + f^T (v - read(f))``: only what the memory before the segment does not say yet."""
    return add_linear(f, v - read(f, past), past)


def add_delta_token(f: Tensor, v: Tensor, past: LinearState) -> LinearState:
    """``add_delta_segment`` with segments of one token, all at once.

    Token ``t`` stores ``u_t = v_t - b_t f_t (M + sum_{i<t} f_i^T u_i)`` with
    ``b_t = 1 / (f_t . z_{t-1})``, a unit lower triangular system in ``u``.
    O(S^2 D) for a segment of ``S`` tokens instead of S dependent steps.
    """
    total = (f * (past.z.unsqueeze(-2) + f.cumsum(-2) - f)).sum(-1)
    # The very first token finds nothing to correct.
    b = divide(torch.ones_like(total).unsqueeze(-1), total)
    lower = (b * (f @ f.mT)).tril(-1)
    wanted = v - b * (f @ past.s)
    u = torch.linalg.solve_triangular(lower, wanted, upper=False, unitriangular=True)
    return add_linear(f, u, past)


UPDATES: dict[str, Callable[[Tensor, Tensor, LinearState], LinearState]] = {
    "linear": add_linear,
    "delta_segment": add_delta_segment,
    "delta_token": add_delta_token,
}
