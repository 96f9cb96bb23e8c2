"""FlexAttention: the block masks say what the pattern says, and the parts add up to it."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from longswift import Full, MSSwift, SlidingWindow, UnsupportedError
from longswift.core.pattern import Band, BlockPattern
from longswift.kernels import flex, reference
from longswift.kernels.flex import masks
from tests.kernels.test_patterns import CLOSE, Problem, gathered, problems
from tests.mechanisms.table import CASES, Case

# Sums of fixed size and landmarks are other families of kernel.
WITHOUT_PATTERN = {"linear", "efficient", "performer", "nystrom"}


def gradients(backend: ModuleType, problem: Problem, weights: Tensor) -> list[Tensor]:
    """Output and gradients for q, k and v, zeros where a row or a tensor has none."""
    leaves = [x.detach().clone().requires_grad_() for x in problem.tensors]
    out, lse = backend.attend(*leaves, problem.pattern, problem.scale)
    loss = (out * weights).sum() + lse[lse.isfinite()].sum() + 0 * sum(x.sum() for x in leaves)
    return [out.detach(), *(x.nan_to_num() for x in torch.autograd.grad(loss, leaves))]


@settings(max_examples=40)
@given(problems())
def test_forward(problem: Problem) -> None:
    slow = reference.attend(*problem.tensors, problem.pattern, problem.scale)
    fast = flex.attend(*problem.tensors, problem.pattern, problem.scale)
    torch.testing.assert_close(fast.out, slow.out, **CLOSE)
    torch.testing.assert_close(fast.lse, slow.lse, **CLOSE)
    bands = flex.attend_bands(*problem.tensors, problem.pattern, problem.scale)
    given_bands = flex.attend(*problem.tensors, problem.pattern, problem.scale, bands=bands)
    assert torch.equal(given_bands.out, fast.out)


@settings(max_examples=30)
@given(problems())
def test_gradients(problem: Problem) -> None:
    weights = torch.randn(*problem.q.shape[:3], problem.v.shape[3], dtype=torch.float64)
    expected = gradients(reference, problem, weights)
    for fast, slow in zip(gradients(flex, problem, weights), expected, strict=True):
        torch.testing.assert_close(fast, slow, **CLOSE)


def painted(mask: masks.BlockMask, by: str) -> Tensor:
    """The mask a kernel applies: whole blocks unseen by ``mask_mod``, partial ones through it."""
    (q_len, k_len), size = mask.seq_lengths, mask.BLOCK_SIZE[0]
    heads = mask.kv_num_blocks.shape[1]
    count = torch.zeros(heads, q_len, k_len, dtype=torch.int64)
    for kind in ("", "full_"):
        counts = getattr(mask, f"{kind}{by}_num_blocks")[0]
        indices = getattr(mask, f"{kind}{by}_indices")[0]
        for head, row in torch.cartesian_prod(*(torch.arange(n) for n in counts.shape)).tolist():
            for other in indices[head, row, : int(counts[head, row])].tolist():
                i, j = (row, other) if by == "kv" else (other, row)
                rows = torch.arange(i * size, min(i * size + size, q_len))
                keys = torch.arange(j * size, min(j * size + size, k_len))
                seen = torch.ones(len(rows), len(keys), dtype=torch.int64)
                if not kind:
                    at = torch.tensor(0), torch.tensor(head), rows[:, None], keys
                    seen = mask.mask_mod(*at).long()
                count[head, rows[:, None], keys] += seen
    return count


@settings(max_examples=60)
@given(problems())
def test_blocks_are_the_bands(problem: Problem) -> None:
    q_len, k_len, groups = problem.q.shape[2], problem.k.shape[2], 2
    pattern = BlockPattern(causal=problem.pattern.causal, bands=problem.pattern.bands)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "BLOCK", 8)
        mask = masks.band_blocks(pattern, q_len, k_len, groups, problem.q.device)
        expected = pattern.visible(q_len, k_len, groups, problem.q.device)[0].long()
        for by in ("kv", "q"):
            assert torch.equal(painted(mask, by).expand_as(expected), expected)


def test_lists_are_as_short_as_the_band() -> None:
    pattern = BlockPattern(causal=True, bands=(Band(tile=256, left=256),) * 2)
    mask = masks.band_blocks(pattern, 1 << 16, 1 << 16, 3, torch.device("cpu"))
    assert mask.kv_indices.shape[:3] == (1, 1, 512)
    assert mask.kv_indices.shape[3] <= 8
    assert mask.q_indices.shape[3] <= 8
    # The middle of the band needs no mask function at all.
    assert int(mask.full_kv_num_blocks[0, 0, 100]) >= 2


def test_one_compilation_for_every_length_and_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(flex._call, dynamic=True, fullgraph=True, backend=counter)
    monkeypatch.setattr(flex, "_compiled", lambda: compiled)
    monkeypatch.setattr(flex, "_dense", flex._fused)
    generator = torch.Generator().manual_seed(0)
    bands = (Band(tile=32, left=16), Band(tile=16, left=48))
    # The first has as many blocks as there are sequences, and KV heads.
    for length in (256, 700, 1100, 517, 903):
        tokens, since = gathered(bands, 2, 16, length, length, True, length % 7 + 3, generator)
        pattern = BlockPattern(
            causal=True, bands=bands, block=16, tokens=tokens, visible_from=since
        )
        q, k, v = (torch.randn(2, heads, length, 8) for heads in (4, 2, 2))
        fast, slow = (x.attend(q, k, v, pattern, 0.3) for x in (flex, reference))
        torch.testing.assert_close(fast.out, slow.out)
        torch.testing.assert_close(fast.lse, slow.lse)
    # Bands and gathered tokens have a mask function each.
    assert counter.frame_count == 2
    torch._dynamo.reset()


# Some versions of Transformers raise it for the whole process.
@torch._dynamo.config.patch(recompile_limit=8)
def test_any_number_of_head_shapes_and_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a variant, and there may be more of them than Dynamo allows by default."""
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(flex._call, dynamic=True, fullgraph=True, backend=counter)
    monkeypatch.setattr(flex, "_compiled", lambda: compiled)
    monkeypatch.setattr(flex, "_dense", flex._fused)
    pattern = BlockPattern(causal=True, bands=(Band(tile=16, left=16),) * 2)
    for index in range(10):
        scale = 0.1 + index // 5
        for length in (150, 200):
            q, k, v = (torch.randn(1, h, length, 8 + index) for h in (2 * (index % 4 + 1), 2, 2))
            fast, slow = (x.attend(q, k, v, pattern, scale) for x in (flex, reference))
            torch.testing.assert_close(fast.out, slow.out)
    assert counter.frame_count == 10 > torch._dynamo.config.recompile_limit
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "mechanism",
    [
        Full(),
        SlidingWindow(window=40, global_tokens=3),
        MSSwift(windows=(16, 32), block=16, sinks=3, key_tokens=16, dense_below=32, remainder=32),
    ],
    ids=lambda m: m.name,
)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_mechanisms(
    mechanism: Full | SlidingWindow | MSSwift, causal: bool, training: bool
) -> None:
    q, k, v = (torch.randn(2, heads, 150, 16, requires_grad=training) for heads in (4, 2, 2))
    results = {}
    for backend in ("flex", "reference"):
        r = mechanism(q, k, v, causal=causal, backend=backend)
        assert r.stats.backend == backend
        results[backend] = [r.out.detach(), r.lse.detach()]
        if training:
            results[backend] += torch.autograd.grad((r.out**2).sum() + r.lse.sum(), (q, k, v))
    for fast, slow in zip(*results.values(), strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name not in WITHOUT_PATTERN], ids=lambda c: c.label
)
def test_every_pattern_of_the_table(case: Case) -> None:
    mechanism = case.build()
    kv_heads = case.kv_heads[-1]
    q, k, v = (torch.randn(1, heads, 130, 16) for heads in (2 * kv_heads, kv_heads, kv_heads))
    for causal in case.directions:
        fast, slow = (mechanism(q, k, v, causal=causal, backend=b) for b in ("flex", "reference"))
        torch.testing.assert_close(fast.out, slow.out, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(fast.lse, slow.lse, rtol=1e-4, atol=1e-5)


def test_what_it_cannot_do_is_refused() -> None:
    usable, reason = flex.verify(torch.device("meta"))
    assert not usable and "meta" in reason
    q = torch.zeros(1, 1, 4, 16, dtype=torch.float64, device="meta")
    pattern = BlockPattern(causal=True, bands=(Band(tile=4, left=0),))
    with pytest.raises(UnsupportedError, match="fp64"):
        flex.attend(q, q, q, pattern, 1.0)
    narrow = q.float()[..., :8]
    with pytest.raises(UnsupportedError, match="16 channels"):
        flex.attend(narrow, narrow, narrow, pattern, 1.0)
