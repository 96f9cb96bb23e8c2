"""Fewer key and value heads: exact where they were equal, the mean where not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from longswift import ConfigError, UnsupportedError
from longswift.hf import convert, group_heads
from longswift.memory.compressive import Infini
from tests.hf.models import batch, build


def multi_head(**more: Any) -> Any:
    """A Llama with as many key and value heads as query heads."""
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, initializer_range=0.3, **more,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def equalise(model: Any, size: int, heads: int) -> None:
    """Make all heads of a group of ``size`` equal to its first one."""
    with torch.no_grad():
        for layer in model.model.layers:
            for name in ("k_proj", "v_proj"):
                for x in getattr(layer.self_attn, name).parameters():
                    split = x.view(heads // size, size, -1, *x.shape[1:])
                    split[:] = split[:, :1].clone()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@torch.no_grad()
def test_equal_heads_lose_nothing(kv_heads: int, bias: bool, tmp_path: Path) -> None:
    model, inputs = multi_head(attention_bias=bias), batch(20)
    equalise(model, 4 // kv_heads, 4)
    before = model(**inputs).logits
    group_heads(model, kv_heads)
    torch.testing.assert_close(model(**inputs).logits, before, rtol=1e-4, atol=1e-4)
    cache = model(**inputs).past_key_values
    assert cache.layers[0].keys.shape[1] == kv_heads
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(**inputs).logits, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "smollm3"])
@torch.no_grad()
def test_groups_can_be_merged_further(name: str) -> None:
    model, inputs = build(name), batch(20)
    equalise(model, 2, 2)
    before = model(**inputs).logits
    group_heads(model, 1)
    torch.testing.assert_close(model(**inputs).logits, before, rtol=1e-4, atol=1e-4)
    convert(model, Infini(segment=7))
    assert model(**inputs).logits.isfinite().all()


@torch.no_grad()
def test_a_group_is_the_mean_of_its_heads() -> None:
    model = multi_head()
    old = model.model.layers[1].self_attn.v_proj.weight.clone().view(4, 8, 32)
    group_heads(model, 2)
    new = model.model.layers[1].self_attn.v_proj.weight.view(2, 8, 32)
    torch.testing.assert_close(new[0], (old[0] + old[1]) / 2)
    torch.testing.assert_close(new[1], (old[2] + old[3]) / 2)


def test_what_cannot_be_grouped_is_refused() -> None:
    for heads in (3, 0, 8, True, 2.0):
        with pytest.raises(ConfigError, match="a divisor of the 4"):
            group_heads(multi_head(), heads)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="GPT-NeoX"):
        group_heads(build("gpt_neox"), 1)
    converted = build("llama")
    convert(converted, Infini(), layers=[0])
    with pytest.raises(UnsupportedError, match="Group the heads first"):
        group_heads(converted, 1)
    with pytest.raises(UnsupportedError, match="Llama, Mistral"):
        group_heads(build("gpt2"), 1)
