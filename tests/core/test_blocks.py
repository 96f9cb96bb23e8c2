"""Walking over blocks, gathering tokens, reusing buffers."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longswift.core.blocks import (
    TokenTable,
    Workspace,
    block_count,
    block_runs,
    stack_queries,
    unstack_queries,
)


@settings(max_examples=100)
@given(
    q_len=st.integers(0, 80),
    before=st.integers(0, 80),
    block=st.integers(1, 20),
    most=st.integers(1, 5),
)
def test_runs_visit_every_row_once(q_len: int, before: int, block: int, most: int) -> None:
    k_len = q_len + before
    rows, index = [], 0
    for run in block_runs(q_len, k_len, block, most):
        assert run.first == index
        assert run.count <= most
        assert run.position == before + run.row
        for i in range(run.count):
            start = run.position + i * run.rows
            assert start // block == (start + run.rows - 1) // block
            rows += range(start - before, start - before + run.rows)
        index += run.count
    assert rows == list(range(q_len))
    assert index == block_count(q_len, k_len, block)


def test_stacking_is_undone() -> None:
    x = torch.randn(2, 6, 50, 3)
    out = torch.zeros_like(x)
    lse = torch.zeros(2, 6, 50)
    for run in block_runs(50, 57, 8, 3):
        stacked = stack_queries(x, run, 2)
        assert stacked.shape == (2, 2, run.count, 3 * run.rows, 3)
        rows = slice(run.row, run.row + run.count * run.rows)
        out[:, :, rows] = unstack_queries(stacked, run, 6)
        lse[:, :, rows] = unstack_queries(stack_queries(x[..., 0], run, 2), run, 6)
    assert torch.equal(out, x)
    assert torch.equal(lse, x[..., 0])


def test_gather_from_any_layout() -> None:
    base = torch.randn(2, 30, 3, 8)
    layouts = [
        base.transpose(1, 2),
        base.transpose(1, 2).contiguous(),
        base.transpose(1, 2)[:, :, 5:25],
        base.transpose(1, 2)[:, 1:],
        base[..., 2:6].transpose(1, 2),
        base[:1].transpose(1, 2).expand(2, -1, -1, -1),
        base.permute(0, 2, 3, 1),
        base.transpose(1, 2)[:, :, ::3],
    ]
    for x in layouts:
        positions = torch.randint(0, x.shape[2], (*x.shape[:2], 4, 5))
        index = positions.flatten(2).unsqueeze(-1).expand(-1, -1, -1, x.shape[3])
        expected = x.gather(2, index).view(*positions.shape, x.shape[3])
        assert torch.equal(TokenTable(x).gather(positions), expected)
        out = torch.empty(*positions.shape, x.shape[3])
        assert torch.equal(TokenTable(x).gather(positions, out), expected)


def test_workspace_reuses_memory() -> None:
    space = Workspace(torch.device("cpu"))
    first = space.get("a", (4, 8), torch.float32)
    again = space.get("a", (2, 3), torch.float32)
    assert first.data_ptr() == again.data_ptr()
    assert again.shape == (2, 3)
    assert space.get("b", (2, 3), torch.float32).data_ptr() != first.data_ptr()
    assert space.get("a", (9, 9), torch.float32).shape == (9, 9)
    assert space.get("a", (2, 2), torch.float64).dtype == torch.float64
