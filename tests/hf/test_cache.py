"""SwiftCache against DynamicCache, and the way of its summaries to the mechanism."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from longswift import Full, MSSwift, SlidingWindow, UnsupportedError
from longswift.core.summary import KeySummary
from longswift.hf import SwiftCache, set_attention
from longswift.hf.cache import SwiftLayer, pages_of
from tests.hf.models import DECODERS, SPARSE, batch, build, recent, shared


def _filled(make: Any, *, config: Any = None) -> Any:
    cache = make(config=config)
    generator = torch.Generator().manual_seed(3)
    for layer in range(2):
        k, v = torch.randn(2, 3, 2, 9, 4, generator=generator)
        cache.update(k, v, layer)
    return cache


def _content(cache: Any) -> list[Tensor]:
    return [x for layer in cache.layers for x in (layer.keys, layer.values)]


OPERATIONS: dict[str, Any] = {
    "crop": lambda c: c.crop(-4),
    "reorder": lambda c: c.reorder_cache(torch.tensor([1, 1, 0])),
    "repeat": lambda c: c.batch_repeat_interleave(2),
    "select": lambda c: c.batch_select_indices(torch.tensor([2, 0])),
    "select by mask": lambda c: c.batch_select_indices(torch.tensor([True, False, True])),
}


@torch.no_grad()
@pytest.mark.parametrize("operation", OPERATIONS)
def test_same_content_as_dynamic_cache(operation: str) -> None:
    ours, theirs = _filled(SwiftCache), _filled(DynamicCache)
    for cache in (ours, theirs):
        OPERATIONS[operation](cache)
        more = torch.ones(cache.layers[0].keys.shape[0], 2, 3, 4)
        for layer in range(2):
            cache.update(more, more, layer)
    for a, b in zip(_content(ours), _content(theirs), strict=True):
        assert torch.equal(a, b)
    assert ours.get_seq_length() == theirs.get_seq_length()
    assert ours.get_mask_sizes(5, 0) == theirs.get_mask_sizes(5, 0)
    assert ours.is_compileable == theirs.is_compileable


@recent
@torch.no_grad()
def test_same_answers_as_dynamic_cache() -> None:
    ours, theirs = _filled(SwiftCache), _filled(DynamicCache)
    ours.crop(0)
    assert ours.get_seq_length() == theirs.get_seq_length()
    assert ours.get_max_length() == theirs.get_max_length()
    assert ours.is_croppable and theirs.is_croppable


@torch.no_grad()
def test_reset_and_use_again() -> None:
    cache = _filled(SwiftCache)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.layers[0].keys is None
    k, _ = cache.update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4), 0)
    assert k.shape == (1, 1, 2, 4)


def test_positive_crop_is_the_length_to_keep() -> None:
    cache = _filled(SwiftCache)
    cache.crop(4)
    assert cache.get_seq_length() == 4


def test_kinds_of_layers_follow_the_configuration() -> None:
    layers = SwiftCache(shared("gemma3").config).layers
    assert [type(layer) for layer in layers] == [DynamicSlidingWindowLayer, SwiftLayer]
    assert SwiftCache(shared("llama").config).is_sliding == [False, False]


def test_tensors_are_not_replaced_from_outside() -> None:
    cache = _filled(SwiftCache)
    with pytest.raises(UnsupportedError, match="update"):
        cache.layers[0].keys = torch.zeros(1)


def test_marks_belong_to_exactly_these_keys() -> None:
    layer = SwiftLayer()
    k, _ = layer.update(torch.ones(1, 1, 20, 4), torch.ones(1, 1, 20, 4))
    assert pages_of(k) is layer.pages
    assert pages_of(k + 0) is None and pages_of(k[:, :, 1:]) is None
    layer.reorder_cache(torch.tensor([0]))
    assert pages_of(k) is None
    k, _ = layer.update(torch.ones(1, 1, 1, 4), torch.ones(1, 1, 1, 4))
    layer.update(torch.ones(1, 1, 1, 4), torch.ones(1, 1, 1, 4))
    assert pages_of(k) is None


class _Recorder:
    """Notes what a mechanism is called with, and answers like ``Full``."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, dict[str, Any]]] = []

    def reads_summary(self, q_len: int, k: Tensor) -> bool:
        return True

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        self.calls.append((k, v, options))
        return Full()(q, k, v, **{**options, "summary": None})


@pytest.mark.parametrize("name", [n for n in DECODERS if n not in ("mistral", "deepseek_v3")])
@torch.no_grad()
def test_every_architecture_hands_the_summaries_on(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = _Recorder()
    monkeypatch.setattr("longswift.hf.attention.resolve", lambda module, mechanism: recorder)
    model = build(name)
    model.set_attn_implementation("ms_swift")
    inputs = batch(70, "left")
    options = {"max_new_tokens": 20, "do_sample": False}
    model.generate(**inputs, past_key_values=SwiftCache(model.config), **options)
    decoded = [call for call in recorder.calls if call[0].shape[2] > 70]
    assert decoded
    for k, v, call in decoded:
        summary = call["summary"]
        assert summary is not None and summary.start == (0, 5, 69)
        for row, start in enumerate(summary.start):
            one = slice(row, row + 1)
            expected = KeySummary.build(k[one, :, start:], v[one, :, start:], 16)
            pages = expected.k_min.shape[2]
            assert torch.equal(summary.k_max[one, :, :pages], expected.k_max)
            torch.testing.assert_close(summary.v_sum[one, :, :pages], expected.v_sum)


@torch.no_grad()
def test_where_every_key_is_read_no_summaries_are_kept() -> None:
    model = build("llama")
    for mechanism, kept in ((MSSwift(), False), (SlidingWindow(window=8), False), (SPARSE, True)):
        set_attention(model, mechanism)
        cache = SwiftCache(model.config)
        model.generate(**batch(70, "none"), past_key_values=cache, max_new_tokens=3)
        assert all((len(layer.pages.buffers) > 2) == kept for layer in cache.layers)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize(
    ("name", "search"),
    [("llama", {}), ("gemma3", {}), ("smollm3", {}), ("llama", {"num_beams": 3})],
    ids=["llama", "gemma3", "smollm3", "llama-beams"],
)
def test_sparse_decoding_is_the_same_with_both_caches(
    name: str, search: dict[str, Any], padding: str
) -> None:
    model, inputs = build(name), batch(200, padding)
    set_attention(model, SPARSE)
    options = {"max_new_tokens": 20, "do_sample": False, **search}
    expected = model.generate(
        **inputs, past_key_values=DynamicCache(config=model.config), **options
    )
    got = model.generate(**inputs, past_key_values=SwiftCache(model.config), **options)
    assert torch.equal(got, expected)


def test_gradients_through_the_cache() -> None:
    model, inputs = build("llama"), batch(20, "none")
    grads = []
    for make in (DynamicCache, SwiftCache):
        model.zero_grad()
        cache = make(config=model.config)
        first = model(inputs["input_ids"][:, :12], past_key_values=cache).logits
        second = model(inputs["input_ids"][:, 12:], past_key_values=cache).logits
        (first.logsumexp(-1).sum() + second.logsumexp(-1).sum()).backward()
        grads.append(model.model.layers[0].self_attn.k_proj.weight.grad.clone())
    torch.testing.assert_close(grads[1], grads[0])
