"""What ``torch.compile`` leaves alone: choices by content and our operators cannot be traced."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """Let a compiled caller call ``function`` between two of its graphs, as plain Python.

    ``torch.compiler.disable`` alone would import the compiler, which takes most of a second, into
    every process.
    """
    outside: Callable[P, R] | None = None

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal outside
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if outside is None:
            outside = torch.compiler.disable(function)
        return outside(*args, **kwargs)

    return call
