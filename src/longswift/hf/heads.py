"""``group_heads``: fewer key and value heads, by averaging those of a group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from longswift.core.errors import ConfigError, UnsupportedError, problem
from longswift.hf.families import attention_layers
from longswift.hf.settings import text_config


@torch.no_grad()
def group_heads(model: PreTrainedModel, kv_heads: int) -> None:
    """Turn multi-head (or grouped) attention into attention with ``kv_heads`` groups, in place.

    Each new key and value head is the mean of the old ones of its group, the best start for the
    further training that a checkpoint needs afterwards; where the heads of every group are equal,
    nothing changes. The cache shrinks by the same factor. Ainslie et al., 2023, arXiv 2305.13245.

    Args:
        model: A Llama, Mistral, Qwen3 or SmolLM3 model, before any ``convert`` or adapter.
        kv_heads: New number of key and value heads; divides the present one.

    Raises:
        ConfigError: ``kv_heads`` does not divide the present number.
        UnsupportedError: An architecture without grouped heads, or changed projections.
    """
    config: Any = text_config(model)
    layers = attention_layers(model)
    plain = all(
        family.fused is None
        and type(layer.get_submodule("k_proj")) is type(layer.get_submodule("v_proj")) is nn.Linear
        for _, layer, family in layers
    )
    if not plain or len(layers) != config.num_hidden_layers:
        raise UnsupportedError(
            problem(
                type(model).__name__,
                expected="layers with plain k_proj and v_proj",
                got="fused, wrapped or converted projections",
                fix="Group the heads first, then convert or add adapters; GPT-NeoX knows no "
                "groups.",
            )
        )
    present = int(config.num_key_value_heads)
    if type(kv_heads) is not int or kv_heads < 1 or present % kv_heads:
        raise ConfigError(
            problem(
                "kv_heads",
                expected=f"a divisor of the {present} key/value heads",
                got=repr(kv_heads),
                fix=f"For example {max(1, present // 2)}.",
            )
        )
    for _, layer, _ in layers:
        for name in ("k_proj", "v_proj"):
            projection: Any = layer.get_submodule(name)
            for part in ("weight", "bias"):
                old = getattr(projection, part)
                if old is not None:
                    new = nn.Parameter(_pooled(old, present, kv_heads), old.requires_grad)
                    setattr(projection, part, new)
            projection.out_features = projection.weight.shape[0]
        layer.num_key_value_groups = config.num_attention_heads // kv_heads
    config.num_key_value_heads = kv_heads


def _pooled(x: Tensor, old: int, new: int) -> Tensor:
    """Mean over neighbouring heads of ``[old * width, ...]``, rounded once."""
    heads = x.double().unflatten(0, (new, old // new, -1))
    return heads.mean(1).flatten(0, 1).to(x.dtype)
