"""What no mechanism computes is refused with a reason, never ignored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import masking_utils as hf

from longswift import UnsupportedError
from longswift.core.errors import LongSwiftError
from longswift.hf import set_attention
from longswift.hf.attention import make_attention
from longswift.hf.masks import KeyMask, Rule, read_rule, swift_mask
from tests.hf.models import batch, build, recent, with_attention


@pytest.mark.parametrize(
    ("name", "reason"), [("gemma2", "soft-capped"), ("gpt_oss", "attention sinks")]
)
def test_scores_that_are_not_plain(name: str, reason: str) -> None:
    model = build(name)
    model.set_attn_implementation("ms_swift")
    with pytest.raises(UnsupportedError, match=reason):
        model(**batch())


def test_dropout_only_matters_in_training() -> None:
    model = build("llama")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    model.set_attn_implementation("ms_swift")
    model(**batch())
    with pytest.raises(UnsupportedError, match=r"dropout 0\.1"):
        model.train()(**batch())


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_attention_weights(name: str) -> None:
    model = with_attention(name, "ms_swift")
    with pytest.raises((UnsupportedError, ValueError), match="attention"):
        model(**batch(), output_attentions=True)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_arbitrary_four_dimensional_masks(dtype: torch.dtype) -> None:
    inputs = batch(16, "none")
    mask = torch.ones(3, 1, 16, 16, dtype=torch.bool).tril()
    if dtype != torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(dtype).min)
    with pytest.raises(UnsupportedError, match="two-dimensional"):
        with_attention("llama", "ms_swift")(inputs["input_ids"], attention_mask=mask)


@pytest.mark.parametrize("name", ["Mamba", "FNet", "RegNet"])
def test_models_without_attention(name: str) -> None:
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32}
    if name == "RegNet":
        sizes = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "groups_width": 8}
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**sizes))
    with pytest.raises(UnsupportedError, match="one without attention"):
        set_attention(model, "ms_swift")


@torch.no_grad()
def test_chunked_attention_is_honoured_in_one_chunk_and_refused_beyond() -> None:
    model = build("llama4")
    inputs = batch(8, "none")
    expected = model(**inputs).logits
    model.set_attn_implementation("ms_swift")
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UnsupportedError, match="chunked"):
        model(**batch(9, "none"))


@recent
@torch.no_grad()
def test_prefix_masks_are_refused_and_empty_overlays_are_not() -> None:
    model = build("llama")
    model.set_attn_implementation("ms_swift")
    config, x = model.config, torch.zeros(2, 6, 32)

    def mask(**more: Any) -> Any:
        return hf.create_causal_mask(config, x, None, None, **more)

    assert isinstance(mask(), KeyMask)
    with pytest.raises(UnsupportedError, match="later tokens"):
        mask(or_mask_function=lambda b, h, q, k: k < 3)
    with pytest.raises(UnsupportedError, match="expected causal"):
        mask(and_mask_function=lambda b, h, q, k: k < 3)
    ids = torch.full((2, 6), -1)
    assert mask(block_sequence_ids=ids).rule == Rule(causal=True)
    ids[1, 2:4] = 0
    with pytest.raises(UnsupportedError, match="later tokens"):
        mask(block_sequence_ids=ids)


def test_rules_of_transformers_own_masks() -> None:
    assert read_rule(hf.causal_mask_function, 9) == Rule(causal=True)
    assert read_rule(hf.bidirectional_mask_function, 9) == Rule(causal=False)
    sliding = hf.sliding_window_causal_mask_function(5)
    assert read_rule(sliding, 9) == Rule(causal=True, window=4)
    both = hf.sliding_window_bidirectional_mask_function(5)
    assert read_rule(both, 9) == Rule(causal=False, window=5)
    with pytest.raises(UnsupportedError):
        read_rule(hf.sliding_window_overlay(5), 9)


def test_the_mask_is_never_quadratic_and_keeps_its_rule() -> None:
    mask = swift_mask(2, 1000, 100_000, q_offset=99_000)
    assert mask.shape == (2, 1, 1, 100_000) and mask.untyped_storage().nbytes() == 1
    assert mask.key_mask() is None and mask.starts() == (0, 0)
    real = torch.ones(2, 10, dtype=torch.long)
    real[1, :4] = 0
    mask = swift_mask(2, 10, 10, attention_mask=real)
    for same in (mask.clone(), mask.detach(), mask.to("cpu", copy=True)):
        assert isinstance(same, KeyMask)
        assert same.rule == mask.rule and same.starts() == (0, 4)
    assert type(mask[:, :, :, :5]) is torch.Tensor


class _Layer(nn.Module):
    """A bare attention layer, as a model's code would pass it."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.config = build("llama").config
        self.is_causal = True
        for name, value in attributes.items():
            setattr(self, name, value)


@pytest.mark.parametrize(
    "extra",
    ["softcap", "s_aux", "sinks", "position_bias", "cu_seq_lens_q", "block_table", "head_mask"],
)
def test_every_argument_that_changes_scores(extra: str) -> None:
    q = torch.randn(1, 2, 4, 8)
    attention = make_attention("full")
    attention(_Layer(), q, q, q, None, **{extra: None})
    with pytest.raises(UnsupportedError, match="_Layer"):
        attention(_Layer(), q, q, q, None, **{extra: torch.ones(2)})


def test_a_layers_own_window_is_honoured_without_a_mask() -> None:
    q = torch.randn(1, 2, 12, 8)
    attention = make_attention("full")
    pos = torch.arange(12)
    gap = pos[:, None] - pos
    for causal, window in ((True, 4), (False, 4), (True, 1), (False, 1)):
        layer = _Layer(is_causal=causal)
        seen = (gap.abs() < window) & ((gap >= 0) | (not causal))
        got, _ = attention(layer, q, q, q, None, sliding_window=window)
        expected = nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=seen)
        torch.testing.assert_close(got.transpose(1, 2), expected, rtol=1e-4, atol=1e-5)
    mask = swift_mask(1, 12, 12, mask_function=hf.sliding_window_causal_mask_function(6))
    with pytest.raises(UnsupportedError, match="one sliding window"):
        attention(_Layer(), q, q, q, mask, sliding_window=4)


def test_masks_made_for_other_keys() -> None:
    q = torch.randn(2, 2, 4, 8)
    attention = make_attention("full")
    with pytest.raises(UnsupportedError, match="6 keys"):
        attention(_Layer(), q, q, q, swift_mask(2, 4, 6))
    with pytest.raises(LongSwiftError):
        attention(_Layer(), q, q, q, torch.ones(2, 5, dtype=torch.bool))


def test_additive_masks_with_one_row_are_read_by_encoders() -> None:
    q = torch.randn(2, 2, 6, 8)
    hidden = torch.zeros(2, 1, 1, 6)
    hidden[1, ..., 4:] = torch.finfo(torch.float32).min
    layer = _Layer(is_causal=False)
    got, _ = make_attention("full")(layer, q, q, q, hidden)
    expected = nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=hidden)
    torch.testing.assert_close(got[0], expected[0].transpose(0, 1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[1, :4], expected[1].transpose(0, 1)[:4], rtol=1e-4, atol=1e-5)
    with pytest.raises(UnsupportedError):
        make_attention("full")(layer, q, q, q, hidden + 0.5)
    with pytest.raises(UnsupportedError):
        make_attention("full")(_Layer(), q, q, q, hidden)
