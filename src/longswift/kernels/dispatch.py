"""Which backend computes a pattern; an explicit name never falls back."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from longswift.core import compiled
from longswift.core.bias import ScoreBias
from longswift.core.errors import ConfigError, UnsupportedError, problem
from longswift.core.inputs import carry_tangents
from longswift.kernels import eager, flex, native, reference, triton
from longswift.kernels.checks import CHECKS

# Channels that the compiled kernels take are multiples of this.
VECTOR = native.VECTOR

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
        kernel: The function that will be called: ``"attend"`` for a pattern, ``"attend_linear"``,
            ``"attend_exponential"`` or ``"attend_landmarks"``.
        bias: Additions to the scores, which only some backends know.

    Raises:
        ConfigError: Unknown backend, or an explicit one that cannot run on ``device``.
        UnsupportedError: An explicit backend without this family of kernel, or inputs of softmax
            attention that carry tangents.
    """
    if kernel == "attend" and backend != "reference":
        _refuse_tangents(*inputs)
    if backend == "auto":
        name = _automatic(device, inputs, bias, kernel)
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


def chooser(module: ModuleType, device: torch.device) -> Callable[..., bool] | None:
    """The kernel of a backend that chooses key tokens, if there is one and it is right there."""
    found: Callable[..., bool] | None = getattr(module, "choose_by_bounds", None)
    # On a CPU its tests have run; what a GPU's compiler makes of it is known there alone.
    if found is None or device.type == "cpu":
        return found
    name = next(name for name, one in BACKENDS.items() if one is module)
    return found if trusted(name, device, "choose_by_bounds") else None


def attend_whole(
    backend: str, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None
) -> tuple[str, Tensor, Tensor] | None:
    """Full attention of unchecked inputs by a backend that checks them as it reads them.

    Args:
        backend: ``"auto"`` or a name.
        q: ``[B, Hq, Lq, D]``, for all that is known, as are k and v.
        k: ``[B, Hkv, Lk, D]``.
        v: ``[B, Hkv, Lk, Dv]``.
        causal: Whether keys after a query are hidden.
        scale: Factor on the scores, ``D ** -0.5`` when None.

    Returns:
        Name of the backend, output and log-sum-exp; None if there is no such backend, or anything
        is wrong.
    """
    if backend not in ("auto", "native") or not (q.is_cpu and k.is_cpu and v.is_cpu):
        return None
    if not _native_on_cpu():
        return None
    part = native.attend_whole(q, k, v, causal, scale)
    return None if part is None else ("native", *part)


def takes_vectors(x: Tensor) -> bool:
    """Whether ``"auto"`` would be the compiled kernels, were the channels of ``x`` a multiple."""
    return x.is_cpu and x.dtype in native.DTYPES and _native_on_cpu()


@functools.cache
def _native_on_cpu() -> bool:
    # Asked for by every short call: a device costs more to look up than nothing at all.
    return compiled.operators() is not None and trusted("native", torch.device("cpu"), "attend")


def _refuse_tangents(*inputs: Tensor) -> None:
    """Kernels that write into buffers would drop the tangents without a word."""
    if carry_tangents(*inputs):
        raise UnsupportedError(
            problem(
                "q, k, v",
                expected="no forward-mode tangents (torch.func.jvp, torch.autograd.forward_ad)",
                got="inputs that carry some",
                fix="Differentiate backwards, or use backend='reference'.",
            )
        )


def _automatic(
    device: torch.device, inputs: tuple[Tensor, ...], bias: ScoreBias | None, kernel: str
) -> str:
    """The first preferred backend that is right there and takes these inputs, or eager."""
    preferred = _PREFERRED.get(device.type, ()) if inputs else ()
    for name in preferred:
        refused = BACKENDS[name].refusal(*inputs, bias, kernel)
        asked = kernel if bias is None else f"{kernel} with a bias"
        if refused is None and trusted(name, device, asked):
            return name
    return "eager"


@functools.cache
def trusted(name: str, device: torch.device, asked: str = "attend") -> bool:
    """Whether a backend does one of ``CHECKS`` right on ``device``; warns once if it does not."""
    usable, reason = BACKENDS[name].verify(device)
    if usable:
        reason = disagreement(BACKENDS[name], device, asked)
    if not usable or reason:
        what = f"backend {name!r} is not used on {device} for {asked}"
        warnings.warn(f"{what}: {reason}", stacklevel=2)
        return False
    return True


def disagreement(module: ModuleType, device: torch.device, asked: str = "attend") -> str:
    """How a backend differs from the reference on the small problem of ``CHECKS``, or nothing.

    It is solved in a thread of its own, where nothing of the caller's is under way: autocast,
    inference mode, hooks of gradient checkpointing, which would count the tensors that are saved,
    transforms and default devices.
    """
    on_gpu = device.type == "cuda" and torch.cuda.is_available()
    # A new thread starts at the first GPU; a number below 0 names none.
    here = torch.cuda.current_device() if on_gpu else -1
    answer: list[str] = []

    def ask() -> None:
        with torch.cuda.device(here):
            answer.append(_difference(module, device, asked))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join()
    return answer[0]


def _difference(module: ModuleType, device: torch.device, asked: str) -> str:
    try:
        found, expected = [CHECKS[asked](x, device) for x in (module, reference)]
    except Exception as error:  # whatever a compiler raises: the point is to learn of it
        return f"{type(error).__name__}: {error}"
    for name, right in expected.items():
        if not torch.allclose(found[name], right, rtol=1e-3, atol=1e-3):
            worst = float((found[name] - right).abs().max())
            return f"its {name} differs from the reference by {worst:.1e}"
    return ""
