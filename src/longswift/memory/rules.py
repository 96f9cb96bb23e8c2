"""How a segment enters an associative memory, and how the memory is read.

``M [B, H, D, Dv]`` (``LinearState.s``) maps features of keys to values, ``z [B, H, D]`` sums the
features; both are fp32 or better, as sums over a long text stall in bf16 and overflow in fp16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from longswift.core.states import LinearState
from longswift.kernels.eager.linear import divide


class Rule(NamedTuple):
    """A way to store, and the way to read that belongs to it.

    Attributes:
        update: From features ``f [B, H, L, D]``, values ``v [B, H, L, Dv]`` and the memory before
            them to the memory after.
        read: From features and a memory to what it holds for them, 0 when it is empty.
        divides: Reads are divided by ``z``. Without, ``z`` has no features: ``[B, H, 0]``.
    """

    update: Callable[[Tensor, Tensor, LinearState], LinearState]
    read: Callable[[Tensor, LinearState], Tensor]
    divides: bool = True


def read(f: Tensor, past: LinearState) -> Tensor:
    """What the memory holds for features ``f [B, H, L, D]``: ``f M / (f . z)``, 0 when empty."""
    return divide(f @ past.s, (f @ past.z.unsqueeze(-1)).squeeze(-1))


def read_unit(f: Tensor, past: LinearState) -> Tensor:
    """``f M`` for features of length one."""
    return unit(f) @ past.s


def add_linear(f: Tensor, v: Tensor, past: LinearState) -> LinearState:
    """``M + f^T v``: values of similar keys add up."""
    return LinearState(past.s + f.mT @ v, past.z + f.sum(-2))


def add_delta_segment(f: Tensor, v: Tensor, past: LinearState) -> LinearState:
    """``M + f^T (v - read(f))``: only what the memory before the segment does not say yet.

    ``z`` grows all the same, and every read with it shrinks: what is known already counts half
    when it is stored again.
    """
    return add_linear(f, v - read(f, past), past)


def add_delta_token(f: Tensor, v: Tensor, past: LinearState) -> LinearState:
    """``add_delta_segment`` with segments of one token, all at once.

    Token ``t`` subtracts ``b_t f_t M_{t-1}`` with ``b_t = 1 / (f_t . z_{t-1})``.
    """
    total = (f * (past.z.unsqueeze(-2) + f.cumsum(-2) - f)).sum(-1)
    # The very first token finds nothing to correct.
    b = divide(torch.ones_like(total).unsqueeze(-1), total)
    return add_linear(f, _news(f, v, b, past), past)


def add_delta_unit(f: Tensor, v: Tensor, past: LinearState) -> LinearState:
    """``M + f_t^T (v_t - f_t M)`` token by token, for features of length one.

    A step replaces what the memory says about its key and touches nothing orthogonal to it; no
    ``z`` is needed. Schlag et al., 2021, arXiv 2102.11174 (features that sum to one); Yang et al.,
    2024, arXiv 2406.06484 (of length one, as here).
    """
    f = unit(f)
    return LinearState(past.s + f.mT @ _news(f, v, f.new_ones(()), past), past.z)


def unit(f: Tensor) -> Tensor:
    """Features of length one; 0 where they have none."""
    return divide(f, f.norm(dim=-1))


def _news(f: Tensor, v: Tensor, b: Tensor, past: LinearState) -> Tensor:
    """What each token stores beyond what the memory says about its key when its turn comes.

    ``u_t = v_t - b_t f_t (M + sum_{i<t} f_i^T u_i)`` is a unit lower triangular system in ``u``:
    O(S^2 D) for a segment of ``S`` tokens instead of S dependent steps.
    """
    lower = (b * (f @ f.mT)).tril(-1)
    wanted = v - b * (f @ past.s)
    return torch.linalg.solve_triangular(lower, wanted, upper=False, unitriangular=True)


RULES: dict[str, Rule] = {
    "linear": Rule(add_linear, read),
    "delta_unit": Rule(add_delta_unit, read_unit, divides=False),
    "delta_token": Rule(add_delta_token, read),
    "delta_segment": Rule(add_delta_segment, read),
}
