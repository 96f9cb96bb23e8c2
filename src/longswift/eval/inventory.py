"""What is installed and what can run on this machine."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from longswift.eval.environment import Environment, environment
from longswift.eval.text import Table


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """Everything ``longswift info`` tells.

    Attributes:
        environment: Versions and hardware.
        half_precision: What 16-bit arithmetic costs on this processor.
        backends: ``{name: {"usable": bool, "reason": str}}``.
        mechanisms: One line per mechanism.
    """

    environment: Environment
    half_precision: str
    backends: dict[str, dict[str, Any]]
    mechanisms: dict[str, str]


def _half_precision(features: list[str]) -> str:
    if "amx_bf16" in features:
        return "bfloat16 has matrix units (AMX)"
    if "avx512_bf16" in features or "bf16" in features:
        return "bfloat16 has vector instructions"
    return "bfloat16 is emulated on this processor: prefer float32"


def _backends() -> dict[str, dict[str, Any]]:
    from longswift.kernels.dispatch import available

    return {
        name: {"usable": usable, "reason": reason} for name, (usable, reason) in available().items()
    }


def _first_line(name: str) -> str:
    from longswift.mechanisms import MECHANISMS

    try:
        lines = (MECHANISMS.get(name).__doc__ or "").strip().splitlines()
    except ImportError as error:
        return f"cannot be loaded: {error}"
    return lines[0] if lines else ""


def inventory() -> Inventory:
    """Look around."""
    from longswift.mechanisms import list_mechanisms

    here = environment()
    return Inventory(
        environment=here,
        half_precision=_half_precision(here.cpu_features),
        backends=_backends(),
        mechanisms={name: _first_line(name) for name in list_mechanisms()},
    )


def as_json(found: Inventory) -> str:
    """The inventory as JSON text."""
    return json.dumps(asdict(found), indent=1)


def tables(found: Inventory) -> list[Table]:
    """The inventory for people."""
    here = found.environment
    machine = [
        ("system", here.system),
        ("processor", here.cpu),
        ("features", " ".join(here.cpu_features) or "none that matter"),
        ("16 bits", found.half_precision),
        ("cores / threads", f"{here.cores} / {here.threads}"),
        ("memory", f"{here.memory_gib:g} GiB" if here.memory_gib else "unknown"),
        ("accelerator", here.accelerator or "none"),
        ("revision", here.revision or "installed package"),
    ]
    backends = [
        (name, "yes" if entry["usable"] else "no", entry["reason"])
        for name, entry in found.backends.items()
    ]
    return [
        Table("versions", ("", "version"), list(here.versions.items())),
        Table("machine", ("", "value"), machine),
        Table("backends", ("", "usable", "why"), backends),
        Table("mechanisms", ("", "which keys a query sees"), list(found.mechanisms.items())),
    ]
