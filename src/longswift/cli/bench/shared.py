"""Options that the benchmarks share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

Model = Annotated[
    str, typer.Argument(help="'random-llama[-8b]', 'tiny', a model directory or a hub name.")
]
Mechanism = Annotated[str, Option(help="Mechanisms, comma-separated.")]
Settings = Annotated[
    list[str] | None, Option("--set", help="NAME.OPTION=VALUE of a mechanism; repeat at will.")
]
Against = Annotated[str, Option(help="Baseline: sdpa, or flex where it runs.")]
Batches = Annotated[str, Option(help="Sequences per call, e.g. 1,8.")]
Memory = Annotated[bool, Option(help="Also measure peak memory (one more run).")]
Dtype = Annotated[str, Option(help="float32, bfloat16, float16 or float64.")]
Device = Annotated[str, Option(help="cpu, cuda, mps.")]
Repeats = Annotated[int, Option(help="Timed runs; slow cases get fewer.")]
Budget = Annotated[float, Option(help="Seconds per rival and case.")]
Seed = Annotated[int, Option(help="Seed of texts, caches and random weights.")]
Json = Annotated[Path | None, Option(help="Write the result; an interrupted run resumes.")]
Plot = Annotated[Path | None, Option(help="Draw a PNG or SVG.")]
Fresh = Annotated[bool, Option(help="Ignore what an interrupted run left.")]
