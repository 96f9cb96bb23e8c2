"""``generate`` with every search and cache writes what it writes with SDPA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from longswift.hf import SwiftCache
from tests.hf.models import DECODERS, batch, build, recent, with_attention

GREEDY = {"do_sample": False, "max_new_tokens": 10}
BEAMS = {"do_sample": False, "num_beams": 3, "max_new_tokens": 10}
SAMPLE = {"do_sample": True, "top_k": 20, "temperature": 0.8, "max_new_tokens": 10}


def _generate(name: str, implementation: str, inputs: dict[str, Any], **options: Any) -> Any:
    model = with_attention(name, implementation)
    torch.manual_seed(7)
    return model.generate(**inputs, **options)


@pytest.mark.parametrize("search", [GREEDY, BEAMS, SAMPLE], ids=["greedy", "beams", "sample"])
@pytest.mark.parametrize("name", DECODERS)
def test_same_tokens_as_sdpa(name: str, search: dict[str, Any]) -> None:
    inputs = batch(12, "left")
    expected = _generate(name, "sdpa", inputs, **search)
    assert torch.equal(_generate(name, "ms_swift", inputs, **search), expected)
    cache = SwiftCache(with_attention(name, "ms_swift").config)
    got = _generate(name, "ms_swift", inputs, past_key_values=cache, **search)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("options", [{"prefill_chunk_size": 5}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral", "smollm3"])
def test_prefill_in_chunks_and_static_caches(
    name: str, padding: str, options: dict[str, Any]
) -> None:
    inputs = batch(12, padding)
    expected = _generate(name, "sdpa", inputs, **GREEDY)
    assert torch.equal(_generate(name, "ms_swift", inputs, **GREEDY, **options), expected)


@recent
@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("cache", [None, SwiftCache])
def test_assisted_generation_crops_the_cache(name: str, cache: Any) -> None:
    inputs = {key: value[:1] for key, value in batch(12, "none").items()}
    expected = _generate(name, "sdpa", inputs, do_sample=False, max_new_tokens=24)
    assistant = build("llama")
    options: dict[str, Any] = {"assistant_model": assistant}
    if cache is not None:
        options["past_key_values"] = cache(
            assistant.config if name == "llama" else build(name).config
        )
    got = _generate(name, "ms_swift", inputs, do_sample=False, max_new_tokens=24, **options)
    assert torch.equal(got, expected)


@recent
def test_prompt_lookup() -> None:
    inputs = {key: value[:1].repeat(1, 3) for key, value in batch(12, "none").items()}
    expected = _generate("llama", "sdpa", inputs, **GREEDY)
    cache = SwiftCache(build("llama").config)
    got = _generate(
        "llama", "ms_swift", inputs, prompt_lookup_num_tokens=3, past_key_values=cache, **GREEDY
    )
    assert torch.equal(got, expected)


@pytest.mark.parametrize("make", [DynamicCache, SwiftCache])
def test_one_token_prompt(make: Any) -> None:
    inputs = {key: value[:, -1:] for key, value in batch(12, "none").items()}
    expected = _generate("qwen3", "sdpa", inputs, **GREEDY)
    cache = make(config=build("qwen3").config)
    got = _generate("qwen3", "ms_swift", inputs, past_key_values=cache, **GREEDY)
    assert torch.equal(got, expected)


@torch.no_grad()
def test_a_row_of_padding_only() -> None:
    inputs = batch(12, "left")
    inputs["attention_mask"][2] = 0
    out = with_attention("llama", "ms_swift")(**inputs).logits
    assert torch.isfinite(out).all()
    expected = with_attention("llama", "sdpa")(**inputs).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(out[real], expected[real], rtol=1e-4, atol=1e-4)


def test_continuing_a_conversation() -> None:
    """A second prompt behind a filled cache, with the padding of the first still in front."""
    model = with_attention("gemma3", "ms_swift")
    inputs = batch(12, "left")
    cache = SwiftCache(model.config)
    first = model.generate(**inputs, past_key_values=cache, **GREEDY)
    more = torch.cat([first, batch(6, "none", seed=3)["input_ids"]], 1)
    mask = torch.cat(
        [inputs["attention_mask"], torch.ones(3, more.shape[1] - 12, dtype=torch.long)], 1
    )
    got = model.generate(more, attention_mask=mask, past_key_values=cache, **GREEDY)
    fresh = model.generate(more, attention_mask=mask, **GREEDY)
    assert torch.equal(got, fresh)
