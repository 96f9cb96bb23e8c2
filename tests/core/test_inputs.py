"""Bad input: one clear error each, before anything is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longswift import Full, InputError, MSSwift, SlidingWindow, UnsupportedError
from longswift.core.inputs import check_finite, split_padding

GOOD = torch.zeros(2, 4, 6, 8)

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "list": ({"q": [[1.0]]}, "4-D tensor"),
    "none": ({"v": None}, "4-D tensor"),
    "three_dims": ({"k": GOOD[0]}, "4-D tensor"),
    "five_dims": ({"q": GOOD[None]}, "4-D tensor"),
    "integers": ({"q": GOOD.long()}, "floating dtype"),
    "complex": ({"v": GOOD.to(torch.complex64)}, "floating dtype"),
    "sparse": ({"k": GOOD.to_sparse()}, "a dense tensor, got"),
    "no_values": (dict.fromkeys("qkv", GOOD.to("meta")), "tensors with values"),
    "no_channels": ({"q": GOOD[..., :0], "k": GOOD[..., :0]}, "one channel wide"),
    "no_value_channels": ({"v": GOOD[..., :0]}, "v: expected heads at least one channel wide"),
    "mixed_dtypes": ({"k": GOOD.half()}, "one dtype"),
    "mixed_devices": ({"k": GOOD.to("meta")}, "one device"),
    "batch": ({"q": GOOD[:1]}, "q \\[B, Hq, Lq, D\\]"),
    "head_dim": ({"q": GOOD[..., :4]}, "q \\[B, Hq, Lq, D\\]"),
    "key_length": ({"v": GOOD[:, :, :4]}, "v \\[B, Hkv, Lk, Dv\\]"),
    "heads": ({"q": GOOD[:, :3]}, "multiple of key/value heads"),
    "no_kv_heads": ({"k": GOOD[:, :0], "v": GOOD[:, :0]}, "multiple of key/value heads"),
    "more_queries": ({"k": GOOD[:, :, :4], "v": GOOD[:, :, :4]}, "Lq <= Lk"),
    "mask_dtype": ({"key_mask": torch.ones(2, 6)}, "bool tensor"),
    "mask_shape": ({"key_mask": torch.ones(2, 5, dtype=torch.bool)}, "bool tensor"),
    "mask_4d": ({"key_mask": torch.ones(2, 1, 6, 6, dtype=torch.bool)}, "bool tensor"),
    "mask_type": ({"key_mask": [[True] * 6] * 2}, "bool tensor"),
    "nan_q": ({"q": GOOD.clone().fill_(float("nan"))}, "q: expected finite"),
    "nan_k": ({"k": torch.full_like(GOOD, float("nan"))}, "k: expected finite"),
    "inf_v": ({"v": torch.full_like(GOOD, float("inf"))}, "v: expected finite"),
    "opposite_infinities": (
        {"k": torch.tensor([float("inf"), float("-inf")]).repeat(2, 4, 6, 4)},
        "k: expected finite",
    ),
    "scale_nan": ({"scale": float("nan")}, "scale"),
    "scale_text": ({"scale": "half"}, "scale"),
    "scale_infinite": ({"scale": float("inf")}, "scale"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("mechanism", [Full(), SlidingWindow(), MSSwift()], ids=lambda m: m.name)
def test_bad_input(mechanism: Any, name: str) -> None:
    changes, message = BAD[name]
    call = {"q": GOOD, "k": GOOD, "v": GOOD, **changes}
    with pytest.raises(InputError, match=message) as caught:
        mechanism(call.pop("q"), call.pop("k"), call.pop("v"), **call)
    assert "\n" not in str(caught.value)
    assert "expected" in str(caught.value)


@pytest.mark.parametrize("mechanism", [Full(), SlidingWindow(window=9), MSSwift()])
@pytest.mark.parametrize("scale", [0.0, -0.5, 1])
@pytest.mark.parametrize("causal", [True, False])
def test_any_finite_scale(mechanism: Any, scale: float, causal: bool) -> None:
    q, k, v = torch.randn(3, 1, 2, 40, 8)
    r = mechanism(q, k, v, scale=scale, causal=causal)
    expected = mechanism.reference(q, k, v, scale=scale, causal=causal)
    torch.testing.assert_close(r.out, expected.out)
    torch.testing.assert_close(r.lse, expected.lse)


def test_errors_are_value_errors() -> None:
    with pytest.raises(ValueError, match="expected"):
        Full()(GOOD, GOOD[0], GOOD)


@pytest.mark.parametrize("mechanism", [SlidingWindow(), MSSwift()], ids=lambda m: m.name)
def test_windows_need_aligned_positions(mechanism: Any) -> None:
    with pytest.raises(UnsupportedError, match="Lq == Lk"):
        mechanism(GOOD[:, :, :3], GOOD, GOOD, causal=False)
    with pytest.raises(UnsupportedError, match="Lq == Lk"):
        mechanism.visible(GOOD[:, :, :3], GOOD, causal=False)


def test_cross_attention_is_full() -> None:
    q, k, v = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    out = Full()(q, k, v, causal=False).out
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("mechanism", [Full(), SlidingWindow(), MSSwift()], ids=lambda m: m.name)
@pytest.mark.parametrize("batch,queries,keys", [(0, 4, 4), (2, 0, 0), (2, 0, 5), (0, 0, 0)])
def test_nothing_in_nothing_out(mechanism: Any, batch: int, queries: int, keys: int) -> None:
    q, k = torch.randn(batch, 4, queries, 8), torch.randn(batch, 2, keys, 8)
    r = mechanism(q, k, k)
    assert r.out.shape == (batch, 4, queries, 8)
    assert r.lse.shape == (batch, 4, queries)
    mask = torch.ones(batch, keys, dtype=torch.bool)
    assert mechanism(q, k, k, key_mask=mask).out.shape == (batch, 4, queries, 8)
    assert mechanism.visible(q, k).shape == (batch, 4, queries, keys)


def test_finite_values_whose_sum_overflows_are_fine() -> None:
    check_finite(k=torch.full((1, 1, 4, 4), 3e38), h=torch.full((64,), 6e4, dtype=torch.half))


def test_split_padding_groups_equal_rows() -> None:
    mask = torch.tensor(
        [[0, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1], [1, 0, 0, 1], [0, 0, 0, 0]], dtype=torch.bool
    )
    groups = split_padding(mask, 2, 4, aligned=True)
    assert [g.rows for g in groups] == [[0, 2], [1], [3], [4]]
    assert groups[0].keys == slice(1, 4)
    assert groups[0].queries == slice(0, 2)
    assert groups[1].keys == slice(0, 4)
    assert isinstance(groups[2].keys, torch.Tensor)
    assert groups[2].keys.tolist() == [0, 3]
    assert groups[2].queries == slice(1, 2)
    assert groups[3].keys == slice(0, 0)
    assert groups[3].queries == slice(0, 0)
    assert split_padding(mask, 2, 4, aligned=False)[0].queries == slice(0, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_batch_of_padding_alone_gives_zeros_however_large_its_values(dtype: torch.dtype) -> None:
    """A 16-bit sum of these values overflows."""
    x = torch.full((2, 1, 64, 2048), 100.0, dtype=dtype, requires_grad=True)
    out = Full()(x, x, x, key_mask=torch.zeros(2, 64, dtype=torch.bool)).out
    out.sum().backward()
    assert x.grad is not None
    for found in (out, x.grad):
        assert torch.equal(found, torch.zeros_like(found))
