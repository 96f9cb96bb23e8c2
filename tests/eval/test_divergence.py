"""Divergence in blocks equals the direct computation over all positions."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from longswift import MSSwift
from longswift.eval.divergence import divergence, last_states
from longswift.eval.models import load


def test_divergence_is_the_dense_one(model_directory: Path) -> None:
    loaded = load(str(model_directory))
    ids = torch.randint(2, 512, (330,)).tolist()
    sparse = MSSwift(
        windows=(32, 64), sinks=0, key_tokens=0, remainder=None, block=32, dense_below=0
    )
    states, logits = [], []
    for mechanism in (None, sparse):
        loaded.use(mechanism)
        states.append(last_states(loaded, ids, chunk=64))
        with torch.inference_mode():
            logits.append(loaded.model(torch.tensor([ids])).logits[0, :-1].double())
    told = divergence(loaded, ids, *states)
    p, q = (x.log_softmax(-1) for x in logits)
    assert told.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), abs=1e-6)
    assert told.kl > 1e-5
    assert told.top1 == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    nll = [torch.nn.functional.nll_loss(x, torch.tensor(ids[1:])).item() for x in (p, q)]
    assert told.perplexity == pytest.approx(math.exp(nll[1]), rel=1e-4)
    assert told.perplexity_ratio == pytest.approx(math.exp(nll[1] - nll[0]), rel=1e-4)
    same = divergence(loaded, ids, states[0], states[0])
    assert (same.kl, same.top1, same.perplexity_ratio) == (0, 1, 1)
