"""Rectangles cover each band exactly once, in the forward and in the backward pass."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longswift.core import rectangles as geometry
from longswift.core.pattern import Band, BlockPattern
from longswift.core.rectangles import Job
from longswift.kernels.eager import band_gradients


@st.composite
def calls(draw: st.DrawFn) -> tuple[Band, int, int, bool]:
    causal = draw(st.booleans())
    k_len = draw(st.integers(1, 100))
    q_len = draw(st.integers(1, k_len)) if causal else k_len
    reach = draw(st.none() | st.tuples(st.integers(0, 30), st.integers(0, 30)))
    if causal and reach is not None:
        reach = (reach[0], 0)
    return (
        Band(
            tile=draw(st.integers(1, 40)),
            left=draw(st.integers(0, 50)),
            right=0 if causal else draw(st.integers(0, 50)),
            reach=reach,
        ),
        q_len,
        k_len,
        causal,
    )


def painted(jobs: list[Job], band: Band, q_len: int, k_len: int, causal: bool) -> torch.Tensor:
    """How often each pair of query and key is computed."""
    count = torch.zeros(q_len, k_len, dtype=torch.int64)
    for job in jobs:
        allowed = geometry.allowed_mask(job, band, causal, torch.device("cpu"))
        for i in range(job.count):
            row, key = job.row + i * job.step, job.key + i * job.step
            tile = torch.ones(job.rows, job.width, dtype=torch.int64)
            count[row : row + job.rows, key : key + job.width] += (
                tile if allowed is None else allowed.long()
            )
    return count


@settings(max_examples=150)
@given(calls())
def test_every_pair_once(call: tuple[Band, int, int, bool]) -> None:
    band, q_len, k_len, causal = call
    pattern = BlockPattern(causal=causal, bands=(band,))
    expected = pattern.visible(q_len, k_len, 1, torch.device("cpu"))[0, 0].long()
    jobs = list(geometry.jobs(band, q_len, k_len, causal))
    assert torch.equal(painted(jobs, band, q_len, k_len, causal), expected)
    backward = list(band_gradients.gradient_jobs(iter(jobs), causal))
    assert torch.equal(painted(backward, band, q_len, k_len, causal), expected)


@settings(max_examples=150)
@given(calls())
def test_added_scores_hide_what_is_not_allowed(call: tuple[Band, int, int, bool]) -> None:
    band, q_len, k_len, causal = call
    cpu = torch.device("cpu")
    for job in geometry.by_rows(geometry.jobs(band, q_len, k_len, causal), 7, causal):
        scores = torch.zeros(job.rows, job.width, dtype=torch.float64)
        for first, bias in geometry.hidden_scores(job, band, causal, torch.float64, cpu):
            scores[:, first : first + bias.shape[1]] += bias
        allowed = geometry.allowed_mask(job, band, causal, cpu)
        expected = torch.ones_like(scores, dtype=torch.bool) if allowed is None else allowed
        assert torch.equal(scores == 0, expected)


def test_congruent_tiles_share_a_job() -> None:
    found = list(geometry.jobs(Band(tile=64, left=64), 64 * 100, 64 * 100, True))
    assert [job.count for job in found] == [1, 99]
