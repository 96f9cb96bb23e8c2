"""Baselines: full attention by PyTorch, aligned like a mechanism's, or a reason why not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longswift import Full
from longswift.core.errors import ConfigError
from longswift.eval import baselines


@pytest.mark.parametrize("name", baselines.names())
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_equals_full_attention(
    name: str, causal: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    # Compiling takes half a minute and changes no mask.
    monkeypatch.setattr(baselines, "_compiled_flex", lambda: flex_attention)
    q, k, v = torch.randn(2, 4, rows, 16), *torch.randn(2, 2, 2, 40, 16)
    expected = Full().reference(q, k, v, causal=causal).out
    torch.testing.assert_close(baselines.get(name).attend(q, k, v, causal), expected)


@pytest.mark.parametrize("rows,keys", [(5, 40), (128, 128), (200, 328), (256, 384), (700, 700)])
def test_blocks_are_those_of_create_block_mask(rows: int, keys: int) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    found = baselines._causal_blocks(rows, keys, "cpu")
    expected = create_block_mask(found.mask_mod, None, None, rows, keys, device="cpu")
    assert found.shape == expected.shape
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts, indices = (getattr(found, f"{kind}_{x}") for x in ("num_blocks", "indices"))
        assert torch.equal(counts, getattr(expected, f"{kind}_num_blocks"))
        for row, count in enumerate(counts.flatten().tolist()):
            right = getattr(expected, f"{kind}_indices")[0, 0, row, :count]
            assert indices[0, 0, row, :count].tolist() == right.tolist()


def test_one_that_does_not_run_names_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Tensor) -> Tensor:
        try:
            raise NotImplementedError("no backward on this device.")
        except NotImplementedError as error:
            raise RuntimeError("the compiler gave up") from error

    broken = baselines.Baseline(
        name="flex", implementation="flex_attention", attend=fail, compiled=True
    )
    monkeypatch.setitem(baselines._TABLE, "flex", broken)
    with pytest.raises(ConfigError, match=r"runs here: sdpa, got 'flex' \(no backward on this"):
        baselines.check("flex", dtype=torch.float32, device="cpu")
    assert baselines.check("sdpa", dtype=torch.float32, device="cpu").name == "sdpa"
    with pytest.raises(ConfigError, match="one of sdpa, flex"):
        baselines.get("flash")
