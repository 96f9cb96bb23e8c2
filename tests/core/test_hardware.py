"""Up to where MS-SWIFT is exact, by device."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from longswift.core.hardware import crossover, row_crossover


class Keys(NamedTuple):
    """What is asked of keys that lie on any device."""

    device: torch.device
    shape: tuple[int, ...]
    element: int

    def element_size(self) -> int:
        return self.element


@pytest.mark.parametrize(
    ("device", "shape", "element", "expected", "four"),
    [
        ("cpu", (1, 2, 99, 64), 4, 16_384, 65_536),
        ("cpu", (8, 2, 99, 64), 4, 16_384, 65_536),
        ("cpu", (1, 8, 99, 128), 4, 4_096, 8_192),
        ("cuda", (1, 8, 99, 128), 2, 1_048_576, 4_194_304),
        ("cuda", (1, 64, 99, 256), 4, 32_768, 131_072),
        ("mps", (1, 8, 99, 128), 2, 4_096, 4_096),
    ],
)
def test_a_row_is_exact_up_to_what_is_read_sooner_than_chosen(
    device: str, shape: tuple[int, ...], element: int, expected: int, four: int
) -> None:
    keys: Any = Keys(torch.device(device), shape, element)
    assert row_crossover(keys, summarised=True) == expected >= crossover(device)
    # Without summaries a choice would read all of them, too.
    # Several queries read the same keys, up to four times as many.
    for queries in (4, 5, 8):
        assert row_crossover(keys, queries=queries, summarised=True) == four
    assert row_crossover(keys, summarised=False) == 99
