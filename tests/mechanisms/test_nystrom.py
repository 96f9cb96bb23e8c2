"""Nystrom attention where the exact answer is known, and what public versions got wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from longswift import ConfigError, Full, UnsupportedError, get_mechanism
from longswift.kernels.eager.landmarks import pseudo_inverse, segment_means
from longswift.mechanisms.nystrom import Nystrom


def draw(n: int, batch: int = 2, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(batch, 4, n, 8, **options)
    k, v = (torch.randn(batch, 2, n, 8, **options) for _ in range(2))
    return q, k, v


def test_every_token_a_landmark_is_softmax_attention() -> None:
    q, k, v = draw(24, dtype=torch.float64)
    exact = Full()(q, k, v, causal=False, scale=1.0).out
    found = Nystrom(landmarks=24, iterations=None)(q, k, v, causal=False, scale=1.0).out
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)
    # The iteration gets there too, in the end, but not in six steps.
    errors = [
        (Nystrom(landmarks=24, iterations=i)(q, k, v, causal=False, scale=1.0).out - exact).norm()
        for i in (6, 40)
    ]
    assert errors[1] < 1e-6 * exact.norm() < errors[0]


def test_segments_of_equal_tokens_are_softmax_attention() -> None:
    q, k, v = draw(8, dtype=torch.float64)
    q, k = (x.repeat_interleave(5, 2) for x in (q, k))
    v = torch.randn(2, 2, 40, 8, dtype=torch.float64)
    exact = Full()(q, k, v, causal=False, scale=1.0).out
    found = Nystrom(landmarks=8, iterations=None)(q, k, v, causal=False, scale=1.0).out
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)


def test_no_causal_form() -> None:
    with pytest.raises(UnsupportedError, match="nystrom"):
        Nystrom()(*draw(10), causal=True)


@pytest.mark.parametrize("iterations", [6, None])
def test_an_outlier_in_the_batch_changes_no_other_row(iterations: int | None) -> None:
    """The start of the iteration must not take a maximum over batch and heads."""
    q, k, v = draw(100)
    mechanism = Nystrom(landmarks=16, iterations=iterations)
    alone = mechanism(q[:1], k[:1], v[:1], causal=False).out
    q[1], k[1, 1] = q[1] * 30, k[1, 1] * 30
    together = mechanism(q, k, v, causal=False).out
    torch.testing.assert_close(together[:1], alone)


@pytest.mark.parametrize("n", [1, 5, 32, 33, 63, 64, 65, 100])
def test_any_length_and_any_padding(n: int) -> None:
    """Lengths unlike the number of landmarks; padding enters no segment mean."""
    q, k, v = draw(n + 7, batch=1)
    mechanism = Nystrom(landmarks=32)
    real = torch.arange(n + 7)[None] >= 7
    padded = mechanism(q, k, v, causal=False, key_mask=real).out[:, :, 7:]
    alone = mechanism(*(x[:, :, 7:] for x in (q, k, v)), causal=False).out
    torch.testing.assert_close(padded, alone)


def test_segments_are_as_equal_as_can_be() -> None:
    x = torch.arange(10.0).view(1, 1, 10, 1)
    assert segment_means(x, 4).flatten().tolist() == [1.0, 3.5, 6.0, 8.5]
    assert torch.equal(segment_means(x, 64), x)


def test_the_iteration_finds_the_inverse_of_each_matrix() -> None:
    a = torch.randn(3, 2, 6, 6, dtype=torch.float64).mul(2).softmax(-1)
    a[1] *= 1000
    exact = torch.linalg.inv(a)
    torch.testing.assert_close(pseudo_inverse(a, 30), exact, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(pseudo_inverse(a, None), exact)


@pytest.mark.parametrize("config", [{"landmarks": 0}, {"iterations": 0}, {"iterations": 2.5}])
def test_impossible_options_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        get_mechanism("nystrom", **config)
