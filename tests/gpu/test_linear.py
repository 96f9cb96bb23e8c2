"""Triton's linear attention on a GPU against the quadratic form in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longswift.core.states import LinearState
from longswift.kernels import eager, reference, triton
from tests.gpu.common import DEVICE, check, gpu
from tests.kernels.test_linear import elu1, outcome

pytestmark = gpu

# Dtype, groups, width of keys and of values.
HEADS = [
    (torch.float32, 1, 64, 64),
    (torch.bfloat16, 4, 64, 32),
    (torch.float16, 3, 80, 128),
]
OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True, "chunk": 64},
    "earlier_chunks": {"causal": True, "chunk": 32, "own_chunk": False},
    "bidirectional": {"causal": False},
}


@pytest.mark.parametrize("heads", HEADS, ids=lambda x: f"{str(x[0])[6:]}-{x[1]}x{x[2]}-{x[3]}")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_output_state_and_gradients(options: dict[str, Any], heads: Any) -> None:
    dtype, groups, dim, v_dim = heads
    shapes = (2, 2 * groups, 190, dim), (2, 2, 230, dim), (2, 2, 230, v_dim)
    tensors = [torch.randn(shape).to(dtype).double() for shape in shapes]
    mask = torch.rand(2, 230) < 0.9
    options = {**options, "q_map": elu1, "k_map": elu1}
    weights: list[torch.Tensor] = []
    right = outcome(reference, tensors, {**options, "key_mask": mask}, weights)
    # As their own gradients come: in the dtype of the output, and in that of the sums.
    kinds = dtype, torch.float32, torch.float32, torch.float32
    there = [w.to(DEVICE, kind) for w, kind in zip(weights, kinds, strict=True)]
    here = [x.to(DEVICE, dtype) for x in tensors]
    usual, found = (
        outcome(x, here, {**options, "key_mask": mask.to(DEVICE)}, there) for x in (eager, triton)
    )
    for got, plain, exact in zip(found, usual, right, strict=True):
        assert got.dtype == plain.dtype
        check(got, plain, exact, dtype)


def test_a_carried_state_continues_the_text() -> None:
    q, k, v = (torch.randn(1, h, 200, 64, device=DEVICE) for h in (2, 2, 2))
    options = {"causal": True, "q_map": elu1, "k_map": elu1, "chunk": 64}
    whole = triton.attend_linear(q, k, v, **options)
    state: LinearState | None = None
    for a, b in ((0, 1), (1, 130), (130, 200)):
        part = triton.attend_linear(*(x[:, :, a:b] for x in (q, k, v)), state=state, **options)
        torch.testing.assert_close(part.out, whole.out[:, :, a:b], rtol=1e-4, atol=1e-5)
        state = part.state
    torch.testing.assert_close(state, whole.state, rtol=1e-4, atol=1e-3)
