"""Compiles the kernels for this machine, once, into the user's cache; nothing compiles by itself.

The library is called through ``torch.ops``, so that it needs no Python headers. Its name holds
everything it depends on: the sources, torch, the flags and the instructions of the processor.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from longswift.core.errors import UnsupportedError, problem

_SOURCES = (
    "band_gradients.cpp",
    "boxes.cpp",
    "bytes.cpp",
    "choose.cpp",
    "choose_columns.cpp",
    "finite.cpp",
    "gathered.cpp",
    "gathered_gradients.cpp",
    "merge_by_row.cpp",
    "ops.cpp",
    "strict.cpp",
    "tiles.cpp",
    "whole.cpp",
)
# Compiled for OpenMP, not linked to it: it is torch's own copy, and so are the threads.
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-Wno-unknown-pragmas")
_NAME = "longswift_native"


def cache_folder() -> Path:
    """Where compiled kernels lie: ``LONGSWIFT_CACHE``, or ``longswift`` in the user's cache."""
    given = os.environ.get("LONGSWIFT_CACHE")
    if given:
        return Path(given)
    home = os.environ.get("XDG_CACHE_HOME")
    return Path(home or os.path.expanduser("~/.cache")) / "longswift"


@functools.cache
def library() -> Path:
    """Where the library for this torch, processor and source lies, if it has been built."""
    digest = hashlib.sha256()
    for file in sorted(_folder().iterdir()):
        digest.update(file.read_bytes())
    for fact in (torch.__version__, *_flags(), _instructions()):
        digest.update(fact.encode())
    return cache_folder() / digest.hexdigest()[:16] / f"{_NAME}.so"


def supported() -> str | None:
    """Why this platform cannot run the kernels at all, or None."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "the compiled kernels are for Linux on x86-64"
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return "the processor has no AVX2"
    return None


def build() -> Path:
    """Compile the library unless it is there; takes a few minutes.

    Raises:
        UnsupportedError: The platform is not supported, there is no compiler, or compiling fails.
    """
    target = library()
    if target.exists():
        return target
    reason = supported()
    if reason is not None:
        raise UnsupportedError(
            problem("native kernels", expected="a supported platform", got=reason, fix=_WITHOUT)
        )
    for tool in ("c++", "ninja"):
        if shutil.which(tool, path=_path()) is None:
            raise UnsupportedError(
                problem(
                    "native kernels",
                    expected=f"{tool} on the PATH",
                    got="none",
                    fix=f"Install a C++ compiler and `pip install 'longswift[native]'`. {_WITHOUT}",
                )
            )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            # In a process of its own, because the builder also loads what it has built.
            done = subprocess.run(
                [sys.executable, "-c", f"from {__name__} import _compile; _compile({folder!r})"],
                env={**os.environ, "PATH": _path()},
                capture_output=True,
                text=True,
                check=False,
            )
            built = Path(folder) / target.name
            if done.returncode or not built.exists():
                raise UnsupportedError(
                    problem(
                        "native kernels",
                        expected="the compiler to accept the sources",
                        got=(done.stderr or done.stdout).strip()[-2000:] or "no library",
                        fix=_WITHOUT,
                    )
                )
            os.replace(built, target)
    except OSError as error:
        raise UnsupportedError(
            problem(
                "native kernels",
                expected="a folder that can be written to",
                got=str(error),
                fix=f"Set LONGSWIFT_CACHE to one. {_WITHOUT}",
            )
        ) from error
    return target


def _compile(folder: str) -> None:
    from torch.utils import cpp_extension

    cpp_extension.load(
        _NAME,
        [str(_folder() / source) for source in _SOURCES],
        build_directory=folder,
        extra_cflags=list(_flags()),
        is_python_module=False,
    )


_WITHOUT = "Everything works without them, slower."


def _folder() -> Path:
    return Path(__file__).parent / "csrc"


def _flags() -> tuple[str, ...]:
    capability = torch.backends.cpu.get_cpu_capability()
    return *_FLAGS, f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"


def _instructions() -> str:
    """What ``-march=native`` looks at."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return "".join(
        next((line for line in lines if line.startswith(name)), "")
        for name in ("vendor_id", "cpu family", "model\t", "flags")
    )


def _path() -> str:
    """The PATH, and where this environment keeps its programs, activated or not."""
    return os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
