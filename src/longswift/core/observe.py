"""Watching attention calls from outside: a model's layers return no statistics.

An observer belongs to the thread (and asynchronous task) that set it. Calls pay one look-up of a
context variable when nobody watches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from longswift.core.types import AttentionResult

if TYPE_CHECKING:
    from longswift.core.bias import PositionBias
    from longswift.core.mechanism import Mechanism


@dataclass(frozen=True, kw_only=True)
class Observed:
    """One finished call; tensors are the caller's own and must not be changed.

    Attributes:
        mechanism: What was called.
        q: ``[B, Hq, Lq, D]``.
        k: ``[B, Hkv, Lk, D]``.
        v: ``[B, Hkv, Lk, Dv]``.
        causal: Whether attention was causal.
        key_mask: bool ``[B, Lk]`` or None.
        scale: Factor on the scores.
        training: Whether the choice of keys had to leak nothing.
        result: What the call returned.
        layer: Index of the calling layer, where a model made the call.
        bias: What was added to the scores, or None.
    """

    mechanism: Mechanism
    q: Tensor
    k: Tensor
    v: Tensor
    causal: bool
    key_mask: Tensor | None
    scale: float
    training: bool
    result: AttentionResult
    layer: int | None
    bias: PositionBias | None = None


Observer = Callable[[Observed], None]

_OBSERVERS: ContextVar[tuple[Observer, ...]] = ContextVar("longswift_observers", default=())
_LAYER: ContextVar[int | None] = ContextVar("longswift_layer", default=None)


@contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Call ``observer`` after every attention call made inside, by this thread.

    What the observer itself attends is not observed. Observers nest; all of them are called.
    """
    token = _OBSERVERS.set((*_OBSERVERS.get(), observer))
    try:
        yield
    finally:
        _OBSERVERS.reset(token)


@contextmanager
def layer_scope(layer: int | None) -> Iterator[None]:
    """Name the layer whose calls are made inside."""
    token = _LAYER.set(layer)
    try:
        yield
    finally:
        _LAYER.reset(token)


def observed() -> bool:
    """Whether anybody watches this thread."""
    return bool(_OBSERVERS.get())


def tell(mechanism: Mechanism, **call: object) -> None:
    """Show a finished call to every observer."""
    observers = _OBSERVERS.get()
    token = _OBSERVERS.set(())
    try:
        seen = Observed(mechanism=mechanism, layer=_LAYER.get(), **call)  # type: ignore[arg-type]
        for observer in observers:
            observer(seen)
    finally:
        _OBSERVERS.reset(token)
