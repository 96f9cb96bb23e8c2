"""The model a command was given, and what tells it from another."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    AutoTokenizer,
    BambaConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
)

from longswift.core.errors import ConfigError, InputError, UnsupportedError
from longswift.eval.models import load
from longswift.eval.reading import next_token_logits
from longswift.hf import SwiftCache
from tests.hf.models import recent


def save(config: Any, tokenizer: Path, place: Path) -> Any:
    torch.manual_seed(0)
    model = Auto.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0.0, 0.15)
    model.save_pretrained(place)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(place)
    return model


HYBRID = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
}


def test_models_without_sdpa_attend_eagerly(
    model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Older versions of Transformers do not say so of their own accord.
    monkeypatch.setattr(Gemma2ForCausalLM, "_supports_sdpa", False)
    sizes = {key: value for key, value in HYBRID.items() if not key.startswith("mamba")}
    save(Gemma2Config(**sizes, head_dim=8), model_directory, tmp_path)
    loaded = load(str(tmp_path))
    loaded.use(None)
    assert loaded.model.config._attn_implementation == "eager"


def test_recurrent_layers_that_forget_between_chunks_are_refused(
    model_directory: Path, tmp_path: Path
) -> None:
    """Transformers' Bamba starts its recurrence anew in every call of several tokens."""
    save(BambaConfig(**HYBRID, attn_layer_indices=[1]), model_directory, tmp_path)
    with pytest.raises(UnsupportedError, match="forget"):
        load(str(tmp_path))


def test_logits_are_the_models_own(model_directory: Path, tmp_path: Path) -> None:
    config = FalconH1Config(**HYBRID, mamba_d_ssm=64, lm_head_multiplier=0.3)
    model, tokens = save(config, model_directory, tmp_path), torch.arange(20)[None]
    with torch.no_grad():
        hidden = model.get_decoder()(tokens, past_key_values=SwiftCache(model.config))
        ours = next_token_logits(model, hidden.last_hidden_state[0])
        torch.testing.assert_close(ours, model(tokens).logits[0], rtol=1e-4, atol=1e-4)


@recent
def test_recurrent_layers_that_go_on_between_chunks_load(
    model_directory: Path, tmp_path: Path
) -> None:
    config = FalconH1Config(**HYBRID, mamba_d_ssm=64, lm_head_multiplier=0.3)
    save(config, model_directory, tmp_path)
    load(str(tmp_path))


def test_logits_scaled_in_an_unknown_way_are_refused(
    model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = FalconH1Config(**HYBRID, mamba_d_ssm=64, lm_head_multiplier=0.3)
    save(config, model_directory, tmp_path)
    monkeypatch.setattr("longswift.eval.reading.next_token_logits", lambda m, h: m.lm_head(h))
    with pytest.raises(UnsupportedError, match="scales in a way of its own"):
        load(str(tmp_path))


def test_a_fingerprint_tells_weights_apart_whatever_the_threads() -> None:
    loaded = load("tiny")
    found = {loaded.fingerprint()}
    before = torch.get_num_threads()
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            found.add(loaded.fingerprint())
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1
    weight = next(iter(loaded.model.parameters()))
    with torch.no_grad():
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(2.0))
    assert loaded.fingerprint() not in found
    assert load("tiny", dtype="bfloat16").fingerprint() not in found


def test_a_tokenizer_of_a_larger_vocabulary(model_directory: Path, tmp_path: Path) -> None:
    place = shutil.copytree(model_directory, tmp_path / "model")
    sizes = {key: value for key, value in HYBRID.items() if not key.startswith("mamba")}
    Auto.from_config(LlamaConfig(**sizes | {"vocab_size": 40})).save_pretrained(place)
    with pytest.raises(ConfigError, match="token ids below 40, the model's vocabulary, got"):
        load(str(place))


def test_a_token_the_model_does_not_know_far_into_a_text(model_directory: Path) -> None:
    loaded = load(str(model_directory))
    last = loaded.known([loaded.vocabulary - 1])[0]
    with pytest.raises(ConfigError, match=f"got {last + 1}"):
        loaded.known([0, last + 1])


def test_weights_that_are_not_numbers(model_directory: Path, tmp_path: Path) -> None:
    place = shutil.copytree(model_directory, tmp_path / "model")
    weights = load_file(place / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="finite numbers, got NaN or infinity"):
        load(str(place))
