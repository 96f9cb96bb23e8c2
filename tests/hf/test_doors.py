"""Converted models that come in by another door, and calls that would lose their state."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from longswift.core.errors import UnsupportedError
from longswift.hf import SwiftCache, convert, from_pretrained, set_attention
from longswift.memory.compressive import Infini
from tests.hf.models import SPARSE, VOCAB, build


@pytest.fixture
def converted() -> Any:
    model = build("llama")
    convert(model, Infini(segment=16))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "memory" in name:
                weight.uniform_(-1.0, 1.0)
    return model


def ids(length: int = 60) -> torch.Tensor:
    return torch.randint(3, VOCAB, (1, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_a_checkpoint_of_memories_does_not_run_without_them(converted: Any, tmp_path: Path) -> None:
    converted.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="longswift_full")
    with pytest.raises(UnsupportedError, match=r"longswift\.hf\.from_pretrained"):
        plain(ids())


@torch.no_grad()
def test_memories_are_found_with_one_head_more_or_less(converted: Any, tmp_path: Path) -> None:
    expected = converted.model(ids()).last_hidden_state
    converted.save_pretrained(tmp_path / "whole")
    bare = from_pretrained(tmp_path / "whole", auto_class=AutoModel)
    torch.testing.assert_close(bare(ids()).last_hidden_state, expected)
    bare.save_pretrained(tmp_path / "bare")
    for auto in (AutoModelForCausalLM, AutoModelForSequenceClassification):
        again = from_pretrained(tmp_path / "bare", auto_class=auto)
        torch.testing.assert_close(again.model(ids()).last_hidden_state, expected)


def test_checkpointing_that_drops_the_cache_is_refused(converted: Any) -> None:
    model = converted.train()
    first, second = ids(120).split(60, 1)

    def losses(model: Any) -> list[float]:
        cache = SwiftCache(model.config)
        kept = [model(x, labels=x, past_key_values=cache).loss.item() for x in (first, second)]
        assert cache.get_seq_length() == 120
        return kept

    expected = losses(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for one in (model, copy.deepcopy(model), model.model):
        with pytest.raises(UnsupportedError, match="drops it"):
            one(first, past_key_values=SwiftCache(model.config))
    # A whole text in one call has no state to lose.
    assert model(first, labels=first).loss.item() == pytest.approx(expected[0], rel=1e-5)
    assert losses(model.eval()) == pytest.approx(expected, rel=1e-5)
    model.train().gradient_checkpointing_disable()
    assert losses(model) == expected


def test_a_reverted_model_may_drop_its_cache_again() -> None:
    model = build("llama").train()
    with convert(model, Infini(segment=16)):
        pass
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(ids(), past_key_values=SwiftCache(model.config))


def test_a_compiled_model_with_memories(converted: Any) -> None:
    compiled = torch.compile(converted, backend="aot_eager")
    for length in (60, 47):
        found, expected = (m(ids(length), use_cache=False).logits for m in (compiled, converted))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_autocast_means_the_same_with_a_cache(name: str) -> None:
    """A new cache makes fp32 of everything, which autocast would not have seen."""
    found = []
    for cached in (True, False):
        model = build(name).train()
        set_attention(model, SPARSE)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids(200), labels=ids(200), use_cache=cached).loss
        loss.backward()
        weights = [p.grad for p in model.parameters() if p.grad is not None]
        found.append([loss.detach(), *weights])
    for with_cache, without in zip(*found, strict=True):
        assert torch.equal(with_cache, without)
