"""Patterns that do not depend on content, inside a model: token by token as in one call."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longswift import get_mechanism
from longswift.hf import SwiftCache, set_attention
from tests.hf.models import batch, build

SMALL: dict[str, dict[str, Any]] = {
    "sliding_window": {"window": 9, "global_tokens": 2},
    "longformer": {"left": 7, "global_positions": (12, 30)},
    "bigbird": {"block": 4, "random_blocks": 2},
    "bigbird_tokens": {"window": 5, "global_tokens": 1},
    "block_sparse": {"block": 4},
    "dilated_window": {"window": 4, "dilation": 3},
    "chunked": {"chunk": 8, "overlap": 3},
    "hierarchical": {"chunk": 16},
}


@pytest.mark.parametrize("keeps_pages", [False, True])
@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_decoding_padded_rows_is_the_whole_text(name: str, keeps_pages: bool) -> None:
    model, inputs = build("llama"), batch(60, "left")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    position = (mask.cumsum(1) - 1).clamp(min=0)
    exact = model(ids, attention_mask=mask, position_ids=position).logits
    set_attention(model, get_mechanism(name, **SMALL[name]))
    whole = model(ids, attention_mask=mask, position_ids=position, use_cache=False).logits
    cache = SwiftCache(model.config) if keeps_pages else None
    parts, start = [], 0
    for end in (41, 50, *range(51, 61)):
        out = model(
            ids[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=position[:, start:end],
            past_key_values=cache,
            use_cache=True,
        )
        parts.append(out.logits)
        cache, start = out.past_key_values, end
    real = mask.bool()
    torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real], rtol=1e-3, atol=1e-4)
    assert (whole - exact)[real].abs().max() > 1e-3
