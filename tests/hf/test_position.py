"""``LongSwiftLM`` with position biases: trained, saved, loaded, generated from; refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    MptConfig,
    MptForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from longswift import ConfigError, Full, MSSwift, SlidingWindow, UnsupportedError
from longswift.hf import LongSwiftConfig, LongSwiftLM, SwiftCache, convert, set_attention
from longswift.memory.compressive import Infini
from tests.hf.models import SPARSE, VOCAB, batch
from tests.hf.own_model import SIZES, build, check_teacher_forcing, train

BIASED = ("alibi", "t5")
ATTENTIONS = ["full", SPARSE, [SlidingWindow(window=6), "full", SPARSE, {"name": "chunked"}]]


@pytest.mark.parametrize("padding", ["left", "right", "none"])
@pytest.mark.parametrize("attention", ATTENTIONS, ids=repr)
@pytest.mark.parametrize("position", BIASED)
@torch.no_grad()
def test_generating_is_teacher_forcing(position: str, attention: Any, padding: str) -> None:
    model = build(attention, position=position)
    inputs = batch(20, padding)
    if padding == "right":
        # Generation continues at the end: only the reading of padded rows is compared.
        whole = model(**inputs).logits
        for row, mask in enumerate(inputs["attention_mask"].bool()):
            alone = model(inputs["input_ids"][row : row + 1, mask]).logits
            torch.testing.assert_close(whole[row, mask], alone[0], rtol=1e-4, atol=1e-4)
        return
    check_teacher_forcing(model, inputs, with_positions=False)


@pytest.mark.parametrize("position", BIASED)
@torch.no_grad()
def test_reading_in_chunks(position: str) -> None:
    attention = MSSwift(
        windows=(8,), block=8, key_tokens=4, sinks=2, remainder=8, dense_below=0,
        selector={"name": "bounds", "key_block": 8, "row_group": 4},
    )  # fmt: skip
    model, ids = build(attention, position=position), torch.randint(3, VOCAB, (2, 40))
    cache, parts = SwiftCache(model.config), []
    for start in (0, 16):
        end = start + 16 if start == 0 else 40
        parts.append(model(ids[:, start:end], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("position", BIASED)
@torch.no_grad()
def test_positions_come_from_the_bias_alone(position: str) -> None:
    model = build("full", position=position, num_hidden_layers=1)
    assert model.config.no_rope_layers == [0]
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    last = [model(x).logits[0, -1] for x in (ids, ids[:, [1, 0, 3, 2, 4]])]
    assert not torch.allclose(*last, atol=1e-5)
    # Only distances count: position ids, which turn nothing, change nothing.
    moved = model(ids, position_ids=torch.arange(100, 105)[None]).logits[0, -1]
    torch.testing.assert_close(moved, last[0])


@pytest.mark.parametrize("position", BIASED)
def test_saved_and_loaded(position: str, tmp_path: Path) -> None:
    model, inputs = build(SPARSE, position=position), batch(24)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(again, LongSwiftLM) and again.config.position == position
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)
    tables = [n for n, _ in again.named_parameters() if "position_bias" in n]
    assert len(tables) == (4 if position == "t5" else 0)


@pytest.mark.parametrize("position", BIASED)
def test_trainer(position: str, tmp_path: Path) -> None:
    """Every table of every layer is trained, without decay."""
    train(build("full", position=position, relative_attention_num_buckets=8), tmp_path)


def test_t5_tables_are_as_asked() -> None:
    model = build("full", position="t5", relative_attention_num_buckets=10)
    table = model.model.layers[0].self_attn.position_bias.table
    assert table.shape == (10, 4) and bool(table.any())
    assert LongSwiftConfig(position="alibi").to_dict()["position"] == "alibi"
    assert LongSwiftConfig().position == "rope" and LongSwiftConfig(rope=False).position == "none"
    assert LongSwiftConfig(no_rope_layers=[0] * 4).position == "none"
    assert LongSwiftConfig(no_rope_layers=[0, 1, 0, 1]).position == "rope"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"position": "sinusoidal"}, "one of rope, none, alibi, t5"),
        ({"position": "alibi", "rope": True}, "position and rope to agree"),
        ({"position": "rope", "rope": False}, "position and rope to agree"),
        ({"position": "alibi", "no_rope_layers": [0, 1, 0, 0]}, "no rotated layer beside"),
        ({"position": "alibi", "attention": "linear"}, "got linear"),
        ({"position": "t5", "attention": ["full", "full", "full", "infini"]}, "got infini"),
    ],
)
def test_impossible_configurations(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        LongSwiftConfig(**{**SIZES, **options})


def test_changes_that_would_ignore_the_bias_are_refused() -> None:
    model, inputs = build("full", position="alibi"), batch(12)
    with pytest.raises(UnsupportedError, match="position bias"):
        convert(model, Infini(segment=8))
    set_attention(model, "linear")
    with pytest.raises(UnsupportedError, match="bias 'alibi'"):
        model(**inputs)


def test_bloom_and_mpt_compute_attention_themselves() -> None:
    bloom = BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=1, n_head=2))
    mpt = MptForCausalLM(MptConfig(vocab_size=VOCAB, d_model=16, n_layers=1, n_heads=2))
    for model in (bloom, mpt):
        with pytest.raises(UnsupportedError, match="attention code of its own"):
            set_attention(model, Full())


def test_the_dense_bias_of_t5_is_refused() -> None:
    config = T5Config(
        vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    model = T5ForConditionalGeneration(config).eval()
    ids = torch.randint(3, VOCAB, (1, 6))
    # Older versions compute T5's attention in its own code.
    with pytest.raises(UnsupportedError, match="position bias|attention code of its own"):
        set_attention(model, Full())
        model(input_ids=ids, decoder_input_ids=ids)
