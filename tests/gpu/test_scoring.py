"""The selection's first stage on a GPU against plain torch."""

from __future__ import annotations

import pytest
import torch

from longswift.kernels import triton
from tests.gpu.common import DEVICE, gpu

pytestmark = gpu


@pytest.mark.parametrize("lines,width,most", [(70, 300, 24), (6, 1500, 100), (128, 40, 40)])
def test_best_blocks(lines: int, width: int, most: int) -> None:
    """What was chosen ranks as high as what should have been, and ties apart is the same."""
    rows, keys = torch.randn(2, 2, 5, lines, 192) / 3, torch.randn(2, 2, width, 192)
    outside = torch.rand(2, 5, width) < 0.8
    outside[0, 1] = False
    outside[1, 1, 4:] = False
    index, valid = (
        x.cpu() for x in triton.best_blocks(*(x.to(DEVICE) for x in (rows, keys, outside)), 2, most)
    )
    scores = (rows @ keys.unsqueeze(2).transpose(3, 4)).double()
    shares = scores.masked_fill(~outside[:, :, None], -torch.inf).log_softmax(-1)
    rank = shares.amax(3).nan_to_num(nan=-torch.inf).masked_fill(~outside, -torch.inf)
    rank[..., :2] = -torch.inf
    best = rank.topk(most)
    assert torch.equal(valid.sum(-1), best.values.isfinite().sum(-1))
    found = rank.gather(-1, index).masked_fill(~valid, -torch.inf).sort(descending=True).values
    torch.testing.assert_close(found, best.values, rtol=1e-4, atol=1e-4)
    for chosen, real in zip(index.flatten(0, 2), valid.flatten(0, 2), strict=True):
        assert (chosen[real].diff() > 0).all()


def test_ties_go_to_the_earlier_block() -> None:
    rows, keys = torch.zeros(1, 1, 1, 3, 8, device=DEVICE), torch.zeros(1, 1, 30, 8, device=DEVICE)
    candidates = torch.ones(1, 1, 30, dtype=torch.bool, device=DEVICE)
    index, valid = triton.best_blocks(rows, keys, candidates, 4, 6)
    assert valid.all()
    assert index.flatten().tolist() == [4, 5, 6, 7, 8, 9]
