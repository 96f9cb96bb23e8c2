"""With a budget smaller than the text: padding, batches, chunks and checkpoints change nothing."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from longswift.hf import SwiftCache, set_attention
from tests.hf.models import SPARSE, batch, build


@functools.cache
def sparse(name: str) -> Any:
    model = build(name)
    set_attention(model, SPARSE)
    return model


def _grads(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(0)
    model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()].square().mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", ["llama", "gemma3", "smollm3"])
@torch.no_grad()
def test_a_padded_row_is_the_row_alone(name: str) -> None:
    model, inputs = sparse(name), batch(220, "left")
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    together = model(**inputs, position_ids=positions).logits
    alone = model(inputs["input_ids"][1:2, 5:]).logits
    torch.testing.assert_close(together[1:2, 5:], alone, rtol=1e-3, atol=1e-4)
    model.config._attn_implementation = "sdpa"
    exact = model(**inputs, position_ids=positions).logits
    model.config._attn_implementation = "ms_swift"
    # Otherwise the test would show nothing.
    assert (together[1:2, 5:] - exact[1:2, 5:]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["llama", "smollm3"])
@torch.no_grad()
def test_decoding_padded_rows_is_decoding_them_alone(name: str) -> None:
    model, inputs = sparse(name), batch(220, "left")
    options = {"max_new_tokens": 12, "do_sample": False}
    together = model.generate(**inputs, past_key_values=SwiftCache(model.config), **options)
    cache = SwiftCache(model.config)
    alone = model.generate(inputs["input_ids"][1:2, 5:], past_key_values=cache, **options)
    assert torch.equal(together[1, 5:], alone[0])


@torch.no_grad()
def test_chunks_of_whole_blocks_are_one_prompt() -> None:
    model, ids = sparse("llama"), batch(224, "none")["input_ids"]
    expected = model(ids).logits
    cache, parts = SwiftCache(model.config), []
    for part in ids.split([96, 32, 64, 32], dim=1):
        parts.append(model(part, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_recompute_the_same_choice(reentrant: bool) -> None:
    model, inputs = build("llama").train(), batch(160, "left")
    set_attention(model, SPARSE)
    expected = _grads(model, *inputs.values())
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for got, grad in zip(_grads(model, *inputs.values()), expected, strict=True):
        torch.testing.assert_close(got, grad, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_training_mode_leaks_nothing_from_later_tokens() -> None:
    """A later token of the same block changes no earlier output, which it may in evaluation."""
    model = build("llama").train()
    set_attention(model, SPARSE)
    ids = batch(200, "none")["input_ids"][:1]
    changed = ids.clone()
    changed[0, 180] = (changed[0, 180] + 7) % 90 + 3
    before, after = model(ids).logits, model(changed).logits
    torch.testing.assert_close(after[:, :180], before[:, :180], rtol=1e-4, atol=1e-5)
