"""Optional C++ kernels: compiled on request (``longswift build``), used from then on.

Without a compiler, or on another platform, everything is computed in plain torch.
"""

from __future__ import annotations

import functools
import os
import warnings
from typing import Any

import torch

from longswift.core.compiled.build import build, cache_folder, library, supported

__all__ = ["build", "library", "loaded", "operators", "reason"]

_NOT_COMPILED = "not compiled yet: run `longswift build`"


@functools.cache
def operators() -> Any | None:
    """The compiled operators, ``torch.ops.longswift``, or None if they cannot be used.

    ``LONGSWIFT_NATIVE=0`` in the environment leaves them alone.
    """
    missing = reason()
    if missing is not None:
        if missing == _NOT_COMPILED and any(cache_folder().glob(f"*/{library().name}")):
            # Whoever has compiled them once expects their speed after an upgrade, too.
            warnings.warn(
                f"expected compiled kernels of this version of longswift and torch, got those of "
                f"another in {cache_folder()}; everything works, slower, until you run "
                "`longswift build`",
                stacklevel=2,
            )
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
        missing = _NOT_COMPILED
    return missing
