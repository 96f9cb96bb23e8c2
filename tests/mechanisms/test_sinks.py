"""Sinks of blocks, and how many tokens blocks list, known without reading them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from longswift import MSSwift, get_mechanism
from longswift.core.pattern import Band, BlockPattern
from longswift.mechanisms.patterned import pattern_stats
from longswift.mechanisms.sinks import sink_slots, tokens_listed

CPU = torch.device("cpu")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("q_len", [150, 70, 1])
@pytest.mark.parametrize("remainder,k_len", [(None, 150), (16, 150), (None, 33), (16, 70)])
def test_what_is_listed_is_what_is_gathered(
    causal: bool, q_len: int, remainder: int | None, k_len: int
) -> None:
    """Few candidates, more than the budget, and none; the statistics are the same."""
    q_len = min(q_len, k_len) if causal else k_len
    swift = MSSwift(
        windows=(16, 64), block=16, key_tokens=40, sinks=6, dense_below=0, remainder=remainder
    )
    bands = swift.bands(q_len, 2, causal)
    pattern = BlockPattern(causal=causal, bands=bands, block=16)
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, q_len, 16), torch.randn(1, 2, k_len, 16)
    call = swift._checked(q, k, k, causal, None, None, "eager", False, None, None)
    found, _ = swift._choose(q, k, k, call, q_len)
    # Only of a single row it is known beforehand on a CPU.
    assert found.tokens is not None and (found.listed is None) == (q_len > 1)
    listed = tokens_listed(pattern, q_len, k_len, 6, 40)
    assert torch.equal(listed, (found.tokens[0] >= 0).sum(2))
    read, known = (
        pattern_stats("ms_swift", "eager", "shared", replace(found, listed=one), q_len, k_len)
        for one in (None, listed)
    )
    assert known.density_by_head == pytest.approx(read.density_by_head)
    assert known.keys_per_query == pytest.approx(read.keys_per_query)
    assert replace(known, density_by_head=(), keys_per_query=0, density=0) == replace(
        read, density_by_head=(), keys_per_query=0, density=0
    )


def test_sinks_in_the_band_are_no_gathered_tokens() -> None:
    pattern = BlockPattern(causal=True, bands=(Band(tile=4, left=2),), block=4)
    slots = sink_slots(pattern, 12, 12, 3, CPU)
    assert slots.tolist() == [[[[-1, -1, -1], [0, 1, -1], [0, 1, 2]]]]
    assert sink_slots(pattern, 12, 12, 3, CPU) is slots


def test_where_exact_rows_end_depends_on_the_device() -> None:
    swift = MSSwift()
    assert swift.crossover("cpu") == swift.crossover("mps") == 4096
    assert swift.crossover(torch.device("cuda", 1)) == 16384
    assert MSSwift(dense_below=7).crossover("cuda") == 7
    again = get_mechanism(**swift.to_dict())
    # A single row reads 16 MiB of keys and values as fast as it chooses; a batch changes nothing.
    for heads, width, dtype, limit in (
        (2, 64, torch.float32, 16384),
        (2, 64, torch.bfloat16, 32768),
        (8, 128, torch.float32, 4096),
    ):
        for batch in (1, 2):
            at = torch.zeros(batch, heads, 1, width, dtype=dtype)
            q, k = at.repeat(1, 2, 1, 1), at.expand(-1, -1, limit + 200, -1)
            for k_len, rows in ((limit, 1), (limit + 129, 0)):
                assert swift._exact_rows(q, k[:, :, :k_len], True, True) == rows
                # Who keeps no summaries would read all keys to choose some.
                assert swift._exact_rows(q, k[:, :, :k_len], True) == 1
    assert MSSwift(dense_below=4096)._exact_rows(q, k, True) == 0
    assert again == swift and again.to_dict()["dense_below"] is None
