"""Registration, settings in the configuration, and how they travel."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    cache_utils,
    masking_utils,
    modeling_utils,
)
from transformers.masking_utils import AttentionMaskInterface

from longswift import Full, MSSwift, SlidingWindow, UnsupportedError, list_mechanisms
from longswift.core.errors import ConfigError
from longswift.hf import attention_of, extend, implementation_names, set_attention
from tests.hf.models import batch, build


def test_every_mechanism_has_a_safe_name_and_a_mask_function() -> None:
    names = implementation_names()
    assert {"ms_swift", "ms-swift", "longswift_full", "longswift_ms_swift"} <= set(names)
    assert {f"longswift_{name}" for name in list_mechanisms()} <= set(names)
    for name in names:
        assert name in AttentionInterface()
        assert name in AttentionMaskInterface()
        assert not any(word in name for word in ("flash", "sdpa", "flex_attention", "/"))


def test_importing_adds_names_and_changes_nothing_else() -> None:
    """Whatever in Transformers comes from this library is an entry under one of its names."""
    modules = (cache_utils, masking_utils, modeling_utils)
    # torch.compile writes the classes it has seen into the modules it compiles.
    spaces = {
        f"{m.__name__}.{name}": value
        for m in modules
        for name, value in vars(m).items()
        if not name.startswith("__subclass_")
    }
    tables = {name: value for name, value in spaces.items() if name.endswith("_MAPPING")}
    tables |= {"attention": dict(AttentionInterface()), "masks": dict(AttentionMaskInterface())}
    classes = {name: vars(value) for name, value in spaces.items() if isinstance(value, type)}
    for owner, entries in {"modules": spaces, **tables, **classes}.items():
        for name, value in entries.items():
            if str(getattr(value, "__module__", "")).startswith("longswift"):
                assert owner in ("attention", "masks") and name in implementation_names(), name


def test_settings_survive_save_and_load(tmp_path: Path) -> None:
    model = build("gemma3")
    mechanism = MSSwift(
        windows=(32, 64), sinks=2, key_tokens=32, block=32, remainder=None, dense_below=16
    )
    set_attention(model, mechanism)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["longswift"]["attention"]["name"] == "ms_swift"
    for name in ("ms_swift", "ms-swift", "longswift_ms_swift"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
        assert attention_of(again) == mechanism
    inputs = batch(200, "left")
    with torch.no_grad():
        again.eval()
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert attention_of(plain) is None
    other = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="longswift_full")
    assert attention_of(other) == Full()


def test_a_loaded_configuration_alone_carries_the_settings(tmp_path: Path) -> None:
    model = build("llama")
    set_attention(model, SlidingWindow(window=9))
    model.config.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    name = "longswift_sliding_window"
    again = AutoModelForCausalLM.from_config(config, attn_implementation=name)
    assert attention_of(again) == SlidingWindow(window=9)


def test_changed_settings_take_effect_at_once() -> None:
    model, inputs = build("llama"), batch(32, "none")
    with torch.no_grad():
        dense = model(**inputs).logits
        set_attention(model, SlidingWindow(window=4))
        narrow = model(**inputs).logits
        set_attention(model, SlidingWindow(window=32))
        wide = model(**inputs).logits
        # Edited in place, as a user might.
        model.config.longswift["attention"]["window"] = 4
        edited = model(**inputs).logits
    torch.testing.assert_close(wide, dense, rtol=1e-4, atol=1e-4)
    assert (narrow - dense).abs().max() > 1e-2
    torch.testing.assert_close(edited, narrow)


def test_two_models_share_nothing() -> None:
    first, inputs = build("llama"), batch(32, "none")
    second = copy.deepcopy(first)
    set_attention(first, SlidingWindow(window=4))
    set_attention(second, SlidingWindow(window=32))
    with torch.no_grad():
        a, b = first(**inputs).logits, second(**inputs).logits
        assert (a - b).abs().max() > 1e-2
        torch.testing.assert_close(first(**inputs).logits, a)
    assert attention_of(first) == SlidingWindow(window=4)
    assert attention_of(second) == SlidingWindow(window=32)


def test_single_layers_may_differ(tmp_path: Path) -> None:
    model, inputs = build("llama"), batch(32, "none")
    with torch.no_grad():
        set_attention(model, SlidingWindow(window=4), layers={1: Full()})
        mixed = model(**inputs).logits
        set_attention(model, SlidingWindow(window=4))
        assert "layers" not in model.config.longswift
        narrow = model(**inputs).logits
        set_attention(model, SlidingWindow(window=4), layers={0: Full(), 1: Full()})
        torch.testing.assert_close(model(**inputs).logits, build("llama")(**inputs).logits)
        set_attention(model, SlidingWindow(window=4), layers={1: Full()})
        model.save_pretrained(tmp_path)
        name = "longswift_sliding_window"
        again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name).eval()
        torch.testing.assert_close(again(**inputs).logits, mixed)
    assert (mixed - narrow).abs().max() > 1e-2


def test_spoiled_settings_are_named() -> None:
    model = build("llama")
    model.set_attn_implementation("ms_swift")
    model.config.longswift = "fast please"
    with pytest.raises(ConfigError, match="config.longswift"):
        model(**batch())
    model.config.longswift = {"attention": {"name": "ms_swift", "windowz": 3}}
    with pytest.raises(ConfigError, match="windowz"):
        model(**batch())


@pytest.mark.parametrize("given", [None, MSSwift, 3, {"name": "full"}])
def test_what_is_no_mechanism_is_refused(given: Any) -> None:
    model = build("llama")
    with pytest.raises(ConfigError, match="a mechanism such as"):
        set_attention(model, given)
    with pytest.raises(ConfigError, match="a mechanism such as"):
        set_attention(model, Full(), layers={0: given})
    assert attention_of(model) is None


def test_what_is_no_model_or_no_table_of_layers_is_refused() -> None:
    model = build("llama")
    with pytest.raises(ConfigError, match="for each layer index"):
        set_attention(model, Full(), layers=[0])  # type: ignore[arg-type]
    for other in (torch.nn.Linear(3, 3), torch.nn.DataParallel(model)):
        with pytest.raises(ConfigError, match=r"a model of Transformers, got .*\.module"):
            set_attention(other, "full")
        with pytest.raises(ConfigError, match=r"a model of Transformers, got .*\.module"):
            extend(other)


def test_architectures_with_their_own_attention_are_refused() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=4))
    with pytest.raises(UnsupportedError, match="AttentionInterface"):
        set_attention(model, Full())
