"""Gradients that are computed without a graph of their own, and say so when one is asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from longswift.core.errors import UnsupportedError, problem

Saved = tuple[Any, ...]
Gradients = tuple[Tensor | None, ...]


def once(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Make ``backward(ctx, saved, *grad_outputs)`` that of an ``autograd.Function``.

    ``torch.autograd.function.once_differentiable`` notices second derivatives only where the
    gradient that comes in has a graph, and ``torch.autograd.grad`` not even then: what it misses
    is taken for 0.

    Args:
        backward: Gets ``ctx.saved_tensors``, which gradient checkpointing hands out only once.
    """

    @wraps(backward)
    def call(ctx: Any, *grad_outputs: Tensor | None) -> Gradients:
        saved = ctx.saved_tensors
        with torch.no_grad():
            grads = backward(ctx, saved, *grad_outputs)
        sources = [x for x in (*saved, *grad_outputs) if x is not None and x.requires_grad]
        if not torch.is_grad_enabled() or not sources:
            return grads
        known = [grad for grad in grads if grad is not None]
        found = iter(_Last.apply(len(known), *known, *sources))
        return tuple(None if grad is None else next(found) for grad in grads)

    return call


class _Last(torch.autograd.Function):
    """The first ``count`` tensors, as a function of all others that cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.clone() for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        raise UnsupportedError(
            problem(
                "gradients",
                expected="first derivatives",
                got="a second derivative",
                fix="Use backend='reference', which is dense and can be differentiated twice.",
            )
        )
