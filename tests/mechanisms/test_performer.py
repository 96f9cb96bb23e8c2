"""FAVOR+: what random features estimate, how well, and from which randomness."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from longswift import Full
from longswift.mechanisms.performer import Performer, projection


def error(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("hyperbolic", [False, True])
def test_the_kernel_estimate_is_unbiased(hyperbolic: bool) -> None:
    """With one key, ``exp(lse)`` estimates ``exp(scale q . k)``: within 3 standard errors."""
    q, k, v = (torch.randn(1, 1, 1, 8, dtype=torch.float64) for _ in range(3))
    mechanism = Performer(features=8, hyperbolic=hyperbolic)
    draws = torch.stack([mechanism.redraw(seed)(q, k, v).lse.exp() for seed in range(600)])
    exact = Full()(q, k, v).lse.exp()
    assert (draws.mean() - exact).abs() <= 3 * draws.std() / math.sqrt(len(draws))
    # Otherwise any estimate would do.
    assert draws.std() > 0.05 * exact


def test_hyperbolic_features_lower_the_variance_of_small_scores() -> None:
    q, k, v = (torch.randn(1, 1, 1, 8, dtype=torch.float64) / 3 for _ in range(3))

    def variance(mechanism: Performer) -> float:
        found = [mechanism.redraw(seed)(q, k, v).lse.exp() for seed in range(200)]
        return torch.stack(found).var().item()

    plain = variance(Performer(features=8))
    assert variance(Performer(features=8, hyperbolic=True)) < 0.7 * plain


def on_the_sphere(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """The variance grows with ``exp(scale |q + k|^2)``: bounded, a few features can be judged."""
    q, k, v = (torch.randn(1, 2, n, 8, dtype=torch.float64) for _ in range(3))
    return torch.nn.functional.normalize(q, dim=3), torch.nn.functional.normalize(k, dim=3), v


@pytest.mark.parametrize("causal", [True, False])
def test_the_error_falls_with_the_root_of_the_features(causal: bool) -> None:
    q, k, v = on_the_sphere(128)
    exact = Full()(q, k, v, causal=causal, scale=1.0).out
    counts = [64, 1024]
    errors = []
    for count in counts:
        draws = [Performer(features=count, seed=seed) for seed in range(8)]
        found = [error(p(q, k, v, causal=causal, scale=1.0).out, exact) for p in draws]
        errors.append(sum(found) / len(found))
    slope = math.log(errors[-1] / errors[0]) / math.log(counts[-1] / counts[0])
    assert -0.6 < slope < -0.4


def test_it_beats_uniform_attention_where_attention_is_not_flat() -> None:
    """An epsilon in the features would pull every row to the mean of the values."""
    q, k, v = on_the_sphere(256)
    exact = Full()(q, k, v, causal=False, scale=1.0).out
    uniform = v.mean(2, keepdim=True).expand_as(exact)
    found = Performer(features=1024)(q, k, v, causal=False, scale=1.0).out
    assert error(uniform, exact) > 0.25
    assert error(found, exact) < 0.5 * error(uniform, exact)
    flat = Performer(features=1024)(q, k, v, causal=False, scale=1e-4).out
    torch.testing.assert_close(flat, uniform, atol=1e-2, rtol=0)


def test_padding_is_masked_in_the_features_too() -> None:
    """Masking only the values leaves the features of padding in the normaliser."""
    q, k, v = (torch.randn(1, 1, 64, 16) for _ in range(3))
    mask = torch.arange(64)[None] < 48
    padded = Performer()(q, k, v, causal=False, key_mask=mask).out[:, :, :48]
    alone = Performer()(*(x[:, :, :48] for x in (q, k, v)), causal=False).out
    torch.testing.assert_close(padded, alone)


def test_no_maximum_over_the_future() -> None:
    q, k, v = (torch.randn(1, 1, 80, 16) for _ in range(3))
    before = Performer()(q, k, v).out[:, :, :40]
    for factor in (10.0, 100.0):
        louder = k.clone()
        louder[:, :, 40:] *= factor
        after = Performer()(q, louder, v).out[:, :, :40]
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


def test_directions_are_orthogonal_with_the_lengths_of_normal_vectors() -> None:
    w = projection(40, 16, 0)
    assert w.shape == (40, 16) and w.dtype == torch.float64
    block = torch.nn.functional.normalize(w[:16], dim=1)
    torch.testing.assert_close(block @ block.T, torch.eye(16, dtype=torch.float64))
    lengths = projection(4000, 16, 1).square().sum(1)
    # Chi-squared with 16 degrees of freedom: mean 16, variance 32.
    assert (lengths.mean() - 16).abs() < 3 * math.sqrt(32 / 4000)
    assert 26 < lengths.var() < 38


def test_redrawing_is_a_new_configuration() -> None:
    q, k, v = (torch.randn(1, 1, 30, 8) for _ in range(3))
    first = Performer(features=32)
    other = first.redraw(7)
    assert other == replace(first, seed=7) and first.seed == 0
    assert torch.equal(first.redraw(0)(q, k, v).out, first(q, k, v).out)
    assert not torch.allclose(other(q, k, v).out, first(q, k, v).out)


def test_directions_first_drawn_in_inference_mode_serve_training() -> None:
    projection.cache_clear()
    q, k, v = (torch.randn(1, 1, 30, 8, dtype=torch.float64) for _ in range(3))
    with torch.inference_mode():
        Performer()(q, k, v)
    q.requires_grad_()
    Performer()(q, k, v).out.sum().backward()
    assert q.grad is not None and q.grad.isfinite().all()


@pytest.mark.parametrize("scale", [0.0, -0.2])
def test_any_scale(scale: float) -> None:
    q, k, v = (torch.randn(1, 1, 50, 4, dtype=torch.float64) for _ in range(3))
    exact = Full()(q, k, v, scale=scale)
    found = Performer(features=20_000)(q, k, v, scale=scale)
    assert error(found.out, exact.out) < 0.05
    torch.testing.assert_close(found.lse, exact.lse, rtol=0, atol=0.1)
