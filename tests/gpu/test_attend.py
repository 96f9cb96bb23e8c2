"""Triton's attention on a GPU against fp64: every part of a pattern, shape of heads and dtype."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from longswift.kernels import dispatch, reference, triton
from tests.gpu.common import DEVICE, LAYOUTS, Heads, Layout, check, gpu, on_device
from tests.kernels.test_flex import gradients
from tests.kernels.test_patterns import Problem

pytestmark = gpu

HEADS = [
    Heads(dtype=torch.float32, groups=1, dim=64, v_dim=64),
    Heads(dtype=torch.float32, groups=3, dim=80, v_dim=32),
    Heads(dtype=torch.bfloat16, groups=4, dim=64, v_dim=64),
    Heads(dtype=torch.bfloat16, groups=1, dim=128, v_dim=128),
    Heads(dtype=torch.float16, groups=4, dim=128, v_dim=64),
]
# Backward kernels take longer to compile.
TRAINED = [HEADS[1], HEADS[2], HEADS[4]]


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_forward(layout: Layout, heads: Heads) -> None:
    problem = layout.problem(heads)
    right = reference.attend(*problem.tensors, problem.pattern, problem.scale)
    here = on_device(problem, heads.dtype)
    usual, found = (x.attend(*here.tensors, here.pattern, here.scale) for x in (reference, triton))
    assert found.out.dtype == heads.dtype and found.lse.dtype == torch.float32
    for got, plain, exact in zip(found, usual, right, strict=True):
        check(got, plain, exact, heads.dtype)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_bands_that_are_given(layout: Layout) -> None:
    problem = layout.problem(HEADS[2])
    right = reference.attend(*problem.tensors, problem.pattern, problem.scale)
    here = on_device(problem, HEADS[2].dtype)
    usual = reference.attend(*here.tensors, here.pattern, here.scale)
    bands = triton.attend_bands(*here.tensors, here.pattern, here.scale)
    found = triton.attend(*here.tensors, here.pattern, here.scale, bands=bands)
    for got, plain, exact in zip(found, usual, right, strict=True):
        check(got, plain, exact, HEADS[2].dtype)


@pytest.mark.parametrize("heads", TRAINED, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_gradients(layout: Layout, heads: Heads) -> None:
    problem = layout.problem(heads)
    right, usual, found = trained(problem, heads.dtype, triton)
    for got, plain, exact in zip(found, usual, right, strict=True):
        assert got.dtype == heads.dtype
        check(got, plain, exact, heads.dtype)


def test_the_gradient_is_the_same_every_time() -> None:
    problem = on_device(LAYOUTS["by_row"].problem(HEADS[2]), torch.bfloat16)
    weights = torch.ones(1, device=DEVICE)
    for a, b in zip(*(gradients(triton, problem, weights) for _ in range(2)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("asked", ["attend", "attend with a bias", "attend_linear"])
def test_it_is_trusted(asked: str) -> None:
    assert dispatch.disagreement(triton, DEVICE, asked) == ""


def trained(
    problem: Problem, dtype: torch.dtype, backend: ModuleType
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Outputs and gradients: in fp64 on the CPU, by plain torch and by ``backend`` on the GPU."""
    weights = torch.randn(*problem.q.shape[:3], problem.v.shape[3]).to(dtype).double()
    right = gradients(reference, problem, weights)
    here, moved = on_device(problem, dtype), weights.to(DEVICE, dtype)
    return right, gradients(reference, here, moved), gradients(backend, here, moved)
