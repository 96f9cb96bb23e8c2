"""``torch.compile`` of a caller: mechanisms run between its graphs, and nobody else pays."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from longswift.mechanisms import MECHANISMS, get_mechanism


@pytest.mark.parametrize("name", MECHANISMS.names())
def test_a_compiled_caller(name: str) -> None:
    torch.compiler.reset()
    mechanism = get_mechanism(name)

    def attend(x: Tensor) -> Tensor:
        q, k, v = (x * factor for factor in (1.0, 0.5, 2.0))
        return mechanism(q, k, v, causal=mechanism.supports_causal).out.square()

    x = torch.randn(1, 2, 300, 16, generator=torch.Generator().manual_seed(0))
    found = []
    for call in (attend, torch.compile(attend, backend="aot_eager")):
        given = x.clone().requires_grad_()
        out = call(given)
        out.sum().backward()
        found.append((out.detach(), given.grad))
    torch.testing.assert_close(found[1], found[0])


def test_the_compiler_is_not_imported_for_a_call() -> None:
    code = (
        "import sys, torch, longswift; x = torch.zeros(1, 1, 300, 16);"
        "longswift.MSSwift()(x, x, x);"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
