"""``LongSwiftLM``: every attention in every layer, trained, saved, loaded and generated from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from longswift import ConfigError, Full, SlidingWindow, get_mechanism
from longswift.hf import LongSwiftConfig, LongSwiftLM, attention_of, memory_parameters
from longswift.memory.compressive import Infini
from tests.hf.models import SPARSE, batch
from tests.hf.own_model import MIXED, SIZES, build, check_teacher_forcing, train


@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize(
    "attention", [MIXED, Infini(segment=6), SPARSE, {"name": "full"}], ids=repr
)
@torch.no_grad()
def test_generating_is_teacher_forcing(attention: Any, rope: bool) -> None:
    check_teacher_forcing(build(attention, rope=rope), batch(20, "left"), with_positions=True)


@torch.no_grad()
def test_positions_come_from_rope_alone() -> None:
    """Full attention without positions sees the prompt as a set."""
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    for rope, moves in ((True, True), (False, False)):
        model = build("full", rope=rope, num_hidden_layers=1)
        last = [model(x).logits[0, -1] for x in (ids, ids[:, [1, 0, 3, 2, 4]])]
        assert torch.allclose(*last, atol=1e-5) != moves


def test_saved_and_loaded_by_the_auto_classes(tmp_path: Path) -> None:
    model, inputs = build(), batch(24)
    model.save_pretrained(tmp_path)
    assert [file.suffix for file in tmp_path.glob("model*")] == [".safetensors"]
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, LongSwiftConfig) and config.longswift == model.config.longswift
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(again, LongSwiftLM)
    assert attention_of(again) == attention_of(model) == SlidingWindow(window=6)
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)
    fresh = AutoModelForCausalLM.from_config(config)
    assert [p.count_nonzero().item() for p in memory_parameters(fresh)] == [0] * 4


def test_trainer(tmp_path: Path) -> None:
    assert train(build(), tmp_path) > 0


def test_shape_and_tying() -> None:
    model = build(num_key_value_heads=1)
    assert model.model.layers[1].self_attn.k_proj.weight.shape == (8, 32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    untied = build(tie_word_embeddings=False)
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
    assert LongSwiftConfig().longswift == {
        "attention": Full().to_dict(), "layers": {}, "memory": {}
    }  # fmt: skip


@pytest.mark.parametrize("name", ["full", "sliding_window", "sliding-window", "ms_swift"])
def test_any_mechanism_by_name_or_dictionary(name: str) -> None:
    for given in (name, get_mechanism(name), get_mechanism(name).to_dict()):
        assert attention_of(build(given)) == get_mechanism(name)


def test_impossible_configurations() -> None:
    with pytest.raises(ConfigError, match="or 4 of them"):
        LongSwiftConfig(attention=["full"] * 3, **SIZES)
    for given in ("nothing", {"name": "nothing"}, 3):
        with pytest.raises(ConfigError, match="one of full"):
            LongSwiftConfig(attention=[given] * 4, **SIZES)
