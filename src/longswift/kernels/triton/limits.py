"""What the kernels refuse, known without compiling any."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from longswift.core.bias import ScoreBias
from longswift.core.errors import UnsupportedError, problem

_P = ParamSpec("_P")
_R = TypeVar("_R")

_WIDEST = 256


def refusal(
    q: Tensor, k: Tensor, v: Tensor, bias: ScoreBias | None = None, kernel: str = "attend"
) -> str | None:
    """Why a function of this backend cannot compute these inputs, or None."""
    if kernel not in ("attend", "attend_linear"):
        return f"{kernel}: there are kernels for attend and attend_linear"
    if kernel == "attend_linear" and bias is not None:
        return "a position bias: linear attention has no scores to add it to"
    if q.dtype == torch.float64 and q.device.type != "cpu":
        return "fp64: the kernels are for fp32 and 16-bit inputs"
    if kernel == "attend_linear":
        return None
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":
        return "bf16 on a CPU: Triton's interpreter cannot multiply it"
    if max(q.shape[3], v.shape[3]) > _WIDEST:
        return f"heads of {max(q.shape[3], v.shape[3])}: at most {_WIDEST} channels fit a tile"
    return None


def checked(
    q: Tensor, k: Tensor, v: Tensor, bias: ScoreBias | None = None, kernel: str = "attend"
) -> tuple[Tensor, ...]:
    """The inputs as the kernels read them.

    Raises:
        UnsupportedError: There is a ``refusal``.
    """
    reason = refusal(q, k, v, bias, kernel)
    if reason is not None:
        raise UnsupportedError(
            problem(
                "backend 'triton'",
                expected="inputs its kernels compute on this device",
                got=reason,
                fix="Use backend='eager'.",
            )
        )
    return unit_stride(q, k, v)


def unit_stride(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors whose channels are neighbours in memory; other views are copied."""
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


def on_their_device(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """``function`` of tensors, run where its first lies: Triton launches on the current device."""

    @functools.wraps(function)
    def run(*args: _P.args, **options: _P.kwargs) -> _R:
        first = (*args, *options.values())[0]
        assert isinstance(first, Tensor)
        with torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext():
            return function(*args, **options)

    return run
