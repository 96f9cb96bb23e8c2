"""With the whole budget, every architecture answers as it does with SDPA."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longswift.hf import SwiftCache, set_attention
from tests.hf.models import DECODERS, ENCODERS, batch, build, gemma3_encoder, with_attention

IMPLEMENTATIONS = ["longswift_full", "ms_swift"]


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", DECODERS + ENCODERS)
@torch.no_grad()
def test_forward(name: str, implementation: str, padding: str) -> None:
    inputs = batch(padding=padding)
    expected = with_attention(name, "sdpa")(**inputs).logits
    got = with_attention(name, implementation)(**inputs).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[real], expected[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@torch.no_grad()
def test_image_encoder(implementation: str) -> None:
    pixels = torch.randn(2, 3, 32, 32)
    expected = with_attention("vit", "sdpa")(pixels).last_hidden_state
    got = with_attention("vit", implementation)(pixels).last_hidden_state
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@torch.no_grad()
def test_a_decoder_that_sees_both_ways(implementation: str, padding: str) -> None:
    model, inputs = gemma3_encoder(), batch(24, padding)
    expected = model(**inputs).last_hidden_state
    model.set_attn_implementation(implementation)
    real = inputs["attention_mask"].bool()
    found = model(**inputs).last_hidden_state
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@torch.no_grad()
def test_encoder_decoder_cross_attention(padding: str) -> None:
    inputs = batch(padding=padding)
    decoder = {"decoder_input_ids": torch.randint(3, 97, (3, 24))}
    expected = with_attention("bart", "sdpa")(**inputs, **decoder).logits
    got = with_attention("bart", "ms_swift")(**inputs, **decoder).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_bfloat16_model() -> None:
    model = build("llama").to(torch.bfloat16)
    inputs = batch()
    real = inputs["attention_mask"].bool()
    expected = model(**inputs).logits[real].float()
    model.set_attn_implementation("ms_swift")
    got = model(**inputs).logits[real].float()
    assert (got - expected).norm() / expected.norm() < 2e-2


@torch.no_grad()
def test_mixed_layers_keep_their_windows() -> None:
    """A sliding layer sees its own window whatever mechanism the full layers run."""
    inputs = batch(64, "none")
    model = build("mistral")
    expected = model(**inputs).logits
    set_attention(model, "ms_swift")
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    changed = inputs["input_ids"].clone()
    changed[:, 0] = 5
    moved = model(input_ids=changed).logits - model(input_ids=inputs["input_ids"]).logits
    # Two layers of window 7 reach 12 tokens back and no further.
    assert moved[:, 13:].abs().max() == 0
    assert moved[:, 12].abs().max() > 0


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_a_chunked_prompt_is_the_prompt(name: str) -> None:
    model = with_attention(name, "ms_swift")
    ids = batch(24, "none")["input_ids"]
    expected = model(ids).logits
    cache, parts = SwiftCache(model.config), []
    for part in ids.split([5, 1, 9, 9], dim=1):
        parts.append(model(part, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_chunked_prompt_with_padding() -> None:
    inputs = batch(24, "left")
    model = with_attention("gemma3", "ms_swift")
    expected = model(**inputs).logits
    cache, parts, end = SwiftCache(model.config), [], 0
    position_ids = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    for part in inputs["input_ids"].split([11, 13], dim=1):
        start, end = end, end + part.shape[1]
        out = model(
            part,
            attention_mask=inputs["attention_mask"][:, :end],
            position_ids=position_ids[:, start:end],
            past_key_values=cache,
        )
        parts.append(out.logits)
    expected = model(**inputs, position_ids=position_ids).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(torch.cat(parts, 1)[real], expected[real], rtol=1e-4, atol=1e-4)


def _grads(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    model(**inputs, labels=labels, use_cache=False).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [None, "reentrant", "not reentrant"])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_training_gradients(implementation: str, padding: str, checkpointing: str | None) -> None:
    model, inputs = build("qwen3").train(), batch(40, padding)
    expected = _grads(model, inputs)
    model.set_attn_implementation(implementation)
    if checkpointing:
        name = "activation_checkpointing_enable"
        enable = getattr(model, name, None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": checkpointing == "reentrant"})
        model.enable_input_require_grads()
    got = _grads(model, inputs)
    assert got.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", ["llama", "smollm3"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_mixed_precision(implementation: str, name: str) -> None:
    """Under autocast rotated queries and keys are fp32 and values bf16."""
    model, inputs = build(name).train(), batch(40, "left")
    with torch.autocast("cpu", torch.bfloat16):
        expected = _grads(model, inputs)
        model.set_attn_implementation(implementation)
        got = _grads(model, inputs)
    for key, grad in expected.items():
        bound = 0.05 * float(grad.abs().max()) + 1e-4
        torch.testing.assert_close(got[key], grad, rtol=0.05, atol=bound, msg=key)


def test_switching_at_run_time_and_back() -> None:
    model, inputs = build("llama"), batch(40)
    with torch.no_grad():
        first = model(**inputs).logits
        for name in ("longswift_sliding_window", "ms-swift", "longswift_full", "sdpa"):
            model.set_attn_implementation(name)
            assert model.config._attn_implementation == name
            last = model(**inputs).logits
    assert torch.equal(last, first)
