"""Heads whose channels the compiled kernels do not take, filled up with channels of zeros.

These add nothing to a product and come out as zeros, so that any softmax over products is what it
was; they cost a copy of the inputs, which few queries behind many keys are not worth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import TypeVar

from torch import Tensor
from torch.nn.functional import pad

from longswift.core.mechanism import Call, Mechanism
from longswift.core.types import AttentionResult
from longswift.kernels import dispatch

Own = TypeVar("Own", bound=Mechanism)

# Keys in all, or for every query, up to which the copies are soon made up for.
_FEW_KEYS, _PER_QUERY = 256, 32


def filled_up(
    forward: Callable[[Own, Tensor, Tensor, Tensor, Call], AttentionResult],
) -> Callable[[Own, Tensor, Tensor, Tensor, Call], AttentionResult]:
    """A mechanism's ``_forward`` with channels that fill up the compiled kernels' vectors."""

    @wraps(forward)
    def filled(self: Own, q: Tensor, k: Tensor, v: Tensor, call: Call) -> AttentionResult:
        if not _is_worth_it(q, k, v, call):
            return forward(self, q, k, v, call)
        # Pages are summaries of the keys as they were; queries are too many to need them.
        own = replace(call, summary=None)
        result = forward(self, _filled(q), _filled(k), _filled(v), own)
        return result._replace(out=result.out[..., : v.shape[3]])

    return filled


def filled_up_choice(
    visible: Callable[[Own, Tensor, Tensor, Call], Tensor],
) -> Callable[[Own, Tensor, Tensor, Call], Tensor]:
    """The same for ``_visible``: what a kernel chooses depends on how it rounds."""

    @wraps(visible)
    def filled(self: Own, q: Tensor, k: Tensor, call: Call) -> Tensor:
        if not _is_worth_it(q, k, k, call):
            return visible(self, q, k, call)
        return visible(self, _filled(q), _filled(k), call)

    return filled


def _is_worth_it(q: Tensor, k: Tensor, v: Tensor, call: Call) -> bool:
    if q.shape[3] % dispatch.VECTOR == 0 and v.shape[3] % dispatch.VECTOR == 0:
        return False
    if call.bias is not None or not dispatch.takes_vectors(q):
        return False
    enough = k.shape[2] <= max(_FEW_KEYS, _PER_QUERY * q.shape[2])
    return call.backend == "native" or call.backend == "auto" and enough


def _filled(x: Tensor) -> Tensor:
    return pad(x, (0, -x.shape[3] % dispatch.VECTOR))
