"""Peak memory: a rise is seen, a fall afterwards does not hide it."""

from __future__ import annotations

import sys

import pytest
import torch

from longswift.core.errors import LongSwiftError
from longswift.eval import memory

SIZE = 64 * 2**20


def touch(size: int) -> None:
    torch.ones(size // 8, dtype=torch.int64)


@pytest.mark.skipif(sys.platform != "linux", reason="the mark can be reset on Linux only")
def test_a_freed_peak_is_seen_and_each_watch_starts_anew() -> None:
    with memory.watch() as large:
        touch(SIZE)
    with memory.watch() as small:
        touch(SIZE // 8)
    assert large.bytes == pytest.approx(SIZE, rel=0.2)
    assert small.bytes == pytest.approx(SIZE // 8, rel=0.5)


def test_a_fresh_process_answers_and_its_errors_are_one_line() -> None:
    assert memory.in_fresh_process("json:loads", {"s": "[1, 2]"}) == [1, 2]
    with pytest.raises(LongSwiftError) as error:
        memory.in_fresh_process("json:loads", {"s": "["})
    assert "\n" not in str(error.value) and "JSONDecodeError" in str(error.value)
