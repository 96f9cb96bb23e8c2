"""Attention alone, the cases docs/benchmarks.md reports: JSON, PNG and table under results/."""

from __future__ import annotations

import subprocess
import sys

RIVALS = ["--mechanism", "ms_swift,sliding_window"]
# Full attention in bf16 may be faster than SDPA's.
ALSO_FULL = ["--mechanism", "ms_swift,sliding_window,full"]
WIDE = ["--heads", "8", "--kv-heads", "2", "--head-dim", "128"]
SHORT = [
    "--mechanism",
    "ms_swift",
    "--lengths",
    "64,128,256,512,1024,2048,4096",
    "--repeats",
    "201",
]
CASES = {
    "attention-bf16": [*ALSO_FULL, "--dtype", "bfloat16", "--lengths", "4096,32768,131072"],
    "attention-fp32": [*RIVALS, "--dtype", "float32", "--lengths", "4096,32768,131072"],
    "attention-bf16-wide": [
        *ALSO_FULL,
        *WIDE,
        "--dtype",
        "bfloat16",
        "--lengths",
        "4096,32768,131072",
    ],
    "attention-fp32-wide": [
        *RIVALS,
        *WIDE,
        "--dtype",
        "float32",
        "--lengths",
        "4096,32768,131072",
    ],
    "attention-fp32-training": [
        *RIVALS,
        "--dtype",
        "float32",
        "--lengths",
        "1024,2048,4096,16384,32768",
        "--backward",
    ],
    "short-fp32": [*SHORT, "--dtype", "float32"],
    "short-bf16": [*SHORT, "--dtype", "bfloat16"],
    "short-fp32-wide": [*SHORT, *WIDE, "--dtype", "float32"],
    "short-bf16-wide": [*SHORT, *WIDE, "--dtype", "bfloat16"],
    "all-fp32": [
        "--mechanism",
        "all",
        "--dtype",
        "float32",
        "--lengths",
        "2k,4k,8k,16k,32k,64k,128k",
        "--repeats",
        "3",
        "--budget",
        "10",
    ],
}


LARGE = ["--heads", "32", "--kv-heads", "8", "--head-dim", "128", "--device", "cuda"]
# Only where they are named.
GPU_CASES = {
    "gpu-bf16": [
        *RIVALS,
        *LARGE,
        "--dtype",
        "bfloat16",
        "--lengths",
        "8k,16k,32k,64k,128k,256k,512k",
    ],
    "gpu-bf16-flex": [
        "--against",
        "flex",
        *LARGE,
        "--dtype",
        "bfloat16",
        "--lengths",
        "8k,32k,128k",
    ],
}


def main() -> int:
    """Run every case for a CPU, or those named on the command line."""
    cases = {**CASES, **GPU_CASES}
    unknown = set(sys.argv[1:]) - set(cases)
    if unknown:
        print(f"expected cases among {', '.join(cases)}, got {', '.join(unknown)}", file=sys.stderr)
        return 2
    for name in sys.argv[1:] or CASES:
        files = ["--json", f"results/{name}.json", "--plot", f"results/{name}.png"]
        command = [sys.executable, "-m", "longswift", "bench", "attention"]
        code = subprocess.run([*command, *cases[name], *files], check=False).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
