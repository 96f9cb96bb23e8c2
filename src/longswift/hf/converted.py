"""An attention layer whose attention is a memory and whose projections are the model's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from longswift.core.errors import UnsupportedError, problem
from longswift.hf.attention import refuse_unsupported
from longswift.hf.families import Family
from longswift.hf.masks import KeyMask
from longswift.hf.memory_cache import memory_layer
from longswift.memory.base import MemoryConfig, Tokens
from longswift.memory.state import State


class ConvertedAttention(nn.Module):
    """Takes the place of an attention layer; its projections keep their names.

    Attributes:
        memory: The new parameters.
        config: The model's configuration.
        layer_idx: Index of the layer.
    """

    new_parameters = ("memory",)

    def __init__(self, layer: nn.Module, family: Family, memory: MemoryConfig) -> None:
        super().__init__()
        for name, child in layer.named_children():
            self.add_module(name, child)
        config: Any = layer.config
        shape = family.shape(layer)
        self.config, self.family = config, family
        self.layer_idx: int = layer.layer_idx  # type: ignore[assignment]
        self.head_dim, self.scaling = shape.head_dim, float(layer.scaling)  # type: ignore[arg-type]
        self.is_causal = True
        self.use_rope = family.rotates(layer)
        device = next(layer.parameters()).device
        with torch.device(device):
            self.memory = memory.build(shape)
        self.train(layer.training)

    @torch.compiler.disable
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        layer_past: Cache | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """The signature of every family's layer; returns the output and no attention weights."""
        dropout = float(self.config.attention_dropout or 0.0) if self.training else 0.0
        # Since Transformers 5.24 the cache of a model goes by the name that continuous batching
        # gives to its own kind of cache.
        if cache is not None and not isinstance(cache, Cache):
            kwargs["cache"] = cache
        refuse_unsupported(self, dropout, kwargs)
        real, total = self._mask(attention_mask, hidden_states)
        q, k, v = self.family.project(self, hidden_states)
        cos = sin = None
        if self.use_rope and position_embeddings is not None:
            cos, sin = (x.expand(q.shape[0], -1, -1) for x in position_embeddings)
        tokens = Tokens(hidden_states, q, k, v, cos, sin)
        batch, new = hidden_states.shape[:2]

        def call(state: State | None, count: int) -> tuple[Tensor, State]:
            read = tokens if count == new else tokens.take(list(range(batch)), slice(0, count))
            mask = None if real is None else real[:, :count]
            out, state = self.memory(
                read, project=self._project, key_mask=mask, state=state, scale=self.scaling
            )
            return out, state

        given = (kept for kept in (cache, past_key_values, layer_past) if kept is not None)
        past = next(given, None)
        if past is None:
            out, _ = call(None, new)
        else:
            layer = memory_layer(past, self.layer_idx)
            out = layer.run(call, new, total, replays=self.training)
        out = out.transpose(1, 2).flatten(2)
        return getattr(self, self.family.output)(out), None

    def _project(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return self.family.keys_and_values(self, hidden)

    def _mask(self, mask: Tensor | None, hidden: Tensor) -> tuple[Tensor | None, int | None]:
        """Real tokens among the new ones, and positions up to the last of them if known."""
        if not isinstance(mask, KeyMask) or not hasattr(mask, "rule") or not mask.rule.causal:
            raise UnsupportedError(
                problem(
                    type(self).__name__,
                    expected="a causal mask of this library",
                    got=type(mask).__name__ if not isinstance(mask, KeyMask) else "another one",
                    fix="Pass a two-dimensional attention_mask, and keep the model's attention "
                    "implementation one of longswift_<name>.",
                )
            )
        if mask.rule.sequences is not None:
            raise UnsupportedError(
                problem(
                    type(self).__name__,
                    expected="one sequence per row, which a memory reads from its beginning",
                    got="packed sequences (position_ids that restart)",
                    fix="Pass an attention_mask with one sequence per row.",
                )
            )
        # The mask of a sliding layer may start later than the text.
        total = mask.length if mask.rule.window is None else None
        real = mask.key_mask()
        if real is not None:
            real = real[:, -hidden.shape[1] :].expand(hidden.shape[0], -1)
        return real, total
