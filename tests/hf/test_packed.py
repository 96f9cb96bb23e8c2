"""Several sequences in a row: each attends as if it were alone, as with Transformers' own masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening

from longswift.core.errors import UnsupportedError
from longswift.hf import SwiftCache, convert, set_attention
from longswift.memory.compressive import Infini
from tests.hf.models import SPARSE, VOCAB, build, with_attention

LENGTHS = [70, 33, 1, 96]
# The others take no positions, or no more than these.
PACKS = ["llama", "qwen3", "mistral", "gemma3", "gpt_neox", "smollm3", "gpt2", "deepseek_v3"]


def packed(*rows: list[int]) -> tuple[Tensor, Tensor]:
    """Token ids and positions of rows of sequences of these lengths."""
    generator = torch.Generator().manual_seed(len(rows))
    ids = torch.randint(3, VOCAB, (len(rows), sum(rows[0])), generator=generator)
    return ids, torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])


def alone(model: Any, ids: Tensor, *rows: list[int]) -> Tensor:
    """Logits of every sequence read by itself."""
    done = []
    for row, lengths in zip(ids, rows, strict=True):
        sequences = row[None].split(lengths, 1)
        done.append(torch.cat([model(one, use_cache=False).logits for one in sequences], 1))
    return torch.cat(done)


@pytest.mark.parametrize("name", PACKS)
@torch.no_grad()
def test_packed_is_what_transformers_computes(name: str) -> None:
    ids, positions = packed(LENGTHS)
    model = build(name)
    expected = model(ids, position_ids=positions, use_cache=False).logits
    set_attention(model, "full")
    found = model(ids, position_ids=positions, use_cache=False).logits
    # Of fp64 either is more than 2e-5 off, see test_equality.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [[LENGTHS], [LENGTHS, LENGTHS], [LENGTHS, [1, 150, 49]]])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_every_sequence_is_alone_in_values_and_gradients(name: str, rows: list[list[int]]) -> None:
    ids, positions = packed(*rows)
    model = build(name)
    set_attention(model, SPARSE)
    weights = torch.randn(ids.shape + (VOCAB,), generator=torch.Generator().manual_seed(0))
    found = {}
    for how in ("packed", "alone"):
        model.zero_grad()
        if how == "packed":
            logits = model(ids, position_ids=positions, use_cache=False).logits
        else:
            logits = alone(model, ids, *rows)
        (logits * weights).sum().backward()
        found[how] = [logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    assert len(found["alone"]) > 5
    for got, expected in zip(found["packed"], found["alone"], strict=True):
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(got / scale, expected / scale, atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_a_changed_token_moves_only_its_own_sequence() -> None:
    ids, positions = packed(LENGTHS)
    model = with_attention("llama", "ms_swift")
    before = model(ids, position_ids=positions, use_cache=False).logits
    changed = ids.clone()
    changed[0, 75] = 3 + (changed[0, 75] - 2) % (VOCAB - 3)
    after = model(changed, position_ids=positions, use_cache=False).logits
    moved = (after != before).any(-1)[0]
    assert moved[75:103].all() and not moved[:75].any() and not moved[103:].any()


@torch.no_grad()
def test_bounds_of_flash_attention_say_the_same() -> None:
    rows = [{"input_ids": list(range(3, 3 + n))} for n in (40, 7, 21)]
    made = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(rows)
    made.pop("labels")
    bounds = {k: v for k, v in made.items() if "cu_seq_lens" in k}
    assert bounds
    model = with_attention("llama", "ms_swift")
    ids, positions = made["input_ids"], made["position_ids"]
    expected = model(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(model(**made, use_cache=False).logits, expected, rtol=0, atol=0)
    # A cache keeps Transformers from looking at positions; the bounds are heard all the same.
    torch.testing.assert_close(model(**made, use_cache=True).logits, expected, rtol=0, atol=0)
    short = {key: value[:, :64] for key, value in made.items() if key.endswith("_ids")}
    two = dict.fromkeys(bounds, torch.tensor([0, 40, 47, 64], dtype=torch.int32))
    cache = SwiftCache(model.config)
    found = model(**short, **two, past_key_values=cache).logits
    again = model(**short, use_cache=False).logits
    torch.testing.assert_close(found, again, rtol=0, atol=0)
    with pytest.raises(UnsupportedError, match="that say the same"):
        model(ids, position_ids=positions, use_cache=False, **{**bounds, "cu_seq_lens_k": None})
    for wrong in ([0, 68], [0, 70, 68], [5, 73], [68], []):
        others = dict.fromkeys(bounds, torch.tensor(wrong, dtype=torch.int32))
        with pytest.raises(UnsupportedError, match="that say the same"):
            model(ids, position_ids=positions, use_cache=False, **others)
    real = torch.ones_like(ids)
    real[0, :3] = 0
    with pytest.raises(UnsupportedError, match="padding"):
        model(ids, attention_mask=real, use_cache=False, **bounds)


@torch.no_grad()
@pytest.mark.parametrize("inference", [False, True])
def test_bounds_are_read_again_once_they_are_written_to(inference: bool) -> None:
    """Layers share what one of them has read; a buffer that is filled anew is another row."""
    model = with_attention("llama", "ms_swift")
    ids = packed([60])[0]
    with torch.inference_mode(inference):
        bounds = torch.tensor([0, 40, 60])
        for end in (40, 25):
            bounds[1] = end
            given = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
            positions = torch.cat([torch.arange(end), torch.arange(60 - end)])[None]
            found = model(ids, position_ids=positions, use_cache=True, **given).logits
            expected = model(ids, position_ids=positions, use_cache=False).logits
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_memories_do_not_read_packed_sequences() -> None:
    model = build("llama")
    convert(model, Infini(segment=16))
    ids, positions = packed(LENGTHS)
    with pytest.raises(UnsupportedError, match="packed sequences"):
        model(ids, position_ids=positions, use_cache=False)


@torch.no_grad()
def test_a_compiled_model_reads_whole_and_packed_rows() -> None:
    """While it traces, Transformers takes every row without a mask for a packed one."""
    model = build("llama")
    set_attention(model, SPARSE)
    compiled = torch.compile(model, backend="eager")
    for rows in ([200], LENGTHS):
        ids, positions = packed(rows)
        expected = model(ids, position_ids=positions, use_cache=False).logits
        found = compiled(ids, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits
    )
