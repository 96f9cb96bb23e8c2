"""Linear, Efficient, Performer and Nystrom attention inside Transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longswift import Mechanism, get_mechanism
from longswift.hf import SwiftCache, set_attention
from tests.hf.models import batch, build

MECHANISMS = [
    get_mechanism("linear"),
    get_mechanism("linear", feature_map="relu"),
    get_mechanism("efficient"),
    get_mechanism("performer", features=32),
]
mechanism_of = pytest.mark.parametrize("mechanism", MECHANISMS, ids=str)


def llama(mechanism: Mechanism) -> Any:
    model = build("llama")
    set_attention(model, mechanism)
    return model


@mechanism_of
@pytest.mark.parametrize("cache", [None, SwiftCache], ids=["dynamic", "swift"])
@torch.no_grad()
def test_generation_is_teacher_forcing(mechanism: Mechanism, cache: Any) -> None:
    """Every generated token is the choice of one forward pass over the text with padding."""
    model, inputs = llama(mechanism), batch(24, "left")
    options = {} if cache is None else {"past_key_values": cache(model.config)}
    ids = model.generate(**inputs, **options, max_new_tokens=8, do_sample=False)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 8), value=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=positions).logits
    assert torch.equal(logits[:, 23:-1].argmax(-1), ids[:, 24:])


@mechanism_of
@torch.no_grad()
def test_a_padded_row_decodes_as_the_row_alone(mechanism: Mechanism) -> None:
    model, inputs = llama(mechanism), batch(24, "left")
    options = {"max_new_tokens": 8, "do_sample": False}
    together = model.generate(**inputs, **options)
    alone = model.generate(inputs["input_ids"][1:2, 5:], **options)
    assert torch.equal(together[1, 5:], alone[0])


@pytest.mark.parametrize("name", ["linear", "efficient", "performer"])
@torch.no_grad()
def test_registered_names_run_with_defaults(name: str) -> None:
    model = build("llama")
    expected = model(**batch(24, "left")).logits
    model.set_attn_implementation(f"longswift_{name}")
    found = model(**batch(24, "left")).logits
    assert found.isfinite().all()
    # Otherwise the name might run the model's own attention.
    assert (found - expected).abs().max() > 1e-2


@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_nystrom_encoder(padding: str) -> None:
    model, inputs = build("bert"), batch(24, padding)
    real = inputs["attention_mask"].bool()
    exact = model(**inputs).logits
    model.set_attn_implementation("longswift_nystrom")
    found = model(**inputs).logits
    assert found[real].isfinite().all()
    assert (found[real] - exact[real]).abs().max() > 1e-3
    # As many landmarks as tokens, and the inverse itself: BERT's own attention.
    set_attention(model, get_mechanism("nystrom", landmarks=64, iterations=None))
    torch.testing.assert_close(model(**inputs).logits[real], exact[real], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_nystrom_rows_do_not_mix() -> None:
    model, inputs = build("bert"), batch(24, "right")
    set_attention(model, get_mechanism("nystrom", landmarks=6))
    together = model(**inputs).logits[1, :19]
    alone = model(inputs["input_ids"][1:2, :19]).logits[0]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_nystrom_refuses_a_decoder() -> None:
    with pytest.raises(ValueError, match="nystrom"):
        llama(get_mechanism("nystrom"))(**batch(8, "none"))


@mechanism_of
def test_gradients_reach_every_weight(mechanism: Mechanism) -> None:
    model, inputs = llama(mechanism).train(), batch(24, "left")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    model(**inputs, labels=labels, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if "q_proj" in name or "k_proj" in name:
            assert parameter.grad.any(), name
