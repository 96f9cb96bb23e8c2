"""Matrix products equal torch's, whichever library computes them."""

from __future__ import annotations

import pytest
import torch

from longswift.core.hardware import onednn_beats_blas
from longswift.core.products import bmm, factor_dtype, mm
from longswift.core.softmax import hide_
from longswift.core.summary import group_sums


@pytest.fixture(params=[False, True], ids=["blas", "onednn"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr("longswift.core.products.onednn_beats_blas", lambda: request.param)
    monkeypatch.setattr("longswift.core.products._WORTH_A_CALL", 1)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 5, 7, 9), (2, 64, 16, 33)], ids=str)
@pytest.mark.parametrize("layout", ["rows", "columns", "apart", "expanded"])
def test_any_layout(shape: tuple[int, int, int, int], layout: str) -> None:
    problems, rows, inner, width = shape
    a = torch.randn(rows, problems, inner).transpose(0, 1)
    b = {
        "rows": lambda: torch.randn(problems, inner, width),
        "columns": lambda: torch.randn(problems, width, inner).transpose(1, 2),
        "apart": lambda: torch.randn(problems, width, 2, inner)[:, :, 1].transpose(1, 2),
        "expanded": lambda: torch.randn(1, inner, width).expand(problems, -1, -1),
    }[layout]()
    expected = a.double() @ b.double()
    torch.testing.assert_close(bmm(a, b).double(), expected, rtol=1e-5, atol=1e-5)
    out = torch.empty(problems, rows, width + 3)[..., :width]
    assert bmm(a, b, out=out) is out
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    dense = b[0].contiguous()
    torch.testing.assert_close(mm(a[0], dense).double(), expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("library")
def test_a_wider_result() -> None:
    a, b = torch.randn(2, 9, 8).bfloat16(), torch.randn(2, 8, 5).bfloat16()
    out = bmm(a, b, out=torch.empty(2, 9, 5))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-2, atol=1e-2)


def test_factors_are_never_narrowed() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert factor_dtype(torch.empty(1, dtype=dtype)) in (dtype, torch.float32)
    assert factor_dtype(torch.empty(1, dtype=torch.float64)) == torch.float64
    assert isinstance(onednn_beats_blas(), bool)


def test_hidden_scores() -> None:
    scores, shown = torch.randn(2, 3, 4), torch.rand(2, 1, 4) < 0.5
    expected = scores.masked_fill(~shown, float("-inf"))
    assert hide_(scores, shown) is scores
    assert torch.equal(scores, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("length", "size"), [(0, 4), (3, 4), (50, 4), (9000, 16), (9, 5000)])
def test_group_sums(dtype: torch.dtype, length: int, size: int) -> None:
    x = torch.randn(1, 2, length, 3, dtype=dtype)
    whole = length // size
    expected = x[:, :, : whole * size].double().unflatten(2, (whole, size)).sum(3)
    torch.testing.assert_close(group_sums(x, size).double(), expected, rtol=1e-5, atol=1e-5)
