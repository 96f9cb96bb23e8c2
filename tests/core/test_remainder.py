"""The remainder alone: what every row sees through means, as a part that merges."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from torch import Tensor

from longswift.core.pattern import BlockPattern
from longswift.core.remainder import attend_remainder
from longswift.core.softmax import merge
from longswift.core.summary import KeySummary
from longswift.core.types import Partial
from longswift.kernels import reference
from tests.kernels.test_patterns import CLOSE, Problem, problems


def parts(problem: Problem, summary: KeySummary | None = None) -> Partial:
    """Exact keys and the remainder, computed apart and merged."""
    exact: BlockPattern = replace(problem.pattern, pool=None, pool_grain=1)
    return merge(
        reference.attend(*problem.tensors, exact, problem.scale),
        attend_remainder(*problem.tensors, problem.pattern, problem.scale, summary),
    )


@settings(max_examples=40)
@given(problems())
def test_it_merges_with_the_exact_keys(problem: Problem) -> None:
    assume(problem.pattern.pool is not None)
    whole = reference.attend(*problem.tensors, problem.pattern, problem.scale)
    grain = problem.pattern.pool_grain
    for summary in (None, KeySummary.build(problem.k, problem.v, grain)):
        merged = parts(problem, summary)
        torch.testing.assert_close(merged.out, whole.out, **CLOSE)
        torch.testing.assert_close(merged.lse, whole.lse, **CLOSE)


@settings(max_examples=15)
@given(problems())
def test_runs_of_blocks_change_nothing(problem: Problem) -> None:
    assume(problem.pattern.pool is not None)
    leaves = [x.detach().clone().requires_grad_() for x in problem.tensors]

    def everything() -> list[Tensor]:
        out, lse = attend_remainder(*leaves, problem.pattern, problem.scale)
        loss = out.square().sum() + lse[lse.isfinite()].sum() + 0 * sum(x.sum() for x in leaves)
        return [out, lse, *torch.autograd.grad(loss, leaves)]

    expected = everything()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("longswift.core.remainder._SCORES", 1)
        for a, b in zip(everything(), expected, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)
