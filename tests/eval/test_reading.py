"""Reading in chunks, scoring, decoding, and leaving the cache as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from longswift.core.errors import InputError
from longswift.eval import fidelity, reading
from longswift.eval.models import Loaded, load
from longswift.hf import SwiftCache, set_attention
from longswift.mechanisms.sliding_window import SlidingWindow


@pytest.fixture(scope="module")
def loaded(model_directory: Path) -> Loaded:
    return load(str(model_directory))


@pytest.fixture(scope="module")
def ids(loaded: Loaded) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, 512, (300,), generator=generator).tolist()


def test_the_score_is_that_of_one_forward(loaded: Loaded, ids: list[int]) -> None:
    told = reading.read(loaded.model, ids, SwiftCache(loaded.model.config), chunk=64, score=True)
    with torch.inference_mode():
        loss = loaded.model(torch.tensor([ids]), labels=torch.tensor([ids])).loss
    assert told.tokens == len(ids) and told.seconds > 0
    assert told.perplexity == pytest.approx(loss.exp().item(), rel=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "full", "ms_swift"])
def test_asking_leaves_the_cache_as_it_was(loaded: Loaded, ids: list[int], attention: str) -> None:
    model = loaded.model
    if attention == "sdpa":
        model.set_attn_implementation("sdpa")
    else:
        set_attention(model, attention)
    cache = SwiftCache(model.config)
    reading.read(model, ids, cache, chunk=64)
    question = [5, 6, 7]
    first = reading.ask(model, question, cache, 6)
    assert cache.get_seq_length() == len(ids)
    assert reading.decode_speed(model, [9], cache, 3) > 0
    assert reading.ask(model, question, cache, 6) == first
    model.set_attn_implementation("sdpa")
    expected = model.generate(
        torch.tensor([[*ids, *question]]), max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    assert first == expected[0, -6:].tolist()


def test_decoding_stops_at_the_end_token(loaded: Loaded, ids: list[int]) -> None:
    cache = SwiftCache(loaded.model.config)
    made = list(reading.decode(loaded.model, ids, cache, 4))
    assert len(made) == 4
    cache = SwiftCache(loaded.model.config)
    stopped = list(reading.decode(loaded.model, ids, cache, 4, stop={made[2]}))
    assert stopped == made[: made.index(made[2])]


def test_a_document_starts_with_the_special_tokens_of_the_tokenizer(loaded: Loaded) -> None:
    assert loaded.begin() == [0]
    assert loaded.decode([*loaded.begin(), *loaded.encode("a b")]) == "a b"
    assert loaded.stop_tokens() == {0}


def test_logits_that_are_no_numbers_are_never_scored(model_directory: Path, ids: list[int]) -> None:
    masked = torch.tensor([[0.0, -torch.inf]])
    assert reading.finite(masked) is masked
    model = load(str(model_directory)).model
    with torch.no_grad():
        model.get_input_embeddings().weight[ids[200]] = torch.nan
    where = [ids[200] if i == 200 else i % 100 for i in range(300)]
    with pytest.raises(InputError, match="NaN"):
        reading.read(model, where, SwiftCache(model.config), chunk=64, score=True)
    with pytest.raises(InputError, match="NaN"):
        fidelity.measure(model, where, SlidingWindow(window=64), chunk=64)
    with pytest.raises(InputError, match="NaN"):
        list(reading.decode(model, where, SwiftCache(model.config), 1))
