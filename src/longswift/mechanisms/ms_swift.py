"""MS-SWIFT: windows at several scales, key tokens by content, and a coarse remainder.

For each KV head and block of queries the keys are, without double counting,

* **sinks**: the first ``sinks`` real tokens;
* **a window at the head's scale**: with window ``w``, tiles of about ``(1 - overlap) * w`` queries
  see the ``w`` keys that end with the tile (causal) or are centred on it (bidirectional). Exact
  nested windows add up to the widest one, so scales belong to KV heads;
* **key tokens**: the keys outside the window that the content of the block asks for, chosen by a
  ``selector``, shared by the GQA group;
* **a coarse remainder**: the unselected tokens of every pool of ``remainder`` tokens, seen once
  through their mean key and value plus the log of their count.

Causal, one head (``#`` window, ``s`` sink, ``k`` key token, ``-`` seen through a mean)::

    # . . . . . . .
    # # . . . . . .
    s # # # . . . .        rows that would see everything anyway, and rows
    s # # # # . . .        below the crossover, are computed exactly
    s - k # # # . .
    s k - - # # # .

Rounding: tiles are multiples of ``block`` (a window shorter than a block still sees the whole
block); a window's far edge moves outwards to a multiple of the selector's ``key_block``.

| | time per query and head | memory |
|---|---|---|
| window, sinks, key tokens | O((w + sinks + key_tokens) D) | O(n) |
| selection (``bounds``) | O(n D / 85 + 4 key_tokens D) | O(n) |
| remainder | O(n / remainder * D) | O(n / key_block) |
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from longswift.core.errors import ConfigError, problem
from longswift.core.mechanism import Call, Mechanism, check_positive
from longswift.core.pattern import Band, BlockPattern
from longswift.core.pools import block_edges
from longswift.core.types import AttentionResult, AttentionStats, Partial
from longswift.kernels import dispatch
from longswift.mechanisms.full import full_pattern
from longswift.mechanisms.patterned import dense_keys, pattern_stats
from longswift.mechanisms.selectors import make_selector
from longswift.mechanisms.selectors.base import EMPTY, Request, Selection, Selector


@dataclass(frozen=True, kw_only=True)
class MSSwift(Mechanism):
    """Multi-scale sparse window attention with key tokens.

    Attributes:
        windows: Window of each scale, in tokens, ascending.
        overlap: Share of a window that neighbouring tiles have in common, between 0 and 1.
        sinks: Leading real tokens every query sees.
        key_tokens: Most tokens chosen by content per block of queries and KV head.
        coverage: Stop choosing once every row of the block holds this share of the attention mass
            found (``key_tokens`` stays the cap), or None for a fixed budget.
        selector: How key tokens are chosen: ``"bounds"``, ``"antidiagonal"``, or a configured one.
        remainder: Pool size of the coarse remainder, or None to drop what was not selected.
        block: Queries that share a choice.
        scale_of_head: Index into ``windows`` for each KV head; None spreads the scales over the
            heads in turn, starting with the middle one, then the next narrower.
        causality: ``"shared"``: a block's choice depends on all its rows, nothing before the block
            of a token moves. ``"strict"``: row i sees only what rows ``<= i`` asked for, nothing
            before a token moves. ``"auto"``: strict while training, shared otherwise.
            Bidirectional attention has nothing to hide and is always shared.
        dense_below: Causal rows at positions below this are computed exactly, because that is
            cheaper there; bidirectional inputs shorter than this are dense.
    """

    name: ClassVar[str] = "ms_swift"

    windows: tuple[int, ...] = (128, 512, 2048)
    overlap: float = 0.5
    sinks: int = 16
    key_tokens: int = 256
    coverage: float | None = None
    selector: str | dict[str, Any] | Selector = "bounds"
    remainder: int | None = 256
    block: int = 128
    scale_of_head: tuple[int, ...] | None = None
    causality: str = "auto"
    dense_below: int = 4096

    def __post_init__(self) -> None:
        check_positive("MSSwift", block=self.block)
        for name in ("sinks", "key_tokens", "dense_below"):
            self._require(
                type(getattr(self, name)) is int and getattr(self, name) >= 0,
                name,
                "an integer >= 0",
                "Use 0 to turn it off.",
            )
        object.__setattr__(self, "selector", make_selector(self.selector))
        for name in ("windows", "scale_of_head"):
            # JSON knows lists only.
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        windows = self.windows
        self._require(
            isinstance(windows, tuple)
            and len(windows) > 0
            and all(type(w) is int and w > 0 for w in windows)
            and list(windows) == sorted(set(windows)),
            "windows",
            "a tuple of distinct ascending window sizes in tokens",
            "For example windows=(128, 512, 2048).",
        )
        self._require(
            _is_share(self.overlap) and self.overlap < 1.0,
            "overlap",
            "a share above 0 and below 1",
            "Use 0.2 to 0.5.",
        )
        self._require(
            self.coverage is None or _is_share(self.coverage),
            "coverage",
            "None or a share in (0, 1]",
            "For example coverage=0.95.",
        )
        self._require(
            self.causality in ("auto", "shared", "strict"),
            "causality",
            "'auto', 'shared' or 'strict'",
            "Leave it at 'auto'.",
        )
        key_block = self._selector.key_block
        self._require(
            self.block % key_block == 0,
            "block",
            f"a multiple of the selector's key_block={key_block}",
            "Use block=128, or a selector with smaller key blocks.",
        )
        self._require(
            self.remainder is None
            or (isinstance(self.remainder, int) and self.remainder > 0)
            and self.remainder % key_block == 0,
            "remainder",
            f"None or a multiple of the selector's key_block={key_block}",
            "For example remainder=256.",
        )
        self._require(
            self.scale_of_head is None
            or isinstance(self.scale_of_head, tuple)
            and all(isinstance(s, int) and 0 <= s < len(windows) for s in self.scale_of_head),
            "scale_of_head",
            f"one index below {len(windows)} per KV head",
            "Leave it None to spread the scales over the heads.",
        )

    def _require(self, fine: bool, name: str, expected: str, fix: str) -> None:
        if not fine:
            got = repr(getattr(self, name))
            raise ConfigError(problem(f"MSSwift.{name}", expected=expected, got=got, fix=fix))

    @property
    def _selector(self) -> Selector:
        assert isinstance(self.selector, Selector)
        return self.selector

    def to_dict(self) -> dict[str, Any]:
        """Name and every field, JSON-ready."""
        return {**super().to_dict(), "selector": self._selector.to_dict()}

    def window_of_head(self, kv_heads: int) -> tuple[int, ...]:
        """Window of each KV head, in tokens."""
        if self.scale_of_head is None:
            middle = len(self.windows) // 2
            order = sorted(range(len(self.windows)), key=lambda s: (abs(s - middle), s))
            return tuple(self.windows[order[head % len(order)]] for head in range(kv_heads))
        if len(self.scale_of_head) != kv_heads:
            raise ConfigError(
                problem(
                    "MSSwift.scale_of_head",
                    expected=f"{kv_heads} entries, one per KV head",
                    got=f"{len(self.scale_of_head)} entries",
                    fix="Scales belong to KV heads; a GQA group shares one.",
                )
            )
        return tuple(self.windows[scale] for scale in self.scale_of_head)

    def bands(self, q_len: int, kv_heads: int, causal: bool) -> tuple[Band, ...]:
        """Band of each KV head."""
        grain = self._selector.grain(q_len)
        bands = []
        for window in self.window_of_head(kv_heads):
            tile = max(self.block, round((1 - self.overlap) * window) // self.block * self.block)
            beyond = max(window - tile, round(self.overlap * window))
            if not causal:
                beyond = -(-beyond // 2)
            beyond = -(-beyond // grain) * grain
            bands.append(Band(tile=tile, left=beyond, right=0 if causal else beyond))
        return tuple(bands)

    def _exact_rows(self, q_len: int, k_len: int, kv_heads: int, causal: bool) -> int:
        """Leading query rows to compute exactly: below the crossover, or with all keys in reach."""
        below = -(-self.dense_below // self.block) * self.block
        if causal and k_len <= below and self.scale_of_head is None:
            return q_len
        bands = self.bands(q_len, kv_heads, causal)
        if not causal:
            reach = min(band.tile + 2 * band.left for band in bands) + self.sinks + self.key_tokens
            return q_len if k_len < self.dense_below or k_len <= reach else 0
        covered = min(
            ((self.sinks + self.key_tokens + band.left) // band.tile + 1) * band.tile
            for band in bands
        )
        return min(q_len, max(0, max(below, covered) - (k_len - q_len)))

    def _strict(self, call: Call) -> bool:
        if not call.causal:
            return False
        return self.causality == "strict" or (self.causality == "auto" and call.training)

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> AttentionResult:
        name, backend = dispatch.resolve(call.backend, q.device)
        q_len, k_len = q.shape[2], k.shape[2]
        exact_rows = self._exact_rows(q_len, k_len, k.shape[1], call.causal)
        parts: list[Partial] = []
        stats = AttentionStats(
            mechanism=self.name,
            backend=name,
            mode="dense",
            keys_per_query=dense_keys(q_len, k_len, call.causal),
            density=1.0,
            dense_rows=1.0,
        )
        if exact_rows:
            end = k_len - q_len + exact_rows if call.causal else k_len
            first, keys, values = q, k, v
            if exact_rows < q_len:
                first, keys, values = q[:, :, :exact_rows], k[:, :, :end], v[:, :, :end]
            dense = full_pattern(end, k.shape[1], call.causal)
            parts.append(backend.attend(first, keys, values, dense, call.scale))
        if exact_rows < q_len:
            rest = q[:, :, exact_rows:]
            pattern, bands = self._choose(rest, k, v, call)
            # Decoding may be handed page summaries; longer calls derive their own pools.
            parts.append(
                backend.attend(rest, k, v, pattern, call.scale, bands=bands, summary=call.summary)
            )
            mode = "strict" if self._strict(call) else "shared"
            stats = pattern_stats(self.name, name, mode, pattern, q_len, k_len, exact_rows)
            stats = replace(stats, extra={"selector": self._selector.name})
        if len(parts) == 1:
            return AttentionResult(parts[0].out, parts[0].lse, stats)
        out, lse = (torch.cat([p[i] for p in parts], 2) for i in range(2))
        return AttentionResult(out, lse, stats)

    @torch.no_grad()
    def _choose(
        self, q: Tensor, k: Tensor, v: Tensor, call: Call
    ) -> tuple[BlockPattern, Partial | None]:
        """The pattern of these queries, and the bands' result, which the choice needed anyway."""
        _, backend = dispatch.resolve(call.backend, q.device)
        bands = self.bands(q.shape[2], k.shape[1], call.causal)
        pattern = BlockPattern(
            causal=call.causal,
            bands=bands,
            block=self.block,
            pool=self.remainder,
            pool_grain=self._selector.grain(q.shape[2]),
        )
        strict = self._strict(call)
        sinks = self._sink_slots(pattern, q.shape[2], k)
        if self.key_tokens == 0:
            return replace(pattern, tokens=sinks), None
        band_part = backend.attend_bands(q, k, v, pattern, call.scale)
        request = Request(
            q=q,
            k=k,
            scale=call.scale,
            pattern=pattern,
            band_lse=band_part.lse,
            sinks=self.sinks,
            budget=self.key_tokens,
            coverage=self.coverage,
            strict=strict,
            summary=call.summary,
        )
        found: Selection = self._selector.select(request)
        since = found.visible_from
        if since is not None:
            since = torch.cat([torch.zeros_like(sinks), since], 3)
        tokens = torch.cat([sinks, found.tokens], 3)
        return replace(pattern, tokens=tokens, visible_from=since), band_part

    def _sink_slots(self, pattern: BlockPattern, q_len: int, k: Tensor) -> Tensor:
        """Sinks outside each block's band, int32 ``[B, Hkv, N, sinks]``."""
        k_len = k.shape[2]
        start, end = block_edges(pattern, q_len, k_len)[..., None].unbind(-2)
        token = torch.arange(min(self.sinks, k_len), dtype=torch.int32, device="cpu")
        slots = torch.where((token < start) | (token >= end), token, EMPTY).to(torch.int32)
        return slots.to(k.device).expand(k.shape[0], -1, -1, -1)

    def _visible(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        q_len, k_len, groups = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
        exact_rows = self._exact_rows(q_len, k_len, k.shape[1], call.causal)
        seen = full_pattern(k_len, k.shape[1], call.causal).visible(q_len, k_len, groups, q.device)
        if exact_rows == q_len:
            return seen
        rest = q[:, :, exact_rows:]
        pattern, _ = self._choose(rest, k, k, call)
        part = pattern.visible(rest.shape[2], k_len, groups, q.device)
        seen = seen.expand(part.shape[0], -1, -1, -1)
        return torch.cat([seen[:, :, :exact_rows], part], 2)


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and value is not True and 0.0 < value <= 1.0
