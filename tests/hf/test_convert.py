"""Memories inside Transformers models: exact where they should be, and as usable as before."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import DynamicCache, PreTrainedTokenizerFast, StaticCache

from longswift import ConfigError, Full, InputError, SlidingWindow, UnsupportedError
from longswift.hf import (
    SwiftCache,
    attention_of,
    convert,
    from_pretrained,
    memory_parameters,
    set_attention,
)
from longswift.hf.loading import load
from longswift.hf.memory_cache import MemoryLayer
from longswift.memory.base import MemoryConfig
from longswift.memory.compressive import Infini
from longswift.memory.segment import TransformerXL
from tests.hf.models import batch, build, recent, shared

FAMILIES = ["llama", "mistral", "qwen3", "smollm3", "gpt_neox"]
SHORT: list[MemoryConfig] = [
    Infini(segment=7),
    Infini(segment=5, update="delta_token"),
    TransformerXL(segment=4, memory=3),
    TransformerXL(segment=4, memory=6, same_length=True),
]
of_family = pytest.mark.parametrize("name", FAMILIES)
EACH = [(name, SHORT[0]) for name in FAMILIES] + [("llama", memory) for memory in SHORT[1:]]
of_each = pytest.mark.parametrize(("name", "memory"), EACH, ids=lambda x: getattr(x, "name", x))
of_memory = pytest.mark.parametrize("memory", SHORT, ids=lambda m: m.name)


def build_full(name: str) -> Any:
    """A new model whose layers see everything, so that only the memory limits them."""
    model = build(name)
    if name == "mistral":
        model.config.sliding_window = None
    for layer in model.modules():
        if getattr(layer, "sliding_window", None) is not None:
            layer.sliding_window = None
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = ["full_attention"] * len(model.config.layer_types)
        model.base_model.has_sliding_layers = False
    return model


def disturb(model: Any) -> None:
    """Parameters of memories away from their neutral start."""
    with torch.no_grad():
        for parameter in memory_parameters(model):
            parameter.normal_(std=0.3)


def logits(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    real = inputs["attention_mask"].bool()
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    return model(**inputs, position_ids=positions, **options).logits[real]


@of_family
@pytest.mark.parametrize(
    "memory", [Infini(segment=64), TransformerXL(segment=64, memory=1)], ids=lambda m: m.name
)
@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_one_segment_is_the_model_itself(name: str, memory: MemoryConfig, padding: str) -> None:
    model, inputs = build_full(name), batch(24, padding)
    before = logits(model, inputs)
    with convert(model, memory):
        torch.testing.assert_close(logits(model, inputs), before, rtol=1e-4, atol=1e-4)


@of_family
@torch.no_grad()
def test_memory_within_reach_is_the_model_itself(name: str) -> None:
    """Transformer-XL starts neutral: a memory longer than the text is full attention."""
    model, inputs = build_full(name), batch(24, "left")
    before = logits(model, inputs)
    with convert(model, TransformerXL(segment=5, memory=40)):
        torch.testing.assert_close(logits(model, inputs), before, rtol=1e-4, atol=1e-4)


@of_each
@torch.no_grad()
def test_generating_is_teacher_forcing(name: str, memory: MemoryConfig) -> None:
    model = build_full(name)
    convert(model, memory)
    disturb(model)
    inputs = batch(20, "left")
    grown = model.generate(
        **inputs,
        max_new_tokens=12,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    full = torch.cat([inputs["attention_mask"], torch.ones(3, 12, dtype=torch.long)], 1)
    positions = (full.cumsum(1) - 1).clamp_min(0)
    whole = model(grown.sequences, attention_mask=full, position_ids=positions).logits
    step_by_step = torch.stack(grown.logits, 1)
    torch.testing.assert_close(step_by_step, whole[:, 19:-1], rtol=1e-3, atol=1e-3)
    for row, padded in enumerate((0, 5, 19)):
        alone = model.generate(
            inputs["input_ids"][row : row + 1, padded:], max_new_tokens=12, do_sample=False
        )
        assert torch.equal(alone[0, -12:], grown.sequences[row, -12:])


@of_memory
@torch.no_grad()
def test_cache_is_bounded_and_layers_are_replaced_in_it(memory: MemoryConfig) -> None:
    model = build("llama")
    convert(model, memory, layers=[1])
    sizes = []
    for length in (40, 160):
        cache = DynamicCache(config=model.config)
        model(torch.ones(1, length, dtype=torch.long), past_key_values=cache)
        assert [type(layer) for layer in cache.layers][1] is MemoryLayer
        assert cache.get_seq_length(1) == cache.get_seq_length(0) == length
        sizes.append(cache.layers[1].nbytes)
    assert 0 < sizes[1] <= sizes[0] + 7 * 1024


@of_memory
@torch.no_grad()
def test_beams_sampling_and_chunked_prefill(memory: MemoryConfig) -> None:
    model = build("llama")
    convert(model, memory)
    disturb(model)
    inputs = batch(17, "left")
    options: dict[str, Any] = dict(max_new_tokens=9, num_beams=3, do_sample=False)
    cached = model.generate(**inputs, **options)
    assert torch.equal(cached, model.generate(**inputs, **options, use_cache=False))
    greedy = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    chunked = model.generate(**inputs, max_new_tokens=6, do_sample=False, prefill_chunk_size=5)
    assert torch.equal(greedy, chunked)
    several = model.generate(**inputs, max_new_tokens=4, do_sample=True, num_return_sequences=2)
    assert several.shape == (6, 21)


@torch.no_grad()
def test_cache_rows() -> None:
    model = build("llama")
    convert(model, Infini(segment=4))
    disturb(model)
    ids = torch.randint(3, 90, (2, 11))
    more = torch.randint(3, 90, (1, 3))
    expected = model(torch.cat([ids[1:], more], 1)).logits[:, -3:]
    for change in ("select", "reorder", "repeat"):
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        if change == "select":
            cache.batch_select_indices(torch.tensor([1]))
        elif change == "reorder":
            cache.reorder_cache(torch.tensor([1, 0]))
        else:
            cache.batch_repeat_interleave(2)
        rows = cache.layers[0].state.seen
        got = model(more.expand(len(rows), -1), past_key_values=cache).logits
        row = {"select": 0, "reorder": 0, "repeat": 3}[change]
        torch.testing.assert_close(got[row], expected[0])
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(model(ids, past_key_values=cache).logits, model(ids).logits)


@recent
@of_memory
@torch.no_grad()
def test_recorded_tokens_can_be_taken_back(memory: MemoryConfig) -> None:
    model = build("llama")
    convert(model, memory)
    disturb(model)
    inputs = batch(16, "left")
    inputs = {name: x[:2] for name, x in inputs.items()}
    more = torch.randint(3, 90, (2, 14))
    ones = torch.ones(2, 30, dtype=torch.long)
    ones[:, :16] = inputs["attention_mask"]
    for sizes, removed in (([14], 5), ([3, 5, 6], 6), ([3, 5, 6], 9), ([3, 5, 6], 14), ([14], 0)):
        cache = DynamicCache(config=model.config)
        model(**inputs, past_key_values=cache)
        cache.activate_past_recording()
        start = 16
        for piece in more.split(sizes, 1):
            start += piece.shape[1]
            model(piece, attention_mask=ones[:, :start], past_key_values=cache)
        cache.crop(-removed)
        kept = 14 - removed
        assert cache.get_seq_length() == 16 + kept
        got = (
            model(more[:, kept:], attention_mask=ones, past_key_values=cache).logits
            if removed
            else 0
        )
        whole = model(torch.cat([inputs["input_ids"], more], 1), attention_mask=ones).logits
        if removed:
            torch.testing.assert_close(got, whole[:, 16 + kept :], rtol=1e-4, atol=1e-4)
        with pytest.raises(UnsupportedError, match="SwiftCache"):
            cache.crop(-15)


@recent
@of_memory
@torch.no_grad()
def test_assisted_decoding_is_greedy_decoding(memory: MemoryConfig) -> None:
    model, assistant = build("llama"), shared("llama")
    convert(model, memory)
    disturb(model)
    ids = torch.randint(3, 90, (1, 13))
    ids = torch.cat([ids, ids], 1)
    options: dict[str, Any] = dict(max_new_tokens=20, do_sample=False)
    greedy = model.generate(ids, **options)
    for helper in ({"prompt_lookup_num_tokens": 5}, {"assistant_model": assistant}):
        # Since Transformers 5.24 it asks the cache before this library is asked to undo anything.
        with pytest.raises(ValueError, match="SwiftCache|can be cropped"):
            model.generate(ids, **options, **helper)
        cache = SwiftCache(model.config)
        assert torch.equal(greedy, model.generate(ids, **options, **helper, past_key_values=cache))


@torch.no_grad()
def test_what_a_memory_cannot_undo_is_refused() -> None:
    model = build("llama")
    convert(model, Infini(segment=4))
    ids = torch.randint(3, 90, (1, 11))
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    assert not cache.layers[0].is_croppable
    cache.crop(0)
    with pytest.raises(UnsupportedError, match="SwiftCache"):
        cache.crop(-1)
    with pytest.raises(UnsupportedError, match="StaticCache"):
        model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=32))
    with pytest.raises(UnsupportedError, match="output_attentions"):
        model(ids, output_attentions=True)
    layer = model.model.layers[0].self_attn
    with pytest.raises(UnsupportedError, match="continuous batching"):
        layer(torch.zeros(1, 3, 32), cache=object())
    with pytest.raises(UnsupportedError, match="two-dimensional"):
        model(ids, attention_mask=torch.ones(1, 1, 11, 11, dtype=torch.bool))
    filled = DynamicCache(config=model.config)
    shared("llama")(ids, past_key_values=filled)
    with pytest.raises(UnsupportedError, match="empty DynamicCache"):
        model(ids, past_key_values=filled)
    with pytest.raises(UnsupportedError, match="fresh cache"):
        shared("llama")(ids, past_key_values=cache)
    model.train()
    model.config.attention_dropout = 0.1
    with pytest.raises(UnsupportedError, match="dropout"):
        model(ids)


@of_family
def test_reverting_restores_the_very_modules(name: str) -> None:
    model, inputs = build_full(name), batch(16)
    before = {n: id(m) for n, m in model.named_modules()}
    config, implementation = (
        copy.deepcopy(model.config.to_dict()),
        model.config._attn_implementation,
    )
    with torch.no_grad():
        logits_before = model(**inputs).logits
        handle = convert(model, Infini(segment=4), layers=[0])
        assert handle.layers == [0]
        assert not torch.equal(model(**inputs).logits, logits_before)
        second = convert(model, "transformer_xl", layers=[1])
        second.revert()
        handle.revert()
        handle.revert()
        assert {n: id(m) for n, m in model.named_modules()} == before
        assert model.config.to_dict() == config
        assert model.config._attn_implementation == implementation
        assert torch.equal(model(**inputs).logits, logits_before)


def test_attention_of_the_other_layers_is_kept() -> None:
    model = build("llama")
    set_attention(model, SlidingWindow(window=9))
    with convert(model, Infini(segment=4), layers=[0]):
        assert attention_of(model) == SlidingWindow(window=9)
    assert attention_of(model) == SlidingWindow(window=9)
    plain = build("llama")
    with convert(plain, Infini(segment=4)):
        assert attention_of(plain) == Full()
    assert attention_of(plain) is None


@of_each
def test_checkpointing_changes_no_gradient(name: str, memory: MemoryConfig) -> None:
    model = build_full(name)
    convert(model, memory)
    disturb(model)
    model.train()
    inputs = batch(19, "right")
    grads = []
    for checkpointed in (False, True):
        model.zero_grad()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert any("memory" in n and g.abs().sum() > 0 for n, g in grads[0].items())
    assert grads[0].keys() == grads[1].keys()
    for n, g in grads[0].items():
        torch.testing.assert_close(grads[1][n], g, msg=lambda m, n=n: f"{n}: {m}")


def test_a_recomputed_layer_does_not_advance_its_cache_twice() -> None:
    """Checkpointing code that keeps the cache calls the layer again in the backward pass."""
    model = build("llama")
    convert(model, Infini(segment=4))
    model.train()
    ids = torch.randint(3, 90, (1, 10))
    cache = DynamicCache(config=model.config)
    calls: list[Any] = []
    layer = model.model.layers[0].self_attn
    layer.register_forward_hook(
        lambda m, a, k, out: calls.append((k, out[0], cache.layers[0].state)), with_kwargs=True
    )
    model(ids, past_key_values=cache)
    arguments = calls[0][0]
    layer(**arguments)
    assert calls[0][2] is calls[1][2] and cache.layers[0].length == 10
    torch.testing.assert_close(calls[0][1], calls[1][1])
    model.eval()
    with pytest.raises(InputError, match="from position 10 on"):
        layer(**arguments)


def test_training_across_calls_stops_where_detached() -> None:
    model = build("llama")
    convert(model, Infini(segment=4))
    model.train()
    ids = torch.randint(3, 90, (1, 16))
    cache = DynamicCache(config=model.config)
    for piece in ids.split(8, 1):
        model.zero_grad()
        model(piece, past_key_values=cache, labels=piece).loss.backward()
        for layer in cache.layers:
            layer.detach()
    assert memory_parameters(model)[0].grad.abs().sum() > 0


@of_each
def test_saved_and_loaded_again(name: str, memory: MemoryConfig, tmp_path: Path) -> None:
    model, inputs = build_full(name), batch(24)
    convert(model, memory, layers=[1])
    disturb(model)
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path).eval()
    assert again.config.longswift["memory"] == {"1": memory.to_dict()}
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)
    assert type(again.get_submodule(_attention(name, 1))) is type(
        model.get_submodule(_attention(name, 1))
    )


def test_the_command_line_loads_converted_models(tmp_path: Path) -> None:
    model = build("llama")
    convert(model, Infini(segment=4))
    disturb(model)
    model.save_pretrained(tmp_path)
    words = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    again, _ = load(tmp_path)
    for saved, loaded in zip(memory_parameters(model), memory_parameters(again), strict=True):
        assert torch.equal(saved, loaded)


def test_plain_models_load_as_always_and_incomplete_ones_do_not(tmp_path: Path) -> None:
    model = build("llama")
    model.save_pretrained(tmp_path / "plain")
    assert attention_of(from_pretrained(tmp_path / "plain")) is None
    with convert(model, Infini(segment=4)):
        model.config.save_pretrained(tmp_path / "plain")
    with pytest.raises(InputError, match="gate_bias"):
        from_pretrained(tmp_path / "plain")


@of_family
def test_lora_finds_its_targets_and_trains_the_memory(name: str) -> None:
    from peft import LoraConfig, get_peft_model

    model = build_full(name)
    handle = convert(model, Infini(segment=4))
    targets = ["query_key_value"] if name == "gpt_neox" else ["q_proj", "v_proj"]
    tuned = get_peft_model(
        model, LoraConfig(r=2, target_modules=targets, modules_to_save=["memory"])
    )
    inputs = batch(16, "right")
    tuned(**inputs, labels=inputs["input_ids"]).loss.backward()
    trained = {n for n, p in tuned.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("lora_B" in n for n in trained)
    assert any("gate_bias" in n for n in trained)
    assert all("lora" in n or "modules_to_save" in n for n in trained)
    tuned.unload()
    handle.revert()
    assert not memory_parameters(model)


@torch.no_grad()
def test_half_precision_keeps_new_parameters_wide() -> None:
    model = build("llama").to(torch.bfloat16)
    convert(model, Infini(segment=4))
    convert_out = model(**batch(12)).logits
    assert convert_out.dtype == torch.bfloat16 and convert_out.isfinite().all()
    assert {p.dtype for p in memory_parameters(model)} == {torch.float32}


def test_autocast() -> None:
    for memory in SHORT:
        model = build("llama").train()
        convert(model, memory)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch(12, "right"), labels=batch(12, "right")["input_ids"]).loss
        loss.backward()
        assert loss.isfinite()


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "bert", "deepseek_v3"])
def test_other_architectures_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedError, match="Llama, Mistral, Qwen3, SmolLM3, GPT-NeoX"):
        convert(shared(name), Infini())


def test_impossible_conversions_leave_no_trace() -> None:
    model = build("llama")
    before = copy.deepcopy(model.config.to_dict())
    with pytest.raises(ConfigError, match="indices among"):
        convert(model, "infini", layers=[0, 2])
    with pytest.raises(ConfigError, match="set_attention"):
        convert(model, SlidingWindow())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="one of infini"):
        convert(model, "nothing")
    for layers in (1, []):
        with pytest.raises(ConfigError, match="one layer or more"):
            convert(model, "infini", layers=layers)  # type: ignore[arg-type]
    assert model.config.to_dict() == before
    with convert(model, "infini", layers=[0]), pytest.raises(ConfigError, match="reverted first"):
        convert(model, "infini", layers=[0])
    for name in ("mistral", "smollm3"):
        with pytest.raises(UnsupportedError, match="sliding window"):
            convert(build(name), Infini(segment=8), layers=[0])
        with torch.no_grad():
            slides = build(name)
            convert(slides, Infini(segment=7), layers=[0])
            slides.generate(**batch(20), max_new_tokens=5)


def _attention(name: str, index: int) -> str:
    return (
        f"gpt_neox.layers.{index}.attention"
        if name == "gpt_neox"
        else (f"model.layers.{index}.self_attn")
    )
