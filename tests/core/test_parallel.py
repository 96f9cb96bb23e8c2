"""Work on several threads: everything once, errors passed on, the caller's settings intact."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from longswift import Full, MSSwift, SlidingWindow
from longswift.core.mechanism import Mechanism
from longswift.core.parallel import for_each

CPU = torch.device("cpu")


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_every_piece_once(threads: int) -> None:
    done: list[int] = []
    states: list[object] = []
    inner: set[tuple[int, int]] = set()

    def state() -> object:
        states.append(object())
        return states[-1]

    def work(piece: int, own: object) -> None:
        assert own in states
        assert not torch.is_grad_enabled()
        inner.add((threading.get_ident(), torch.get_num_threads()))
        done.append(piece)

    for_each(range(100), state, work, CPU)
    assert sorted(done) == list(range(100))
    assert len(states) <= threads
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled()
    if threads > 1:
        assert {count for _, count in inner} == {1}


def test_few_pieces_and_none(threads: int) -> None:
    done: list[int] = []
    for_each([7], lambda: None, lambda piece, _: done.append(piece), CPU)
    for_each([], lambda: None, lambda piece, _: done.append(piece), CPU)
    assert done == [7]


def test_errors_reach_the_caller_and_stop_the_work(threads: int) -> None:
    done: list[int] = []

    def work(piece: int, _: None) -> None:
        if piece == 3:
            raise KeyError("piece 3")
        time.sleep(0.001)
        done.append(piece)

    with pytest.raises(KeyError, match="piece 3"):
        for_each(range(1000), lambda: None, work, CPU)
    settled = len(done)
    time.sleep(0.01)
    assert len(done) == settled < 1000
    assert torch.get_num_threads() == threads
    for_each(range(20), lambda: None, lambda piece, _: done.append(piece), CPU)
    assert len(done) == settled + 20


def test_inference_mode_follows(threads: int) -> None:
    seen: list[bool] = []
    with torch.inference_mode():
        for_each(
            range(9), lambda: None, lambda *_: seen.append(torch.is_inference_mode_enabled()), CPU
        )
    assert all(seen)
    assert len(seen) == 9


def test_callers_on_several_threads(threads: int) -> None:
    """Two callers at once share the workers without waiting for each other forever."""
    done: list[int] = []

    def caller() -> None:
        torch.set_num_threads(threads)
        for_each(range(200), lambda: None, lambda piece, _: done.append(piece), CPU)

    callers = [threading.Thread(target=caller) for _ in range(4)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join(30)
        assert not thread.is_alive()
    assert sorted(done) == sorted(list(range(200)) * 4)


MECHANISMS: list[Mechanism] = [
    Full(),
    SlidingWindow(window=24, global_tokens=3),
    MSSwift(windows=(128, 256), key_tokens=32, dense_below=0, block=32, remainder=64),
    MSSwift(windows=(128,), key_tokens=64, dense_below=0, block=32, selector="antidiagonal"),
    MSSwift(windows=(128,), key_tokens=64, dense_below=0, block=32, selector="lowrank"),
    MSSwift(windows=(128,), key_tokens=64, dense_below=0, block=32, selector="pooled"),
    MSSwift(windows=(128,), key_tokens=64, dense_below=0, block=32, selector="anchor"),
]


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=lambda m: m.name)
def test_threads_change_nothing(mechanism: Mechanism) -> None:
    """The same on one thread and on three, forward and backward."""
    training = getattr(getattr(mechanism, "selector", None), "name", "") != "antidiagonal"
    q, k, v = torch.randn(2, 4, 900, 16), *torch.randn(2, 2, 2, 900, 16)
    results = []
    before = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            out, lse, _ = mechanism(*leaves, training=training)
            grads = torch.autograd.grad(out.square().sum() + lse.sum(), leaves)
            results.append((out, lse, *grads))
    finally:
        torch.set_num_threads(before)
    for one, three in zip(*results, strict=True):
        torch.testing.assert_close(one, three, rtol=1e-5, atol=1e-6)
