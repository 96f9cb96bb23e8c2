"""Independent pieces of work on several CPU threads, each running torch single-threaded.

Many small operators gain little from threads inside each operator: they meet at a barrier after
every one. Giving each thread its own pieces removes the barriers and behaves on busy machines.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
S = TypeVar("S")

_pools: dict[int, ThreadPoolExecutor] = {}
_pools_lock = threading.Lock()


def _forget_pools() -> None:
    """A forked child has none of its parent's threads."""
    global _pools_lock
    _pools_lock = threading.Lock()
    _pools.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pools)


def _pool(workers: int) -> ThreadPoolExecutor:
    with _pools_lock:
        if workers not in _pools:
            ready = threading.Barrier(workers + 1)

            def start() -> None:
                # The first query adopts the process-wide default, later ones would undo the 1.
                torch.get_num_threads()
                torch.set_num_threads(1)
                ready.wait()

            pool = ThreadPoolExecutor(workers, "longswift", initializer=start)
            for _ in range(workers):
                pool.submit(int)
            ready.wait()
            # The setting is per thread, but also the default of threads yet to come.
            torch.set_num_threads(workers)
            _pools[workers] = pool
        return _pools[workers]


def for_each(
    pieces: Sequence[T],
    state: Callable[[], S],
    work: Callable[[T, S], None],
    device: torch.device,
    *,
    least: int = 2,
) -> None:
    """Runs ``work(piece, state)`` for every piece, without gradients.

    Args:
        pieces: Independent pieces, in any order.
        state: Makes what one worker keeps between its pieces, such as buffers.
        work: Must write to disjoint memory for different pieces.
        device: Threads are used for CPU tensors only.
        least: Pieces per thread below which one thread does them all, with torch's own threads
            inside: few and uneven pieces leave threads without work.
    """
    workers = torch.get_num_threads() if device.type == "cpu" else 1
    if workers == 1 or len(pieces) < least * workers:
        kept = state()
        with torch.no_grad():
            for piece in pieces:
                work(piece, kept)
        return
    inference = torch.is_inference_mode_enabled()
    remaining = iter(pieces)
    lock = threading.Lock()

    def loop() -> None:
        kept = state()
        with torch.inference_mode(inference), torch.no_grad():
            while True:
                with lock:
                    piece = next(remaining, None)
                if piece is None:
                    return
                work(piece, kept)

    futures = [_pool(workers).submit(loop) for _ in range(workers)]
    try:
        for future in futures:
            future.result()
    finally:
        # After an error or Ctrl-C nothing is left running on the caller's tensors.
        with lock:
            for _ in remaining:
                pass
        for future in futures:
            future.exception()
