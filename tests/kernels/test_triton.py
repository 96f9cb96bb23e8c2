"""Triton kernels in Triton's interpreter (on a GPU where there is one), against the reference."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from longswift import MSSwift, SlidingWindow, UnsupportedError, get_mechanism
from longswift.core.bias import ScoreBias
from longswift.core.mechanism import Mechanism
from longswift.core.pattern import Band, BlockPattern
from longswift.extend.bias import ClippedBias
from longswift.kernels import reference, triton
from longswift.mechanisms.selectors.bounds import Bounds
from tests.kernels.test_flex import gradients
from tests.kernels.test_patterns import CLOSE, Problem, gathered, problems

pytest.importorskip("triton", reason="triton is not installed")
from longswift.kernels.triton import launch, limits  # noqa: E402

RUNS, WHY = triton.verify(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
if not RUNS:
    pytest.skip(WHY, allow_module_level=True)


@settings(max_examples=12)
@given(problems(longest=60))
def test_forward(problem: Problem) -> None:
    slow = reference.attend(*problem.tensors, problem.pattern, problem.scale)
    fast = triton.attend(*problem.tensors, problem.pattern, problem.scale)
    torch.testing.assert_close(fast.out, slow.out, **CLOSE)
    torch.testing.assert_close(fast.lse, slow.lse, **CLOSE)
    bands = triton.attend_bands(*problem.tensors, problem.pattern, problem.scale)
    given_bands = triton.attend(*problem.tensors, problem.pattern, problem.scale, bands=bands)
    torch.testing.assert_close(given_bands.out, slow.out, **CLOSE)


@settings(max_examples=12)
@given(problems(longest=60))
def test_gradients(problem: Problem) -> None:
    weights = torch.randn(*problem.q.shape[:3], problem.v.shape[3], dtype=torch.float64)
    expected = gradients(reference, problem, weights)
    for fast, slow in zip(gradients(triton, problem, weights), expected, strict=True):
        torch.testing.assert_close(fast, slow, **CLOSE)


def biased(problem: Problem, backend: ModuleType, values: Tensor, zero: int) -> list[Tensor]:
    """Output, log-sum-exp and the gradients of q, k, v and the bias's table."""
    leaves = [x.detach().clone().requires_grad_() for x in (*problem.tensors, values)]
    bias = ScoreBias(values=leaves[3], zero=zero)
    out, lse = backend.attend(*leaves[:3], problem.pattern, problem.scale, bias=bias)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(out.shape, generator=generator, dtype=out.dtype)
    loss = (out * weights).sum() + lse[lse.isfinite()].sum() + 0 * sum(x.sum() for x in leaves)
    grads = torch.autograd.grad(loss, leaves)
    return [out.detach(), lse.detach(), *(x.nan_to_num() for x in grads)]


@settings(max_examples=10)
@given(problems(longest=40))
def test_bias(problem: Problem) -> None:
    """Added to every score, as a mean to those of the remainder; gradients to the table."""
    (heads, q_len), k_len = problem.q.shape[1:3], problem.k.shape[2]
    values = 2 * torch.randn(heads, q_len + k_len - 1, dtype=torch.float64)
    fast, slow = (biased(problem, x, values, k_len - 1) for x in (triton, reference))
    for got, expected in zip(fast, slow, strict=True):
        torch.testing.assert_close(got, expected, **CLOSE)
    bias = ScoreBias(values=values, zero=k_len - 1)
    bands = triton.attend_bands(*problem.tensors, problem.pattern, problem.scale, bias)
    part = triton.attend(*problem.tensors, problem.pattern, problem.scale, bands=bands, bias=bias)
    torch.testing.assert_close(part.out, slow[0], **CLOSE)
    torch.testing.assert_close(part.lse, slow[1], **CLOSE)


def test_tile_sizes_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many small tiles, several per block and band, and a group that is no power of two."""
    generator = torch.Generator().manual_seed(0)
    bands = (Band(tile=32, left=0), Band(tile=32, left=32))
    tokens, since = gathered(bands, 1, 32, 50, 70, True, 19, generator)
    problem = Problem(
        pattern=BlockPattern(causal=True, bands=bands, block=32, tokens=tokens, visible_from=since),
        q=torch.randn(1, 6, 50, 20, dtype=torch.float64),
        k=torch.randn(1, 2, 70, 20, dtype=torch.float64),
        v=torch.randn(1, 2, 70, 20, dtype=torch.float64),
        scale=0.2,
    )
    weights = torch.randn(1, 6, 50, 20, dtype=torch.float64)
    monkeypatch.setattr(launch, "_BYTES", 1)
    expected = gradients(reference, problem, weights)
    for fast, slow in zip(gradients(triton, problem, weights), expected, strict=True):
        torch.testing.assert_close(fast, slow, **CLOSE)
    values = torch.randn(6, 119, dtype=torch.float64)
    expected = biased(problem, reference, values, 69)
    for fast, slow in zip(biased(problem, triton, values, 69), expected, strict=True):
        torch.testing.assert_close(fast, slow, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_precision(dtype: torch.dtype) -> None:
    """Sums and log-sum-exp are fp32; 16-bit inputs round the weights to their precision."""
    q, k, v = (torch.randn(1, h, 40, 16).to(dtype) for h in (2, 1, 1))
    pattern = BlockPattern(causal=True, bands=(Band(tile=16, left=16),))
    fast, slow = (x.attend(q, k, v, pattern, 0.25) for x in (triton, reference))
    assert fast.out.dtype == dtype and fast.lse.dtype == torch.float32
    torch.testing.assert_close(fast.lse, slow.lse, rtol=1e-6, atol=1e-6)
    atol = 1e-5 if dtype == torch.float32 else 1e-3
    torch.testing.assert_close(fast.out, slow.out, rtol=0, atol=atol)


@pytest.mark.parametrize(
    "mechanism",
    [
        SlidingWindow(window=24, global_tokens=3),
        MSSwift(windows=(16,), block=16, sinks=3, key_tokens=16, dense_below=16, remainder=32),
    ],
    ids=lambda m: m.name,
)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_mechanisms(mechanism: SlidingWindow | MSSwift, causal: bool, training: bool) -> None:
    q, k, v = (torch.randn(1, heads, 77, 16, requires_grad=training) for heads in (2, 1, 1))
    results = {}
    for backend in ("triton", "reference"):
        r = mechanism(q, k, v, causal=causal, backend=backend)
        results[backend] = [r.out.detach(), r.lse.detach()]
        if training:
            results[backend] += torch.autograd.grad((r.out**2).sum() + r.lse.sum(), (q, k, v))
        assert r.stats.backend == backend
    for fast, slow in zip(*results.values(), strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "mechanism",
    [
        MSSwift(windows=(16,), block=16, sinks=3, key_tokens=16, dense_below=16, remainder=32),
        get_mechanism("hierarchical", chunk=8, pooling="mean"),
        get_mechanism("dilated_window", window=12, dilation=(1, 2)),
    ],
    ids=lambda m: m.name,
)
def test_mechanisms_with_a_bias(mechanism: Mechanism, causal: bool) -> None:
    """Tables that are pooled, moved and thinned out; selections that know the bias."""
    q, k, v = (torch.randn(1, heads, 45, 8, requires_grad=True) for heads in (4, 2, 2))
    table = (2 * torch.randn(31, 4)).requires_grad_()
    results = {}
    for backend in ("triton", "reference"):
        bias = ClippedBias(table=table)
        r = mechanism(q, k, v, causal=causal, backend=backend, bias=bias, training=False)
        grads = torch.autograd.grad((r.out**2).sum() + r.lse.sum(), (q, k, v, table))
        results[backend] = [r.out.detach(), r.lse.detach(), *grads]
        assert r.stats.backend == backend
    for fast, slow in zip(*results.values(), strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)


def test_proposals_know_the_bias() -> None:
    """Keys at some distance are proposed only because the bias asks for them."""
    mechanism = MSSwift(
        windows=(16,), block=16, sinks=0, key_tokens=4, dense_below=0, selector=Bounds(proposals=1)
    )
    q, k, v = torch.randn(1, 1, 160, 8), torch.randn(1, 1, 160, 8), torch.randn(1, 1, 160, 8)
    table = torch.zeros(301, 1)
    table[50:54] = 20.0
    with torch.no_grad():
        fast, slow = (
            mechanism(q, k, v, causal=True, backend=b, bias=ClippedBias(table=table))
            for b in ("triton", "eager")
        )
    torch.testing.assert_close(fast.out, slow.out, rtol=1e-4, atol=1e-4)


def test_decoding() -> None:
    mechanism = MSSwift(windows=(16,), block=16, sinks=3, key_tokens=16, dense_below=16)
    q, k, v = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 90, 16), torch.randn(2, 2, 90, 16)
    fast, slow = (mechanism(q, k, v, backend=b) for b in ("triton", "reference"))
    torch.testing.assert_close(fast.out, slow.out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fast.lse, slow.lse, rtol=1e-5, atol=1e-6)


def test_the_gradient_is_the_same_every_time() -> None:
    q, k, v = (torch.randn(1, h, 48, 8, requires_grad=True) for h in (2, 1, 1))
    tokens = torch.tensor([0, 1, 2], dtype=torch.int32).expand(1, 1, 3, -1).clone()
    tokens[:, :, 0] = -1
    pattern = BlockPattern(causal=True, bands=(Band(tile=16, left=0),), block=16, tokens=tokens)
    once, twice = (
        torch.autograd.grad(triton.attend(q, k, v, pattern, 0.3).out.sum(), (q, k, v))
        for _ in range(2)
    )
    for a, b in zip(once, twice, strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("sm", [90, 86])
def test_every_kernel_compiles_for_gpus(tmp_path: Path, sm: int) -> None:
    """Through Triton's compiler and ptxas, which need no GPU; what fits there is not run here."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.launching", str(sm)],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    compiled = {line.split()[0] for line in run.stdout.splitlines()}
    launched = {
        name
        for path in Path(launch.__file__).parent.glob("*.py")
        for name in re.findall(r"^ +(?:\w+\.)?(\w+)\[.*\]\(", path.read_text(), re.M)
    }
    # One only asks the interpreter whether it works.
    assert len(launched) > 15 and launched - {"_count"} == compiled


def test_kernels_are_launched_where_the_inputs_are(monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere(torch.Tensor):
        is_cuda = True
        device = torch.device("cuda:1")

    entered = []

    @contextlib.contextmanager
    def enter(device: torch.device) -> Iterator[None]:
        entered.append(device)
        yield

    monkeypatch.setattr(torch.cuda, "device", enter)
    q = torch.zeros(1).as_subclass(Elsewhere)
    assert limits.on_their_device(lambda x, y: y)(q, y=3) == 3
    assert limits.on_their_device(lambda x: 4)(torch.zeros(1)) == 4
    assert entered == [torch.device("cuda:1")]


def test_what_it_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = BlockPattern(causal=True, bands=(Band(tile=4, left=0),))
    q = torch.zeros(1, 1, 4, 16)
    with pytest.raises(UnsupportedError, match="bf16 on a CPU"):
        triton.attend(*[q.bfloat16()] * 3, pattern, 1.0)
    with pytest.raises(UnsupportedError, match="fp64"):
        triton.attend(*[q.double().to("meta")] * 3, pattern, 1.0)
    with pytest.raises(UnsupportedError, match="at most 256 channels"):
        triton.attend(*[torch.zeros(1, 1, 4, 300)] * 3, pattern, 1.0)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    usable, reason = triton.verify(torch.device("cpu"))
    assert not usable and "TRITON_INTERPRET" in reason
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    usable, reason = triton.verify(torch.device("cuda"))
    assert not usable and "longswift[gpu]" in reason


@pytest.mark.parametrize("groups", [1, 5])
@pytest.mark.parametrize("most", [1, 5, 40])
def test_best_blocks(groups: int, most: int) -> None:
    """The torch twin is ``Bounds`` itself: softmax, largest over rows, top-k."""
    rows, keys = torch.randn(2, 2, 3, 7 * groups, 12), torch.randn(2, 2, 50, 12)
    outside = torch.rand(2, 3, 50) < 0.8
    outside[0, 1] = False
    outside[1, 1, 4:] = False
    index, valid = triton.best_blocks(rows, keys, outside, 2, most)
    scores = (rows @ keys.unsqueeze(2).transpose(3, 4)).masked_fill(
        ~outside[:, :, None], -torch.inf
    )
    rank = scores.softmax(-1).amax(3).masked_fill(~outside, -1.0)
    rank[..., :2] = -1.0
    value, expected = rank.topk(most)
    assert torch.equal(valid.sum(-1), (value >= 0).sum(-1))
    for got, ok, want, real in zip(
        *(x.flatten(0, 2) for x in (index, valid, expected, value >= 0)), strict=True
    ):
        assert got[ok].tolist() == sorted(want[real].tolist())


def test_ties_go_to_the_earlier_block() -> None:
    rows, keys = torch.zeros(1, 1, 1, 3, 8), torch.zeros(1, 1, 30, 8)
    index, valid = triton.best_blocks(rows, keys, torch.ones(1, 1, 30, dtype=torch.bool), 4, 6)
    assert valid.all()
    assert index.flatten().tolist() == [4, 5, 6, 7, 8, 9]
