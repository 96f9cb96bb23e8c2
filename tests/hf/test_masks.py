"""Masks that know a rule: who may use them for what."""

from __future__ import annotations

import pytest
import torch
import transformers

from longswift.core.errors import UnsupportedError
from longswift.hf import extend, set_attention
from longswift.hf.masks import KeyMask, Rule
from longswift.mechanisms.full import Full


def _mask(*rows: list[int]) -> KeyMask:
    real = torch.tensor(rows, dtype=torch.bool)[:, None, None]
    return KeyMask.make(real, Rule(causal=True), real.shape[3], not bool(real.all()))


@pytest.mark.parametrize(
    "use",
    [
        lambda mask: torch.zeros(1, 1, 4, 4) + mask,
        lambda mask: mask + torch.zeros(1, 1, 4, 4),
        lambda mask: (1.0 - mask) * -1e9,
        lambda mask: torch.cat([mask, mask], -1),
        lambda mask: torch.zeros(1, 1, 4, 4).masked_fill(mask, -1e9),
        lambda mask: torch.where(mask, 0.0, -1e9),
    ],
)
def test_a_mask_is_no_number(use: object) -> None:
    with pytest.raises(UnsupportedError, match="attention code of the model's own"):
        use(_mask([1, 1, 1, 0]))  # type: ignore[operator]


def test_holes() -> None:
    assert not _mask([1, 1, 1, 1]).holed()
    assert not _mask([0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]).holed()
    assert _mask([1, 1, 1, 1], [1, 0, 1, 1]).holed()
    assert _mask([0, 1, 0, 1]).holed()


def test_a_window_over_padding_inside_a_row_is_refused() -> None:
    """Transformers' windows count slots, ours real tokens: they differ behind such padding."""
    model = transformers.MistralForCausalLM(
        transformers.MistralConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            sliding_window=4,
        )
    ).eval()
    set_attention(model, Full())
    ids, real = torch.arange(1, 11)[None], torch.ones(1, 10, dtype=torch.long)
    model(ids, attention_mask=real.index_fill(1, torch.tensor([8, 9]), 0))
    with pytest.raises(UnsupportedError, match="padding between them"):
        model(ids, attention_mask=real.index_fill(1, torch.tensor([3, 4]), 0))


@pytest.mark.parametrize("kind", ["Cohere2", "Exaone4", "Afmoe", "ExaoneMoe"])
def test_layers_that_rotate_but_slide_are_not_scaled(kind: str) -> None:
    config = getattr(transformers, f"{kind}Config", None)
    if config is None:
        pytest.skip(f"this Transformers has no {kind}")
    shape = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 32,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "num_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "num_dense_layers": 1,
        "first_k_dense_replace": 1,
        "sliding_window": 8,
        "max_position_embeddings": 64,
        "layer_types": ["sliding_attention", "full_attention"],
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model = transformers.AutoModelForCausalLM.from_config(config(**shape))
    extension = extend(model, 256, attention=None)
    assert extension.rope is None
    extension.revert()
