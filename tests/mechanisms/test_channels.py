"""Heads of any width by the compiled kernels: channels of zeros change nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longswift import Full, MSSwift, SlidingWindow
from longswift.core.mechanism import Mechanism
from longswift.extend.bias import ALiBi
from longswift.kernels import native
from longswift.mechanisms.dilated_window import DilatedWindow
from longswift.mechanisms.hierarchical import Hierarchical

RUNS, WHY = native.verify(torch.device("cpu"))
pytestmark = pytest.mark.skipif(not RUNS, reason=WHY)

SPARSE = MSSwift(windows=(32,), key_tokens=16, sinks=4, block=16, remainder=32, dense_below=0)
MECHANISMS: dict[str, Mechanism] = {
    "full": Full(),
    "ms_swift": SPARSE,
    "sliding_window": SlidingWindow(window=24, global_tokens=2),
    "dilated_window": DilatedWindow(window=8, dilation=3),
    "hierarchical": Hierarchical(chunk=16),
}


@pytest.mark.parametrize("name", MECHANISMS)
@settings(max_examples=12)
@given(st.data())
def test_output_and_gradients_are_the_reference(name: str, data: st.DataObject) -> None:
    """Its choice strict, and hence the same whatever ranks it, where there is one."""
    causal = data.draw(st.booleans())
    n = data.draw(st.integers(32, 150))
    rows = data.draw(st.integers(32, n)) if causal else n
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    width = data.draw(st.sampled_from([1, 7, 16, 24, 40, 72, 104]))
    v_width = data.draw(st.sampled_from([1, 9, 32, 40, 72]))
    sizes = ((4, rows, width), (2, n, width), (2, n, v_width))
    inputs = [(0.5 * torch.randn(2, *size, generator=generator)).requires_grad_() for size in sizes]
    key_mask = torch.ones(2, n, dtype=torch.bool)
    if data.draw(st.booleans()):
        key_mask[1, : n // 3] = False
    mechanism = MECHANISMS[name]
    if isinstance(mechanism, MSSwift):
        # Every key, by way of a choice: what is chosen in fp32 may differ where ranks tie.
        mechanism = MSSwift(**{**vars(SPARSE), "key_tokens": 256, "windows": (16,)})
    found = mechanism(*inputs, causal=causal, key_mask=key_mask)
    expected = mechanism.reference(*inputs, causal=causal, key_mask=key_mask)
    assert found.out.shape == (2, 4, rows, v_width)
    torch.testing.assert_close(found.out, expected.out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.lse, expected.lse, rtol=1e-4, atol=1e-5)
    weights = torch.randn(found.out.shape, generator=generator)
    both = [torch.autograd.grad((x.out * weights).sum(), inputs) for x in (found, expected)]
    for ours, right in zip(*both, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", native.DTYPES)
def test_the_compiled_kernels_do_the_work(dtype: torch.dtype) -> None:
    q, k, v = torch.randn(3, 1, 2, 600, 72, dtype=dtype)
    for mechanism in MECHANISMS.values():
        assert mechanism(q, k, v, causal=True).stats.backend == "native"
    # Few rows would not make up for the copies, and nobody else asked for them.
    assert Full()(q[:, :, :8], k, v).stats.backend == "eager"
    assert Full()(q[:, :, :32], k.repeat(1, 1, 2, 1), v.repeat(1, 1, 2, 1)).stats.backend == "eager"
    assert Full()(q, k, v, backend="eager").stats.backend == "eager"
    assert Full()(q, k, v, bias=ALiBi()).stats.backend == "eager"


@torch.no_grad()
def test_visible_keys_are_those_that_are_seen() -> None:
    """A value counts if and only if its key is said to be seen."""
    q, k = torch.randn(2, 1, 2, 200, 24)
    mechanism = MSSwift(**{**vars(SPARSE), "remainder": None})
    seen = mechanism.visible(q, k)
    scores = (q @ k.transpose(2, 3) * 24**-0.5).masked_fill(~seen, float("-inf"))
    v = torch.randn(1, 2, 200, 40)
    found = mechanism(q, k, v)
    assert found.stats.backend == "native"
    torch.testing.assert_close(found.out, scores.softmax(-1) @ v, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.lse, scores.logsumexp(-1), rtol=1e-4, atol=1e-5)
