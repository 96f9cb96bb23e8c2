"""Optional C++ kernels: compiled on request (``longswift build``), used from then on.

Without a compiler, or on another platform, everything is computed in plain torch.
"""

from __future__ import annotations

import functools
import os
import warnings
from typing import Any

import torch

from longswift.core.compiled.build import build, library, supported

__all__ = ["build", "library", "loaded", "operators", "reason"]


@functools.cache
def operators() -> Any | None:
    """The compiled operators, ``torch.ops.longswift``, or None if they cannot be used.

    ``LONGSWIFT_NATIVE=0`` in the environment leaves them alone.
    """
    if reason() is not None:
        return None
    try:
        torch.ops.load_library(library())
    except OSError as error:
        warnings.warn(f"the compiled kernels in {library()} are not used: {error}", stacklevel=2)
        return None
    return torch.ops.longswift


def loaded() -> Any:
    """The compiled operators, where it is known that they can be used."""
    found = operators()
    assert found is not None
    return found


def reason() -> str | None:
    """Why the compiled operators are not used, or None."""
    if os.environ.get("LONGSWIFT_NATIVE") == "0":
        return "LONGSWIFT_NATIVE=0 in the environment"
    missing = supported()
    if missing is None and not library().exists():
        missing = "not compiled yet: run `longswift build`"
    return missing
