"""Which backend computes a pattern; an explicit name never falls back."""

from __future__ import annotations

from types import ModuleType

import torch

from longswift.core.errors import ConfigError, problem
from longswift.kernels import eager, flex, reference, triton

BACKENDS: dict[str, ModuleType] = {"eager": eager, "flex": flex, "reference": reference, "triton": triton}


def available(device: torch.device | str = "cpu") -> dict[str, tuple[bool, str]]:
    """Every backend with whether it is usable on ``device``, and why or why not."""
    return {name: module.verify(torch.device(device)) for name, module in BACKENDS.items()}


def resolve(backend: str, device: torch.device) -> tuple[str, ModuleType]:
    """Name and module of the backend to use.

    Args:
        backend: ``"auto"`` or a name.
        device: Where the tensors are.

    Raises:
        ConfigError: Unknown backend, or an explicit one that cannot run on ``device``.
    """
    if backend == "auto":
        return "eager", eager
    if backend not in BACKENDS:
        raise ConfigError(
            problem(
                "backend",
                expected=f"'auto' or one of {', '.join(BACKENDS)}",
                got=repr(backend),
                fix="Run `longswift info` to see what can run here.",
            )
        )
    usable, reason = BACKENDS[backend].verify(device)
    if not usable:
        raise ConfigError(
            problem(
                f"backend {backend!r}", expected="it to be usable", got=reason, fix="Use 'auto'."
            )
        )
    return backend, BACKENDS[backend]
