"""FlexAttention, compiled, on a GPU against fp64. Few shapes of heads: each takes seconds."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from longswift.kernels import dispatch, flex, reference
from tests.gpu.common import DEVICE, Heads, Layout, check, gpu, on_device
from tests.gpu.test_attend import trained

pytestmark = gpu

HEADS = Heads(dtype=torch.bfloat16, groups=4, dim=64, v_dim=64)
WIDE = Heads(dtype=torch.float16, groups=3, dim=80, v_dim=128)


@pytest.fixture
def poison() -> None:
    """No memory is poisoned: the compiler makes tensors of its own."""


def test_forward_and_gradients_are_compiled_once() -> None:
    """For one shape of heads, whatever the lengths and the tokens gathered."""
    compiled = []
    for layout in (
        Layout(q_len=201, k_len=333, slots=40, pool=32),
        Layout(q_len=300, k_len=300, slots=24, by_row=True),
        Layout(q_len=450, k_len=450, slots=30, causal=False),
    ):
        right, usual, found = trained(layout.problem(HEADS), HEADS.dtype, flex)
        for got, plain, exact in zip(found, usual, right, strict=True):
            check(got, plain, exact, HEADS.dtype, times=4)
        compiled.append(counters["stats"]["unique_graphs"])
    assert compiled[1] == compiled[0] == compiled[2]


@pytest.mark.parametrize(
    "layout", [Layout(q_len=1, k_len=290, slots=20, pool=32), Layout(q_len=70, k_len=90)]
)
def test_short_queries(layout: Layout) -> None:
    problem = layout.problem(WIDE)
    right = reference.attend(*problem.tensors, problem.pattern, problem.scale)
    here = on_device(problem, WIDE.dtype)
    usual, found = (x.attend(*here.tensors, here.pattern, here.scale) for x in (reference, flex))
    for got, plain, exact in zip(found, usual, right, strict=True):
        check(got, plain, exact, WIDE.dtype, times=4)


@pytest.mark.slow
def test_it_is_trusted() -> None:
    assert dispatch.disagreement(flex, DEVICE, "attend") == ""
