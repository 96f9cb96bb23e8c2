"""MS-SWIFT on a GPU: the choice of the CPU, exact where it covers everything, causal."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from longswift import Full, MSSwift
from tests.gpu.common import DEVICE, FLOORS, gpu

pytestmark = gpu

SMALL = MSSwift(windows=(32, 64, 128), block=32, dense_below=64, key_tokens=32, remainder=32)
MECHANISMS = [SMALL, replace(SMALL, selector="bounds")]
mechanisms = pytest.mark.parametrize("swift", MECHANISMS, ids=("centroids", "bounds"))
LENGTH = 500


def tensors(
    q_len: int = LENGTH, batch: int = 2, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """q, k, v on the CPU, a head per scale; keys in clusters, so that there is a choice to make."""
    centres = 2 * torch.randn(12, 64)
    which = torch.randint(12, (batch, 3, LENGTH))
    q = torch.randn(batch, 6, q_len, 64) + centres[torch.randint(12, (batch, 6, q_len))] / 2
    k = torch.randn(batch, 3, LENGTH, 64) + centres[which]
    return [x.to(dtype) for x in (q, k, torch.randn(batch, 3, LENGTH, 64))]


def to_device(*xs: Tensor) -> list[Tensor]:
    return [x.to(DEVICE) for x in xs]


def error(found: Tensor, right: Tensor) -> float:
    return float((found.detach().double().cpu() - right.double()).norm() / right.double().norm())


@mechanisms
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("q_len", [LENGTH, 1])
def test_the_choice_is_that_of_the_cpu(swift: MSSwift, training: bool, q_len: int) -> None:
    """Up to near ties; rows with equal choices have equal outputs."""
    q, k, v = tensors(q_len)
    expected = swift.visible(q, k, training=training)
    seen = swift.visible(*to_device(q, k), training=training).cpu()
    unlike = (seen ^ expected).sum() / 2
    assert unlike <= 0.05 * 32 * seen.shape[:3].numel()
    slow = swift(q, k, v, training=training, backend="eager")
    fast = swift(*to_device(q, k, v), training=training, backend="triton")
    same = (seen == expected).all(-1)
    assert same.float().mean() > 0.5
    torch.testing.assert_close(fast.out.cpu()[same], slow.out[same], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(fast.lse.cpu()[same], slow.lse[same], rtol=1e-3, atol=1e-4)


@mechanisms
@pytest.mark.parametrize("dtype", FLOORS, ids=str)
def test_it_misses_no_more_than_on_the_cpu(swift: MSSwift, dtype: torch.dtype) -> None:
    q, k, v = tensors(dtype=dtype)
    exact = Full()(*(x.double() for x in (q, k, v)), backend="reference").out
    here = to_device(q, k, v)
    missed = error(swift(q.float(), k.float(), v.float(), backend="eager").out, exact)
    assert error(swift(*here, backend="triton").out, exact) <= 1.02 * missed + FLOORS[dtype]
    everything = replace(swift, key_tokens=LENGTH)
    # As exact as the dtype is: what is rounded at last has half a unit in the last place.
    rounding = 2 * torch.finfo(dtype).eps + FLOORS[dtype]
    assert error(everything(*here, backend="triton").out, exact) <= rounding
    assert error(Full()(*here, backend="triton").out, exact) <= rounding


@mechanisms
@pytest.mark.parametrize("training", [False, True])
def test_nothing_before_a_token_moves(swift: MSSwift, training: bool) -> None:
    """Before its block while not training, before the token itself while training."""
    before = to_device(*tensors())
    after = [x.clone() for x in before]
    moved = 333
    for x in after:
        x[:, :, moved] = 3 * torch.randn_like(x[:, :, moved])
    still = moved if training else moved // swift.block * swift.block
    a, b = (swift(*x, training=training, backend="triton").out for x in (before, after))
    torch.testing.assert_close(a[:, :, :still], b[:, :, :still], rtol=1e-5, atol=1e-6)
    assert not torch.equal(a[:, :, moved], b[:, :, moved])


@mechanisms
def test_rows_of_a_batch_padded_or_not_are_themselves(swift: MSSwift) -> None:
    """Up to near ties, for which rows of other shapes of a product may be rounded otherwise."""
    q, k, v = to_device(*tensors(batch=3))
    together = swift(q, k, v, backend="triton").out
    mask = torch.arange(LENGTH, device=DEVICE) >= torch.tensor([[0], [57], [200]], device=DEVICE)
    padded = swift(q, k, v, key_mask=mask, backend="triton").out
    for row, start in enumerate((0, 57, 200)):
        own = [x[row : row + 1] for x in (q, k, v)]
        near(together[row], swift(*own, backend="triton").out[0])
        real = [x[:, :, start:] for x in own]
        near(padded[row, :, start:], swift(*real, backend="triton").out[0])
        assert not padded[row, :, :start].any()


def near(found: Tensor, expected: Tensor) -> None:
    equal = ((found - expected).abs() <= 1e-4 + 1e-3 * expected.abs()).all(-1)
    assert equal.float().mean() >= 0.98


@mechanisms
def test_gradients(swift: MSSwift) -> None:
    """Of the same mechanism, whose choice may differ in near ties."""
    leaves = [x.requires_grad_() for x in tensors(batch=1)]
    here = [x.detach().to(DEVICE).requires_grad_() for x in leaves]
    weights = torch.randn(1, 6, LENGTH, 64)
    slow = torch.autograd.grad((swift(*leaves, backend="eager").out * weights).sum(), leaves)
    fast = swift(*here, backend="triton")
    fast_grads = torch.autograd.grad((fast.out * weights.to(DEVICE)).sum(), here)
    for got, expected in zip(fast_grads, slow, strict=True):
        assert error(got, expected) < 0.05


def test_the_default_is_triton_and_dense_below_its_crossover() -> None:
    q, k, v = tensors()
    r = MSSwift()(*to_device(q, k, v))
    assert r.stats.backend == "triton" and r.stats.mode == "dense"
    exact = Full()(*(x.double() for x in (q, k, v)), backend="reference").out
    assert error(r.out, exact) < 1e-5


def test_a_single_query_reads_everything_by_default() -> None:
    """Beyond the crossover, too, where a choice would be launched in more time than keys take."""
    shapes = (1, 4, 1, 64), (1, 2, 17_000, 64), (1, 2, 17_000, 64)
    inputs = [torch.randn(shape) for shape in shapes]
    exact = Full()(*(x.double() for x in inputs), backend="reference").out
    q, k, v = to_device(*inputs)
    assert not MSSwift().reads_summary(1, k)
    r = MSSwift()(q, k, v)
    assert r.stats.mode == "dense"
    assert error(r.out, exact) < 1e-5
