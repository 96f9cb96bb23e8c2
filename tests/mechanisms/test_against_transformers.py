"""Transformers' own Longformer and BigBird with the same weights: equal where they are right."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import BigBirdConfig, BigBirdModel, LongformerConfig
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from longswift.mechanisms.bigbird import BigBird
from longswift.mechanisms.longformer import Longformer, attend_with_global_projections

HEADS, WIDTH = 3, 24


def split(layer: nn.Module, hidden: Tensor, suffix: str = "") -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v ``[B, H, L, D]`` by the layer's own projections."""
    q, k, v = (
        getattr(layer, name + suffix)(hidden).unflatten(2, (HEADS, -1)).transpose(1, 2)
        for name in ("query", "key", "value")
    )
    return q, k, v


@pytest.mark.parametrize("positions", [(), (0,), (0, 1, 2, 29), (11, 40)])
@pytest.mark.parametrize("padding", [0, 13])
def test_longformer(positions: tuple[int, ...], padding: int) -> None:
    """Separate global projections, padded rows; output and gradients to rounding."""
    config = LongformerConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_hidden_layers=1,
        attention_window=[8],
        attention_probs_dropout_prob=0.0,
    )
    layer = LongformerSelfAttention(config, layer_id=0).eval()
    hidden = torch.randn(2, 48, WIDTH, requires_grad=True)
    real = torch.ones(2, 48, dtype=torch.bool)
    if padding:
        real[1, -padding:] = False
    is_global = torch.zeros_like(real)
    is_global[:, list(positions)] = True
    is_global &= real
    theirs = layer(
        hidden,
        attention_mask=torch.where(real, 0.0, -10000.0) + 10000.0 * is_global,
        is_index_masked=~real,
        is_index_global_attn=is_global,
        is_global_attn=bool(is_global.any()),
    )[0]
    mechanism = Longformer(left=4, right=4, global_tokens=0, global_positions=positions)
    local, projected = split(layer, hidden), split(layer, hidden, "_global")
    ours = attend_with_global_projections(mechanism, local, projected, key_mask=real)
    out = ours.out.transpose(1, 2).flatten(2)
    torch.testing.assert_close(out, theirs, rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(out) * real[..., None]
    grads = [torch.autograd.grad((x * weights).sum(), hidden)[0] for x in (out, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


BLOCK, BLOCKS, RANDOM = 4, 14, 2


@pytest.fixture
def numpy_state() -> Iterator[None]:
    """Their training mode seeds NumPy's global generator."""
    state = np.random.get_state()
    yield
    np.random.set_state(state)


def bigbird_layer() -> BigBirdBlockSparseAttention:
    config = BigBirdConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        block_size=BLOCK,
        num_random_blocks=RANDOM,
        max_position_embeddings=256,
    )
    return BigBirdBlockSparseAttention(config, seed=0)


def run_theirs(layer: BigBirdBlockSparseAttention, hidden: Tensor) -> Tensor:
    mask = torch.ones(hidden.shape[:2])
    blocked, band, rows, columns = BigBirdModel.create_masks_for_block_sparse_attn(mask, BLOCK)
    return layer(hidden, band, rows, columns, blocked, blocked)[0]


def counted(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, times: Tensor) -> Tensor:
    """Dense attention in which query ``i`` counts key ``j`` ``times[i, j]`` times."""
    scores = q @ k.transpose(2, 3) * q.shape[3] ** -0.5 + times.log()
    return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v


def test_bigbird_with_the_same_random_blocks(numpy_state: None) -> None:
    """In training they do draw random blocks; handed ours, their output is ours."""
    layer = bigbird_layer().train()
    mechanism = BigBird(block=BLOCK, random_blocks=RANDOM, last_global_blocks=1, seed=3)
    n = BLOCK * BLOCKS
    random = mechanism.key_blocks(n, n, HEADS, causal=False)[:, 1:-1, -RANDOM:]
    layer._bigbird_block_rand_mask_with_head = lambda **_: list(random.numpy())
    hidden = torch.randn(2, n, WIDTH)
    ours = mechanism(*split(layer, hidden), causal=False).out.transpose(1, 2).flatten(2)
    torch.testing.assert_close(ours, run_theirs(layer, hidden), rtol=1e-5, atol=1e-5)


def test_bigbird_in_evaluation_counts_the_first_block_again_for_every_random_one() -> None:
    """Their evaluation has no random blocks; ours is what it is in training."""
    layer = bigbird_layer().eval()
    n = BLOCK * BLOCKS
    hidden = torch.randn(2, n, WIDTH) * 2
    theirs = run_theirs(layer, hidden)
    q, k, v = split(layer, hidden)
    fixed = BigBird(block=BLOCK, random_blocks=0, last_global_blocks=1)
    times = torch.ones(n, n)
    times[BLOCK:-BLOCK, :BLOCK] = 1 + RANDOM
    defect = counted(q, k, v, fixed.visible(q, k, causal=False), times)
    torch.testing.assert_close(defect.transpose(1, 2).flatten(2), theirs, rtol=1e-5, atol=1e-5)
    for random in (0, RANDOM):
        ours = BigBird(block=BLOCK, random_blocks=random, last_global_blocks=1)
        out = ours(q, k, v, causal=False).out.transpose(1, 2).flatten(2)
        assert (out - theirs)[:, BLOCK:-BLOCK].abs().max() > 1e-3
        torch.testing.assert_close(out[:, :BLOCK], theirs[:, :BLOCK], rtol=1e-5, atol=1e-5)
