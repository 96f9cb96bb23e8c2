"""Families beyond plain decoders: multimodal, hybrid, encoder-decoder, relative positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from longswift import MSSwift, UnsupportedError
from longswift.hf import SwiftCache, attention_of, extend, set_attention
from longswift.hf.cache import SwiftLayer
from tests.hf.models import batch, build, recent, with_attention

_TEXT = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
)


def _inputs() -> dict[str, torch.Tensor]:
    inputs = batch(20, "left")
    inputs["input_ids"] = inputs["input_ids"].clamp(max=89)
    return inputs


def _gemma3_with_images() -> Any:
    text = dict(
        **_TEXT,
        head_dim=8,
        sliding_window=7,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"],
    )
    vision = dict(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        vision_use_head=False,
    )
    config = hf.Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=96,
        boi_token_index=94,
        eoi_token_index=95,
    )
    return hf.Gemma3ForConditionalGeneration(config).eval()


@recent
@torch.no_grad()
def test_a_multimodal_model_reads_text_and_refuses_images() -> None:
    model, inputs = _gemma3_with_images(), _inputs()
    kinds = torch.zeros_like(inputs["input_ids"])
    expected = model(**inputs).logits
    set_attention(model, "ms_swift")
    assert model.config.text_config._attn_implementation == "ms_swift"
    assert model.config.vision_config._attn_implementation != "ms_swift"
    assert attention_of(model) == MSSwift()
    real = inputs["attention_mask"].bool()
    for extra in ({}, {"token_type_ids": kinds}):
        got = model(**inputs, **extra).logits
        torch.testing.assert_close(got[real], expected[real], rtol=1e-4, atol=1e-4)
    inputs["input_ids"][:, 5:9] = 96
    kinds[:, 5:9] = 1
    with pytest.raises(UnsupportedError, match="later tokens"):
        model(**inputs, token_type_ids=kinds, pixel_values=torch.randn(3, 3, 28, 28))


@torch.no_grad()
def test_positions_of_three_axes() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    config = hf.Qwen2VLConfig(
        text_config={**_TEXT, "rope_parameters": rope},
        vision_config=dict(depth=1, embed_dim=16, hidden_size=32, num_heads=2, patch_size=4),
    )
    model, inputs = hf.Qwen2VLForConditionalGeneration(config).eval(), _inputs()
    real = inputs["attention_mask"].bool()
    expected = model(**inputs).logits[real]
    set_attention(model, "ms_swift")
    torch.testing.assert_close(model(**inputs).logits[real], expected, rtol=1e-4, atol=1e-4)
    with extend(model, 1024) as handle:
        assert handle.rope == "yarn"
        assert model.model.language_model.rotary_emb.attention_scaling > 1.0


@recent
def test_linear_layers_keep_their_own_cache() -> None:
    config = hf.Qwen3NextConfig(
        **_TEXT,
        head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        pad_token_id=0,
    )
    model, inputs = hf.Qwen3NextForCausalLM(config).eval(), batch(12, "left")
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**inputs, **options)
    model.set_attn_implementation("ms_swift")
    cache = SwiftCache(model.config)
    assert [isinstance(layer, SwiftLayer) for layer in cache.layers] == [False, True]
    assert torch.equal(model.generate(**inputs, past_key_values=cache, **options), expected)


@pytest.mark.parametrize("beams", [1, 3])
def test_encoder_decoder_generation(beams: int) -> None:
    inputs = batch(12, "right")
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams}
    expected = with_attention("bart", "sdpa").generate(**inputs, **options)
    model = with_attention("bart", "ms_swift")
    assert torch.equal(model.generate(**inputs, **options), expected)
    cache = hf.EncoderDecoderCache(SwiftCache(model.config), SwiftCache())
    assert torch.equal(model.generate(**inputs, past_key_values=cache, **options), expected)


@pytest.mark.parametrize("length", [7, 20])
@torch.no_grad()
def test_speech_with_as_many_tokens_as_frames(length: int) -> None:
    """Cross attention stays cross attention when both lengths happen to agree."""
    config = hf.WhisperConfig(
        vocab_size=97,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=30,
        init_std=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    model = hf.WhisperForConditionalGeneration(config).eval()
    inputs = {
        "input_features": torch.randn(2, 8, 40),
        "decoder_input_ids": torch.randint(3, 97, (2, length)),
    }
    expected = model(**inputs).logits
    set_attention(model, MSSwift(windows=(64,), key_tokens=0, remainder=None, dense_below=0))
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


def test_relative_position_biases_are_refused() -> None:
    config = hf.T5Config(
        vocab_size=97,
        d_model=32,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
    )
    model, ids = hf.T5ForConditionalGeneration(config).eval(), batch(9, "none")["input_ids"]
    with pytest.raises(UnsupportedError, match="position bias|AttentionInterface"):
        set_attention(model, "ms_swift")
        model(input_ids=ids, decoder_input_ids=ids)


@torch.no_grad()
def test_hooks_that_move_masks_keep_them_readable() -> None:
    """What device placement does to the arguments of a layer."""
    model, inputs = build("llama"), batch(12, "left")
    model.set_attn_implementation("ms_swift")
    expected = model(**inputs).logits

    def move(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {
            key: value.to("cpu", copy=True) if isinstance(value, torch.Tensor) else value
            for key, value in kwargs.items()
        }

    for layer in model.model.layers:
        layer.register_forward_pre_hook(move, with_kwargs=True)
    torch.testing.assert_close(model(**inputs).logits, expected)
