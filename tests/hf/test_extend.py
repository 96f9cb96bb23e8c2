"""``extend`` changes what it says, refuses what cannot work, and puts everything back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from longswift import Full, InputError, MSSwift, SlidingWindow, UnsupportedError
from longswift.core.errors import ConfigError
from longswift.extend.rope import RopeScaling
from longswift.hf import attention_of, check_length, extend
from longswift.hf.rotary import only_near_layers_rotate
from tests.hf.models import batch, build, recent

ROPED = ["llama", "qwen3", "gemma3", "gpt_neox", "smollm3"]


def _buffers(model: Any) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def _state(model: Any) -> tuple[Any, ...]:
    scalings = {
        name: {
            k: v for k, v in vars(module).items() if k.endswith(("attention_scaling", "rope_type"))
        }
        for name, module in model.named_modules()
    }
    return model.config.to_dict(), model.config._attn_implementation, copy.deepcopy(scalings)


@pytest.mark.parametrize("rope", ["yarn", "linear", "ntk", "dynamic", "llama3", "default", None])
@pytest.mark.parametrize("name", ROPED)
@torch.no_grad()
def test_reverting_restores_everything(name: str, rope: str | None) -> None:
    model, inputs = build(name), batch(24, "left")
    before, buffers, logits = _state(model), _buffers(model), model(**inputs).logits
    with extend(model, 1024, rope=rope, attention=MSSwift(dense_below=64)) as handle:
        assert handle.model is model
        check_length(model, 1024)
        with pytest.raises(InputError, match="at most 1024"):
            check_length(model, 1025)
        assert attention_of(model) == MSSwift(dense_below=64)
        model(**batch(300, "none"))
    assert _state(model) == before
    after = _buffers(model)
    assert buffers.keys() == after.keys()
    assert all(torch.equal(after[key], buffers[key]) for key in buffers)
    assert torch.equal(model(**inputs).logits, logits)
    handle.revert()
    assert _state(model) == before


@pytest.mark.parametrize("rope", ["yarn", "linear", "ntk", "llama3"])
@torch.no_grad()
def test_frequencies_are_those_of_the_formula(rope: str) -> None:
    model = build("llama")
    extend(model, 1024, rope=rope)
    scaling = RopeScaling(kind=rope, factor=4.0, original_length=256)  # type: ignore[arg-type]
    expected, factor = scaling.frequencies(8, 10_000.0)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, expected)
    assert model.model.rotary_emb.attention_scaling == pytest.approx(factor)
    assert model.config.max_position_embeddings == 1024


@pytest.mark.parametrize("rope", ["yarn", "linear", "ntk", "dynamic", "llama3"])
@pytest.mark.parametrize("name", ["llama", pytest.param("gemma3", marks=recent)])
@torch.no_grad()
def test_saved_and_loaded_again(name: str, rope: str, tmp_path: Path) -> None:
    model, inputs = build(name), batch(40, "left")
    extend(model, 1024, rope=rope, attention=SlidingWindow(window=11))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="longswift_sliding_window"
    ).eval()
    assert attention_of(again) == SlidingWindow(window=11)
    torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)
    check_length(again, 1024)
    with pytest.raises(InputError):
        check_length(again, 1025)


def test_sliding_layers_keep_their_frequencies() -> None:
    model = build("gemma3")
    rotary = model.model.rotary_emb
    sliding, full = (
        rotary.sliding_attention_inv_freq.clone(),
        rotary.full_attention_inv_freq.clone(),
    )
    handle = extend(model, 1024)
    assert handle.rope == "yarn"
    assert torch.equal(rotary.sliding_attention_inv_freq, sliding)
    assert not torch.equal(rotary.full_attention_inv_freq, full)
    assert rotary.sliding_attention_attention_scaling == 1.0
    assert rotary.full_attention_attention_scaling > 1.0


@pytest.mark.parametrize("name", ["mistral", "smollm3"])
def test_layers_that_never_look_far_are_not_scaled(name: str) -> None:
    """All of Mistral's layers slide; SmolLM3's full layers know no positions."""
    model = build(name)
    before = model.model.rotary_emb.inv_freq.clone()
    handle = extend(model, 4096)
    assert handle.rope is None
    assert torch.equal(model.model.rotary_emb.inv_freq, before)
    check_length(model, 4096)


def test_full_layers_with_positions_are_scaled() -> None:
    model = build("smollm3")
    model.config.no_rope_layers = [1, 1]
    assert extend(model, 4096).rope == "yarn"


def test_lengths_the_model_knows_change_no_position() -> None:
    model = build("llama")
    before = model.config.to_dict()["rope_parameters"]
    handle = extend(model, 200, attention=None)
    assert handle.rope is None
    assert model.config.rope_parameters == before
    assert model.config.max_position_embeddings == 256
    assert attention_of(model) is None


@pytest.mark.parametrize("name", ["gpt2", "opt", "bert", "vit"])
def test_learned_tables_have_an_end(name: str) -> None:
    model = build(name)
    before = _state(model)
    if name != "vit":
        with pytest.raises(UnsupportedError, match="learned table"):
            extend(model, 4096)
        assert _state(model) == before
        with pytest.raises(InputError, match="learned table"):
            check_length(model, 129)
        check_length(model, 128)
    handle = extend(model, 128, attention="ms_swift")
    assert attention_of(model) == MSSwift()
    handle.revert()
    assert _state(model) == before


def test_too_few_rotated_channels() -> None:
    with pytest.raises(ConfigError, match="at least 4"):
        RopeScaling(kind="ntk", factor=2.0, original_length=64).frequencies(2, 1e4)


def _scaled(**rope: Any) -> Any:
    parameters = {"rope_theta": 10_000.0, "original_max_position_embeddings": 64, **rope}
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
        rope_parameters=parameters,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["yarn", "llama3", "linear"])
def test_a_scaled_model_gets_a_larger_factor_of_the_same_kind(kind: str) -> None:
    extra = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    model = _scaled(rope_type=kind, factor=4.0, **extra)
    with pytest.raises(ConfigError, match="trained with"):
        extend(model, 1024, rope="ntk")
    extend(model, 1024, rope=kind)
    assert model.config.rope_parameters["factor"] == 16.0
    expected = RopeScaling(kind=kind, factor=16.0, original_length=64)  # type: ignore[arg-type]
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, expected.frequencies(16, 1e4)[0])


def test_failures_leave_no_trace() -> None:
    model = build("llama")
    before, buffers = _state(model), _buffers(model)
    for options in ({"rope": "magic"}, {"attention": "magic"}):
        with pytest.raises(ConfigError, match="magic"):
            extend(model, 1024, **options)
        assert _state(model) == before
        assert all(torch.equal(b, buffers[n]) for n, b in _buffers(model).items())
    for length in (0, -1, 2.5, True):
        with pytest.raises(InputError, match="max_length"):
            extend(model, length)  # type: ignore[arg-type]


def test_extensions_nest() -> None:
    model = build("llama")
    first = _state(model)
    with extend(model, 512, attention=Full()):
        second = _state(model)
        with extend(model, 4096, rope="yarn", attention="ms_swift"):
            check_length(model, 4096)
        assert _state(model) == second
    assert _state(model) == first


def test_the_rotary_module_stays_in_place() -> None:
    model = build("llama")
    rotary = model.model.rotary_emb
    handle = extend(model, 1024)
    assert model.model.rotary_emb is rotary
    half = model.to(torch.bfloat16)
    half(**batch(8))
    handle.revert()
    assert model.model.rotary_emb is rotary


@pytest.mark.skipif(not hasattr(transformers, "Cohere2MoeConfig"), reason="not in this version")
@pytest.mark.parametrize(
    ("dense", "pattern", "near"), [(0, 1, True), (3, 1, True), (4, 1, False), (4, 4, True)]
)
def test_full_layers_that_rotate_in_the_dense_prefix_only(
    dense: int, pattern: int, near: bool
) -> None:
    """Layer 3 is the full one: its positions are known if it is dense and the pattern is 1."""
    config = transformers.Cohere2MoeConfig(
        num_hidden_layers=4,
        sliding_window=16,
        mlp_layer_types=["dense"] * dense + ["sparse"] * (4 - dense),
        prefix_dense_sliding_window_pattern=pattern,
    )
    assert only_near_layers_rotate(config, 64) is near
