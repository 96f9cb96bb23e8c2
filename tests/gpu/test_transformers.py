"""A small Llama on a GPU through the Transformers plug-in."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.gpu.common import DEVICE, gpu

pytestmark = gpu
hf = pytest.importorskip("transformers", reason="transformers is not installed")
from longswift import MSSwift  # noqa: E402
from longswift.hf import SwiftCache, set_attention  # noqa: E402

SPARSE = MSSwift(windows=(32, 64), key_tokens=16, block=32, remainder=32, dense_below=64)


@functools.cache
def llama() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = hf.LlamaConfig(
            vocab_size=97,
            hidden_size=128,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=512,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=None,
            initializer_range=0.2,
        )
        return hf.LlamaForCausalLM(config).eval().to(DEVICE)


def tokens(length: int) -> Tensor:
    return torch.randint(3, 97, (2, length)).to(DEVICE)


def logits(mechanism: str | MSSwift, **inputs: Tensor) -> Tensor:
    model = llama()
    if mechanism == "sdpa":
        model.config._attn_implementation = "sdpa"
    else:
        set_attention(model, mechanism)
    return model(**inputs).logits


@pytest.mark.parametrize("mechanism", ["full", MSSwift()], ids=["full", "ms_swift"])
@pytest.mark.parametrize("padded", [0, 9])
@torch.no_grad()
def test_logits_are_those_of_sdpa(mechanism: str | MSSwift, padded: int) -> None:
    ids = tokens(120)
    mask = torch.ones_like(ids)
    mask[1, :padded] = 0
    expected = logits("sdpa", input_ids=ids, attention_mask=mask)[mask.bool()]
    got = logits(mechanism, input_ids=ids, attention_mask=mask)[mask.bool()]
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_logits_in_bfloat16() -> None:
    model, ids = llama().bfloat16(), tokens(120)
    try:
        expected, got = (logits(x, input_ids=ids).float() for x in ("sdpa", "full"))
    finally:
        model.float()
    assert (got - expected).norm() / expected.norm() < 3e-2


@pytest.mark.parametrize("cache", [None, SwiftCache])
def test_generation(cache: Any) -> None:
    """Prompts beyond the crossover; below it the tokens are those of SDPA."""
    model = llama()
    options = {"do_sample": False, "max_new_tokens": 12}
    short, long = tokens(40), tokens(300)
    model.config._attn_implementation = "sdpa"
    expected = model.generate(short, **options)
    set_attention(model, SPARSE)
    caches = [{} if cache is None else {"past_key_values": cache(model.config)} for _ in range(2)]
    assert torch.equal(model.generate(short, **options, **caches[0]), expected)
    written = model.generate(long, **options, **caches[1])
    assert written.shape == (2, 312) and torch.equal(written[:, :300], long)


def test_gradients() -> None:
    model, ids = llama(), tokens(200)
    set_attention(model, SPARSE)
    model.train()
    try:
        model(ids, labels=ids, use_cache=False).loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    finally:
        model.eval().zero_grad()
