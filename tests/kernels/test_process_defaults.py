"""What a process has set, and when it first attends, changes neither results nor the backend.

Each test is a process of its own: what a backend is trusted with is asked once, and the suite's
``torch.empty`` knows no default device.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

_SETTING = """
import torch
from longswift import MSSwift
from longswift.mechanisms import get_mechanism

names = "full", "hierarchical", "longformer", "bigbird", "dilated_window", "block_sparse"
swift = MSSwift(windows=(128,), key_tokens=16, dense_below=128)
mechanisms = [swift, *(get_mechanism(name) for name in names)]
q, k, v = torch.randn(3, 1, 2, 1000, 64)

def outcomes():
    found = []
    for attention in mechanisms:
        with torch.inference_mode():
            result = attention(q, k, v)
        found.append((result.stats.backend, result.out, result.lse))
        own = q.clone().requires_grad_()
        result = attention(own, k, v)
        grad, = torch.autograd.grad(result.out.sum() + result.lse.sum(), own)
        found.append((result.stats.backend, result.out.detach(), grad))
    return found

def same(strange):
    for usual, other in zip(outcomes(), strange, strict=True):
        assert usual[0] == other[0], (usual[0], other[0])
        for a, b in zip(usual[1:], other[1:], strict=True):
            assert torch.equal(a, b)
"""


def _run(script: str) -> None:
    command = [sys.executable, "-W", "error:backend", "-c", _SETTING + script]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_gradient_checkpointing() -> None:
    """Its hooks count the tensors that are saved, and its recomputation stops at the last."""
    _run("""
from torch.utils.checkpoint import checkpoint

def outputs():
    return [attention(own, k, v).out.square().sum() for attention in mechanisms]

own = q.clone().requires_grad_()
parts = [checkpoint(lambda x, a=a: a(x, k, v).out.square(), own, use_reentrant=False).sum()
         for a in mechanisms]
found = [torch.autograd.grad(part, own)[0] for part in parts]
for (expected,), got in zip((torch.autograd.grad(part, own) for part in outputs()), found):
    torch.testing.assert_close(got, expected)
assert {attention(own, k, v).stats.backend for attention in mechanisms} <= {"native"}
""")


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_a_default_dtype_and_device(dtype: str) -> None:
    _run(f"""
torch.set_default_dtype(torch.{dtype})
with torch.device("meta"):
    strange = outcomes()
torch.set_default_dtype(torch.float32)
same(strange)
""")


def test_a_first_call_under_autocast() -> None:
    _run("""
with torch.autocast("cpu", dtype=torch.bfloat16):
    first = outcomes()
    same(first)
assert {out.dtype for _, out, _ in first} == {torch.bfloat16}
assert {backend for backend, *_ in first + outcomes()} == {"native"}
""")
