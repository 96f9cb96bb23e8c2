"""Every registered mechanism on a GPU is itself on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longswift.core.types import AttentionResult
from tests.gpu.common import DEVICE, gpu
from tests.mechanisms.table import CASES, Case

pytestmark = gpu

# By Triton each shape of heads and block size is compiled: one row of the table per mechanism.
FIRST = list({case.name: case for case in reversed(CASES)}.values())


def inputs(case: Case, training: bool) -> list[Tensor]:
    kv_heads = case.kv_heads[-1]
    shapes = (1, 2 * kv_heads, 130, 16), (1, kv_heads, 130, 16), (1, kv_heads, 130, 16)
    return [torch.randn(shape, requires_grad=training) for shape in shapes]


def outcome(
    case: Case, tensors: list[Tensor], causal: bool, training: bool, backend: str
) -> tuple[AttentionResult, list[Tensor]]:
    """The result, and its tensors with the gradients of the inputs, on the CPU."""
    r = case.build()(*tensors, causal=causal, training=training, backend=backend)
    found = [r.out, r.lse]
    if tensors[0].requires_grad:
        found += torch.autograd.grad((r.out**2).sum() + r.lse.sum(), tensors)
    return r, [x.detach().cpu() for x in found]


def same(case: Case, causal: bool, training: bool, backend: str) -> AttentionResult:
    tensors = inputs(case, training)
    here = [x.detach().to(DEVICE).requires_grad_(training) for x in tensors]
    _, expected = outcome(case, tensors, causal, training, "eager")
    r, found = outcome(case, here, causal, training, backend)
    # A choice may fall otherwise in near ties.
    most = 0.05 if case.content else 1e-4
    for got, right in zip(found, expected, strict=True):
        assert got.dtype == right.dtype
        assert (got - right).norm() <= most * right.norm() + 1e-5
    return r


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_in_plain_torch(case: Case) -> None:
    for causal in case.directions:
        for training in case.trainings:
            same(case, causal, training, "eager")


@pytest.mark.parametrize("case", FIRST, ids=lambda case: case.label)
def test_by_default(case: Case) -> None:
    kernels = dict.fromkeys(("efficient", "performer", "nystrom"), "eager")
    r = same(case, case.causal, False, "auto")
    assert r.stats.backend == kernels.get(case.name, "triton")
