"""Which backend computes a pattern; an explicit name never falls back."""

from __future__ import annotations

import functools
import warnings
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from longswift.core.bias import ScoreBias
from longswift.core.errors import ConfigError, UnsupportedError, problem
from longswift.core.pattern import Band, BlockPattern
from longswift.kernels import eager, flex, native, reference, triton

# What "auto" tries before the eager kernel, best first.
_PREFERRED = {"cpu": ("native",), "cuda": ("triton", "flex")}

BACKENDS: dict[str, ModuleType] = {
    "eager": eager,
    "flex": flex,
    "native": native,
    "reference": reference,
    "triton": triton,
}


def available(device: torch.device | str | None = None) -> dict[str, tuple[bool, str]]:
    """Every backend with whether it is usable on ``device``, and why or why not.

    Without a device: on the GPU if there is one.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return {name: module.verify(torch.device(device)) for name, module in BACKENDS.items()}


def resolve(
    backend: str,
    device: torch.device,
    *inputs: Tensor,
    kernel: str = "attend",
    bias: ScoreBias | None = None,
) -> tuple[str, ModuleType]:
    """Name and module of the backend to use.

    Args:
        backend: ``"auto"`` or a name.
        device: Where the tensors are.
        inputs: q, k and v. Without them ``"auto"`` is the eager kernel, which computes anything.
        kernel: The function that will be called: ``"attend"`` for a pattern, ``"attend_linear"``
            or ``"attend_landmarks"``.
        bias: Additions to the scores, which only some backends know.

    Raises:
        ConfigError: Unknown backend, or an explicit one that cannot run on ``device``.
        UnsupportedError: An explicit backend without this family of kernel.
    """
    if backend == "auto":
        name = _automatic(device, inputs, bias)
        return name, BACKENDS[name]
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
    if not hasattr(BACKENDS[backend], kernel):
        able = [name for name, module in BACKENDS.items() if hasattr(module, kernel)]
        raise UnsupportedError(
            problem(
                f"backend {backend!r}",
                expected=f"one that has {kernel} ({', '.join(able)})",
                got="one that has not",
                fix="Use 'auto'.",
            )
        )
    return backend, BACKENDS[backend]


def _automatic(device: torch.device, inputs: tuple[Tensor, ...], bias: ScoreBias | None) -> str:
    """The first preferred backend that is right there and takes these inputs, or eager."""
    preferred = _PREFERRED.get(device.type, ()) if inputs else ()
    for name in preferred:
        if BACKENDS[name].refusal(*inputs, bias) is None and trusted(name, device):
            return name
    return "eager"


@functools.cache
def trusted(name: str, device: torch.device) -> bool:
    """Whether a backend is usable on ``device`` and right there; warns once if it is not."""
    usable, reason = BACKENDS[name].verify(device)
    if usable:
        reason = disagreement(BACKENDS[name], device)
    if not usable or reason:
        warnings.warn(f"backend {name!r} is not used on {device}: {reason}", stacklevel=2)
        return False
    return True


@torch.inference_mode(False)
@torch.enable_grad()
def disagreement(module: ModuleType, device: torch.device) -> str:
    """How a backend differs from the reference on a small problem, or nothing.

    Covers bands, gathered tokens row by row and for whole blocks, the remainder, grouped heads and
    every gradient.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    shapes = (1, 4, 70, 32), (1, 2, 90, 32), (1, 2, 90, 32)
    q, k, v = (torch.randn(shape, generator=generator, device="cpu") for shape in shapes)
    tokens = torch.tensor([[-1, -1, -1], [1, 6, -1], [2, 30, 8]], dtype=torch.int32, device=device)
    since = torch.tensor([[0, 0, 0], [40, 0, 0], [64, 70, 89]], dtype=torch.int32, device=device)
    pattern = BlockPattern(
        causal=True,
        bands=(Band(tile=32, left=0), Band(tile=32, left=16)),
        block=32,
        tokens=tokens.expand(1, 2, -1, -1),
        visible_from=since.expand(1, 2, -1, -1),
        pool=32,
        pool_grain=16,
    )
    results = []
    try:
        for backend in (module, reference):
            leaves = [x.to(device).requires_grad_() for x in (q, k, v)]
            out, lse = backend.attend(*leaves, pattern, 0.2)
            grads = torch.autograd.grad(out.square().sum() + lse.sum(), leaves)
            with torch.no_grad():
                shared = backend.attend(*leaves, replace(pattern, visible_from=None), 0.2)
            results.append([out.detach(), lse.detach(), *grads, *shared])
    except Exception as error:  # whatever a compiler raises: the point is to learn of it
        return f"{type(error).__name__}: {error}"
    names = ("output", "log-sum-exp", "dq", "dk", "dv", "shared output", "shared log-sum-exp")
    for name, got, expected in zip(names, *results, strict=True):
        if not torch.allclose(got, expected, rtol=1e-3, atol=1e-3):
            worst = float((got - expected).abs().max())
            return f"its {name} differs from the reference by {worst:.1e}"
    return ""
