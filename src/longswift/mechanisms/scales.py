"""The windows of MS-SWIFT at several scales: which head has which, and the tiles that cover it."""

from __future__ import annotations

from collections.abc import Sequence

from longswift.core.errors import ConfigError, problem
from longswift.core.pattern import Band


def windows_of_heads(
    windows: Sequence[int], scale_of_head: Sequence[int] | None, kv_heads: int
) -> tuple[int, ...]:
    """Window of each KV head, in tokens.

    Args:
        windows: Of every scale, ascending.
        scale_of_head: Index into them for each KV head; None spreads the scales over the heads in
            turn, starting with the middle one, then the next narrower.
        kv_heads: How many there are.

    Raises:
        ConfigError: Scales of another number of heads.
    """
    if scale_of_head is None:
        middle = len(windows) // 2
        order = sorted(range(len(windows)), key=lambda s: (abs(s - middle), s))
        return tuple(windows[order[head % len(order)]] for head in range(kv_heads))
    if len(scale_of_head) != kv_heads:
        raise ConfigError(
            problem(
                "MSSwift.scale_of_head",
                expected=f"{kv_heads} entries, one per KV head",
                got=f"{len(scale_of_head)} entries",
                fix="Scales belong to KV heads; a GQA group shares one.",
            )
        )
    return tuple(windows[scale] for scale in scale_of_head)


def band_of(window: int, overlap: float, block: int, grain: int, causal: bool) -> Band:
    """Tiles of about ``(1 - overlap) * window`` queries that see ``window`` keys.

    Args:
        window: Tokens.
        overlap: Share of a window that neighbouring tiles have in common.
        block: What tiles are multiples of.
        grain: What the far edge of a window is rounded up to a multiple of.
        causal: Windows end with their tile instead of lying around it.
    """
    tile = max(block, round((1 - overlap) * window) // block * block)
    beyond = max(window - tile, round(overlap * window))
    if not causal:
        beyond = -(-beyond // 2)
    beyond = -(-beyond // grain) * grain
    return Band(tile=tile, left=beyond, right=0 if causal else beyond)
