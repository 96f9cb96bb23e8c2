"""Layouts of blocks, however they are written and whatever they leave out."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longswift import ConfigError, InputError, from_dict
from longswift.mechanisms.block_sparse import BlockSparse
from tests.mechanisms.drawing import Inputs, masked_softmax


@settings(max_examples=60)
@given(
    blocks=st.integers(1, 9),
    block=st.integers(1, 9),
    short=st.integers(0, 8),
    queries=st.integers(1, 81),
    share=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    heads=st.sampled_from([None, 2]),
    causal=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_layout(
    blocks: int,
    block: int,
    short: int,
    queries: int,
    share: float,
    heads: int | None,
    causal: bool,
    seed: int,
) -> None:
    """Rows that see all, rows that see nothing, diagonals with holes: output and gradients."""
    generator = torch.Generator().manual_seed(seed)
    layout = torch.rand(heads or 1, blocks, blocks, generator=generator) < share
    n = max(1, blocks * block - short)
    q_len = min(n, queries) if causal else n
    mechanism = BlockSparse(layout=layout if heads else layout[0], block=block, beyond="refuse")
    position = torch.arange(n)
    expected = layout[:, position[:, None] // block, position // block].expand(2, n, n)
    if causal:
        expected = expected & (position <= position[:, None])
    expected = expected[:, n - q_len :]
    q, k, v = (
        torch.randn(1, h, length, 5, generator=generator, dtype=torch.float64, requires_grad=True)
        for h, length in ((4, q_len), (2, n), (2, n))
    )
    expected = expected.repeat_interleave(2, 0)[None]
    assert torch.equal(mechanism.visible(q, k, causal=causal), expected)
    out, lse, stats = mechanism(q, k, v, causal=causal)
    right, right_lse = masked_softmax(Inputs(q=q, k=k, v=v, causal=causal), expected)
    torch.testing.assert_close(out, right)
    torch.testing.assert_close(lse, right_lse)
    assert stats.keys_per_query == pytest.approx(expected.sum().item() / 4 / q_len)
    some = expected.any(-1)
    weights = torch.randn(out.shape, generator=generator, dtype=out.dtype)
    grads = torch.autograd.grad((out * weights).sum() + lse[some].sum(), (q, k, v))
    loss = (right * weights)[some].sum() + right_lse[some].sum()
    for a, b in zip(grads, torch.autograd.grad(loss, (q, k, v), allow_unused=True), strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b.nan_to_num())


def test_one_layout_in_many_notations() -> None:
    truth = [[True, False, False], [True, True, False], [True, False, True]]
    text = ("x..", "xx.", "x.x")
    for same in (truth, torch.tensor(truth), np.array(truth), list(text), [[1, 0, 0], *truth[1:]]):
        assert BlockSparse(layout=same) == BlockSparse(layout=text)
    by_head = BlockSparse(layout=torch.tensor([truth, truth]))
    assert by_head.layout == (text, text)
    for mechanism in (BlockSparse(layout=text), by_head):
        assert from_dict(json.loads(json.dumps(mechanism.to_dict()))) == mechanism
        assert hash(mechanism) == hash(BlockSparse(layout=mechanism.layout))


def test_beyond_the_layout_its_last_row_goes_on_along_the_diagonal() -> None:
    mechanism = BlockSparse(layout=("x..", "xx.", "x.x"), block=1)
    q = torch.zeros(1, 1, 6, 4)
    expected = [[0], [0, 1], [0, 2], [1, 3], [2, 4], [3, 5]]
    for causal in (True, False):
        seen = mechanism.visible(q, q, causal=causal)[0, 0]
        assert [row.nonzero().flatten().tolist() for row in seen] == expected


def test_a_sequence_too_long_is_refused_on_demand() -> None:
    q = torch.zeros(1, 2, 13, 4)
    mechanism = BlockSparse(layout=("x..", "xx.", "x.x"), block=4, beyond="refuse")
    mechanism(q[:, :, :12], q[:, :, :12], q[:, :, :12])
    with pytest.raises(InputError, match="at most 12 tokens, 3 blocks of 4"):
        mechanism(q, q, q)


def test_layouts_belong_to_kv_heads() -> None:
    q = torch.zeros(1, 3, 4, 4)
    with pytest.raises(InputError, match="one per KV head"):
        BlockSparse(layout=(("x",), ("x",)))(q, q, q)


@pytest.mark.parametrize(
    "layout",
    [None, 3, (), "", [[]], ("x.", "x"), ("x.", "xo"), ("x..", "xx."), [[True], [False]]]
    + [[[[[True]]]], torch.ones(2, 3, dtype=torch.bool), torch.ones(()), ((("x",),),)],
    ids=repr,
)
def test_impossible_layouts_are_named(layout: object) -> None:
    with pytest.raises(ConfigError, match="expected .* got"):
        BlockSparse(layout=layout)


@pytest.mark.parametrize("options", [{"block": 0}, {"beyond": "grow"}], ids=str)
def test_impossible_options_are_named(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="expected .* got"):
        BlockSparse(**options)  # type: ignore[arg-type]
