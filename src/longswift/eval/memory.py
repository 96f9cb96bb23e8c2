"""Peak memory of a piece of work, in this process or in a fresh one.

On Linux the kernel itself keeps the high-water mark of a process's resident memory, and writing
``5`` to ``/proc/self/clear_refs`` sets it back; nothing is sampled, so no short peak is missed.
Elsewhere the mark cannot be set back: the figure then counts only what exceeds every earlier
peak, and is a lower bound. On CUDA the allocator's own peak is read.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longswift.core.errors import LongSwiftError, problem

_STATUS = Path("/proc/self/status")


def _status(name: str) -> int | None:
    """A size in bytes from ``/proc/self/status``, or None."""
    try:
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return None


def high_water() -> int | None:
    """Largest resident size of this process so far, in bytes; None where it is unknown."""
    mark = _status("VmHWM")
    if mark is not None:
        return mark
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def settle() -> None:
    """Give freed memory back, so that it hides no later allocation, and reset the mark."""
    gc.collect()
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


@dataclass
class Peak:
    """Outcome of ``watch``: bytes above the start at the highest point, or None."""

    bytes: int | None = None


@contextmanager
def watch(device: torch.device | str = "cpu") -> Iterator[Peak]:
    """Measure by how much the work inside raises memory at its highest point.

    Args:
        device: Where the work runs.
    """
    peak = Peak()
    if torch.device(device).type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.bytes = torch.cuda.max_memory_allocated(device) - start
        return
    settle()
    before = _status("VmRSS") or high_water()
    yield peak
    after = high_water()
    if before is not None and after is not None:
        peak.bytes = max(0, after - before)


def measured(task: str, arguments: dict[str, Any], device: torch.device | str) -> Any:
    """What ``module:function``, which watches memory on ``device``, answers.

    It runs in a fresh process, but on CUDA, whose allocator counts exactly whatever came before,
    in this one: starting there takes longer than most measurements.
    """
    if torch.device(device).type == "cuda":
        return _resolve(task)(**arguments)
    return in_fresh_process(task, arguments)


def in_fresh_process(task: str, arguments: dict[str, Any]) -> Any:
    """Run ``module:function`` with keyword arguments in a new Python; return its JSON answer.

    A fresh process has no buffers and no freed memory from earlier work, so a peak measured in it
    belongs to the task alone.

    Raises:
        LongSwiftError: The process failed, for instance for want of memory.
    """
    done = subprocess.run(
        [sys.executable, "-m", "longswift.eval.memory", task],
        input=json.dumps({"threads": torch.get_num_threads(), "arguments": arguments}),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        why = lines[-1] if lines else f"exit code {done.returncode}, perhaps out of memory"
        fix = "Use --no-memory or a shorter length."
        raise LongSwiftError(problem("memory", expected="a measurement", got=why, fix=fix))
    return json.loads(done.stdout)


def _resolve(task: str) -> Callable[..., Any]:
    from importlib import import_module

    module, _, name = task.partition(":")
    return getattr(import_module(module), name)


def _main() -> None:
    request = json.load(sys.stdin)
    torch.set_num_threads(request["threads"])
    json.dump(_resolve(sys.argv[1])(**request["arguments"]), sys.stdout)


if __name__ == "__main__":
    _main()
