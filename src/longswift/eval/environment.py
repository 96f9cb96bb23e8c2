"""Where a figure was measured: versions, hardware and revision; no host names, no paths."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = (
    *("torch", "triton", "transformers", "tokenizers"),
    *("safetensors", "peft", "accelerate", "numpy"),
)
_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "bf16", "sve")


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What a reader needs to judge or repeat a figure.

    Attributes:
        versions: Version of longswift, Python and every package that matters and is installed;
            where torch was built for a GPU, also of its CUDA (or ROCm) and cuDNN.
        system: Operating system and architecture.
        cpu: Model name of the processor.
        cpu_features: Instruction sets of the processor that matter for attention.
        cores: Logical processors this process may use.
        threads: Threads PyTorch computes with.
        memory_gib: Physical memory, 0 when unknown.
        accelerator: Name of the first CUDA or MPS device, or None.
        revision: Git commit of the library, ``+changes`` added when files differ from it, or None
            when it does not run from a checkout.
    """

    versions: dict[str, str]
    system: str
    cpu: str
    cpu_features: list[str]
    cores: int
    threads: int
    memory_gib: float
    accelerator: str | None
    revision: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary, ready for JSON."""
        return asdict(self)

    def place(self, device: str) -> str:
        """Where something ran, in words: the name of the GPU, or the number of threads."""
        if device.startswith("cuda") and self.accelerator is not None:
            return self.accelerator
        return f"{self.threads} thread(s), {device}"


def versions() -> dict[str, str]:
    """Versions of longswift, Python, the installed packages that matter and a GPU's libraries."""
    import torch

    from longswift import __version__

    found = {"longswift": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    for name, version in (("cuda", torch.version.cuda), ("rocm", torch.version.hip)):
        if version is not None:
            found[name] = version
    if torch.version.cuda is not None and torch.backends.cudnn.is_available():
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found


def _cpuinfo() -> dict[str, str]:
    """Fields of the first processor in ``/proc/cpuinfo``; empty elsewhere than on Linux."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def cpu_features() -> list[str]:
    """Instruction sets that decide how fast half precision and wide vectors are."""
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return [flag for flag in _CPU_FLAGS if flag in flags]


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_gib() -> float:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return 0.0


def _accelerator() -> str | None:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    if torch.backends.mps.is_available():
        return "Apple MPS"
    return None


@lru_cache(maxsize=1)
def revision() -> str | None:
    """Git commit of the library's own checkout, or None."""
    home = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=home, capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        # An installed copy may lie inside somebody else's repository; ours tracks this file.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        commit = git("rev-parse", "HEAD")
        return commit + ("+changes" if git("status", "--porcelain", "--", "..") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def environment() -> Environment:
    """Describe the machine and the software of this process."""
    import torch

    return Environment(
        versions=versions(),
        system=f"{platform.system()} {platform.machine()}",
        cpu=_cpuinfo().get("model name") or platform.processor() or "unknown",
        cpu_features=cpu_features(),
        cores=_cores(),
        threads=torch.get_num_threads(),
        memory_gib=_memory_gib(),
        accelerator=_accelerator(),
        revision=revision(),
    )
