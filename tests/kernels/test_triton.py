"""Triton kernels in Triton's interpreter (on a GPU where there is one), against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from longswift import Full, MSSwift, SlidingWindow, UnsupportedError
from longswift.kernels import reference, triton
from tests.kernels.test_flex import gradients
from tests.kernels.test_patterns import CLOSE, Problem, gathered, problems

pytest.importorskip("triton", reason="triton is not installed")


@settings(max_examples=12)
@given(problems(longest=60))
def test_forward(problem: Problem) -> None:
    slow = reference.attend(*problem.tensors, problem.pattern, problem.scale)
    fast = triton.attend(*problem.tensors, problem.pattern, problem.scale)
    torch.testing.assert_close(fast.out, slow.out, **CLOSE)
    torch.testing.assert_close(fast.lse, slow.lse, **CLOSE)
    bands = triton.attend_bands(*problem.tensors, problem.pattern, problem.scale)
    given_bands = triton.attend(*problem.tensors, problem.pattern, problem.scale, bands=bands)
    torch.testing.assert_close(given_bands.out, slow.out, **CLOSE)


@settings(max_examples=12)
@given(problems(longest=60))
def test_gradients(problem: Problem) -> None:
    weights = torch.randn(*problem.q.shape[:3], problem.v.shape[3], dtype=torch.float64)
    expected = gradients(reference, problem, weights)
    for fast, slow in zip(gradients(triton, problem, weights), expected, strict=True):
        torch.testing.assert_close(fast, slow, **CLOSE)
