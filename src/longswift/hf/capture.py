"""What a model's layers hand to attention, seen from outside while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import AttentionInterface

from longswift.core.errors import UnsupportedError, problem
from longswift.core.mechanism import Mechanism
from longswift.hf.settings import implementation_names, resolve, text_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Captured:
    """One call of one layer; the tensors are the model's own and must not be changed.

    Attributes:
        layer: Index of the layer.
        mechanism: What attends.
        q: ``[B, Hq, Lq, D]``, rotated where the model rotates.
        k: ``[B, Hkv, Lk, D]``, those of the cache included.
        scale: Factor on the scores, or None for ``D ** -0.5``.
    """

    layer: int
    mechanism: Mechanism
    q: Tensor
    k: Tensor
    scale: float | None


@contextmanager
def capture(model: PreTrainedModel, receive: Callable[[Captured], None]) -> Iterator[None]:
    """Call ``receive`` for every layer whose attention a mechanism of this library has replaced.

    Layers with a window of their own keep their attention and are left out.

    Raises:
        UnsupportedError: The model runs another attention.
    """
    name = str(text_config(model)._attn_implementation)
    mechanism = implementation_names().get(name)
    if mechanism is None:
        raise UnsupportedError(
            problem(
                type(model).__name__,
                expected="an attention of this library",
                got=repr(name),
                fix="Call longswift.hf.set_attention(model, mechanism) first.",
            )
        )
    registered = AttentionInterface()
    original = registered[name]
    mine = set(model.modules())

    def attention(module: nn.Module, query: Tensor, key: Tensor, *rest: Any, **kwargs: Any) -> Any:
        if module in mine and kwargs.get("sliding_window") is None:
            receive(
                Captured(
                    layer=int(getattr(module, "layer_idx", 0)),
                    mechanism=resolve(module, mechanism),
                    q=query,
                    k=key,
                    scale=kwargs.get("scaling"),
                )
            )
        return original(module, query, key, *rest, **kwargs)

    AttentionInterface.register(name, attention)
    try:
        yield
    finally:
        AttentionInterface.register(name, original)
