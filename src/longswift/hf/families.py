"""The attention layers whose modules can be replaced: where their projections are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from longswift.core.errors import UnsupportedError, problem
from longswift.memory.base import LayerShape


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one architecture's attention layer projects.

    Attributes:
        model: Name of the architecture, for messages.
        output: Attribute of the output projection.
        fused: Attribute of one projection for all of q, k and v, head by head; None where they are
            ``q_proj``, ``k_proj`` and ``v_proj``.
        always_slides: The window is the configuration's instead of the layer's own.
    """

    model: str
    output: str = "o_proj"
    fused: str | None = None
    always_slides: bool = False

    def shape(self, layer: nn.Module) -> LayerShape:
        """Sizes, from the configuration."""
        config: Any = layer.config
        heads = config.num_attention_heads
        kv_heads = heads if self.fused else config.num_key_value_heads
        width = getattr(layer, "head_dim", None) or config.hidden_size // heads
        return LayerShape(config.hidden_size, heads, kv_heads, int(width))

    def rotates(self, layer: nn.Module) -> bool:
        """Whether the layer applies rotary positions."""
        return bool(getattr(layer, "use_rope", True))

    def window(self, layer: nn.Module) -> int | None:
        """Keys the layer's own sliding window shows, None without one."""
        source = layer.config if self.always_slides else layer
        window = getattr(source, "sliding_window", None)
        return None if window is None else int(window)

    def project(self, layer: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v ``[B, heads, L, D]``, not rotated."""
        if self.fused:
            q, k, v = self._fused(layer, hidden)
            return q, k, v
        return self._heads(layer, "q", hidden), *self.keys_and_values(layer, hidden)

    def keys_and_values(self, layer: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """k and v alone."""
        if self.fused:
            return self._fused(layer, hidden)[1:]
        return self._heads(layer, "k", hidden), self._heads(layer, "v", hidden)

    def _heads(self, layer: nn.Module, name: str, hidden: Tensor) -> Tensor:
        x = getattr(layer, f"{name}_proj")(hidden)
        x = x.unflatten(-1, (-1, self.shape(layer).head_dim))
        norm = getattr(layer, f"{name}_norm", None)
        return (x if norm is None else norm(x)).transpose(1, 2)

    def _fused(self, layer: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert self.fused is not None
        x = getattr(layer, self.fused)(hidden)
        x = x.unflatten(-1, (-1, 3 * self.shape(layer).head_dim)).transpose(1, 2)
        q, k, v = x.chunk(3, dim=-1)
        return q, k, v


FAMILIES: dict[str, Family] = {
    "LlamaAttention": Family(model="Llama"),
    "MistralAttention": Family(model="Mistral", always_slides=True),
    "Qwen3Attention": Family(model="Qwen3"),
    "SmolLM3Attention": Family(model="SmolLM3"),
    "GPTNeoXAttention": Family(model="GPT-NeoX", output="dense", fused="query_key_value"),
}


def family_of(layer: nn.Module) -> Family | None:
    """The family of an attention layer of Transformers' own code, else None."""
    kind = type(layer)
    if not kind.__module__.startswith("transformers.models."):
        return None
    return FAMILIES.get(kind.__name__)


def attention_layers(model: nn.Module) -> list[tuple[str, nn.Module, Family]]:
    """Name, module and family of every attention layer that can be replaced, in order.

    Raises:
        UnsupportedError: There is none.
    """
    found = [
        (name, module, family)
        for name, module in model.named_modules()
        if (family := family_of(module)) is not None
    ]
    if not found:
        raise UnsupportedError(
            problem(
                type(model).__name__,
                expected=f"a decoder of {', '.join(f.model for f in FAMILIES.values())}",
                got="no attention layer of these architectures",
                fix="Use one of them, or longswift.hf.set_attention with a mechanism.",
            )
        )
    return found
