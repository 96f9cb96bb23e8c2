"""MS-SWIFT: windows at several scales, key tokens by content, and a coarse remainder.

For each KV head and block of queries the keys are, without double counting,

* **sinks**: the first ``sinks`` real tokens;
* **a window at the head's scale**: with window ``w``, tiles of about ``(1 - overlap) * w`` queries
  see the ``w`` keys that end with the tile (causal) or are centred on it (bidirectional). Exact
  nested windows add up to the widest one, so scales belong to KV heads;
* **key tokens**: the keys outside the window that the content of the block asks for, chosen by a
  ``selector``, shared by the GQA group;
* **a coarse remainder**: the unselected tokens of every pool of ``remainder`` tokens, seen once
  through their mean key and value plus the log of their count. Pools double with the position of
  the block, so that it scores at most 512 of them (see ``mechanisms.stretches``).

Causal, one head (``#`` window, ``s`` sink, ``k`` key token, ``-`` seen through a mean)::

    # . . . . . . .
    # # . . . . . .
    s # # # . . . .        rows that would see everything anyway, and rows
    s # # # # . . .        below the crossover, are computed exactly
    s - k # # # . .
    s k - - # # # .

A position bias takes part in every stage: bounds of blocks, exact scores, attention. A pool gets
its mean over the pool's tokens, as it gets the mean of their products with the query.

Rounding: tiles are multiples of ``block`` (a window shorter than a block still sees the whole
block); a window's far edge moves outwards to a multiple of the selector's ``key_block``.

| | time per query and head | memory |
|---|---|---|
| window, sinks, key tokens | O((w + sinks + key_tokens) D) | O(n) |
| selection (``centroids``) | O(min(n / 2, 16384) D + 16 key_tokens D) | O(n) |
| remainder | O(min(n / remainder, 512) D) | O(n / key_block) |
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from longswift.core.bias import PositionBias
from longswift.core.hardware import crossover
from longswift.core.mechanism import Call, Mechanism
from longswift.core.pattern import Band, BlockPattern
from longswift.core.types import AttentionResult, Partial
from longswift.kernels import dispatch
from longswift.mechanisms.by_head import attend_by_head, head_groups, visible_by_head
from longswift.mechanisms.channels import filled_up, filled_up_choice
from longswift.mechanisms.coverage import captured_mass
from longswift.mechanisms.delta import add_delta
from longswift.mechanisms.exact_rows import count_exact, limit
from longswift.mechanisms.guard import Short, fill_densely, short_blocks, show_densely
from longswift.mechanisms.in_turn import come_in_turn, forward_in_turn
from longswift.mechanisms.ms_swift_checks import check_ms_swift
from longswift.mechanisms.parts import joined, room_for
from longswift.mechanisms.patterned import attend_at_once, full_pattern, pattern_stats
from longswift.mechanisms.scales import band_of, windows_of_heads
from longswift.mechanisms.selectors import make_selector
from longswift.mechanisms.selectors.base import Request, Selection, Selector
from longswift.mechanisms.sinks import sink_slots, tokens_listed
from longswift.mechanisms.stretches import attend_by_stretch

if TYPE_CHECKING:
    from longswift.mechanisms.profile import Profile


@dataclass(frozen=True, kw_only=True)
class MSSwift(Mechanism):
    """Multi-scale sparse window attention with key tokens.

    Attributes:
        windows: Window of each scale, in tokens, ascending.
        overlap: Share of a window that neighbouring tiles have in common, between 0 and 1.
        sinks: Leading real tokens every query sees.
        key_tokens: Most tokens chosen by content per block of queries and KV head; a tuple gives
            each KV head its own budget.
        coverage: Stop choosing once every row of the block holds this share of the attention mass
            found (``key_tokens`` stays the cap), or None for a fixed budget.
        selector: How key tokens are chosen: ``"centroids"``, another name of the table in
            ``mechanisms.selectors``, or a configured one.
        remainder: Pool size of the coarse remainder, or None to drop what was not selected. Twice
            that for queries beyond ``512 * remainder``, four times beyond twice that, and so on.
        block: Queries that share a choice. With page summaries, that is behind a cache that keeps
            them, up to 8 rows (on a GPU one) choose each for itself, as in decoding.
        scale_of_head: Index into ``windows`` for each KV head; None spreads the scales over the
            heads in turn, starting with the middle one, then the next narrower.
        causality: ``"shared"``: a block's choice depends on all its rows, nothing before the block
            of a token moves. ``"strict"``: row i sees only what rows ``<= i`` asked for, nothing
            before a token moves. ``"auto"``: strict while training, shared otherwise.
            Bidirectional attention has nothing to hide and is always shared.
        dense_below: Causal rows at positions below this are computed exactly and bidirectional
            inputs shorter than this are dense. None: 4,096 (on a GPU 16,384); for a single row, as
            in decoding, up to 16 MiB of keys and values (on a GPU 4 GiB), for up to 8 rows on a CPU
            up to four times as many, and all without page summaries.
        dense_heads: KV heads that see every key.
        min_coverage: Blocks whose keys hold less than this share of the attention mass, judged by
            two probed rows (see ``mechanisms.guard``), are computed densely for that KV head. Not
            available in strict causality, where probes would look ahead.
        delta: Every ``delta``-th row (a divisor of ``block``) is computed exactly, and what the
            sparse result missed there is added to the rows that follow (see ``mechanisms.delta``);
            ``visible`` and ``lse`` stay those of the sparse result. None for no correction.
            Decoding, whose query has no exact row before it, is not corrected.
        collect: Also measure, for 64 rows of every call, which share of full attention's mass lies
            on the keys each head saw: ``stats.captured``.
    """

    name: ClassVar[str] = "ms_swift"
    supports_bias: ClassVar[bool] = True

    windows: tuple[int, ...] = (128, 512, 2048)
    overlap: float = 0.5
    sinks: int = 16
    key_tokens: int | tuple[int, ...] = 256
    coverage: float | None = None
    selector: str | dict[str, Any] | Selector = "centroids"
    remainder: int | None = 256
    block: int = 128
    scale_of_head: tuple[int, ...] | None = None
    causality: str = "auto"
    dense_below: int | None = None
    dense_heads: tuple[int, ...] = ()
    min_coverage: float | None = None
    delta: int | None = None
    collect: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "selector", make_selector(self.selector))
        for name in ("windows", "scale_of_head", "key_tokens", "dense_heads"):
            # JSON knows lists only.
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        check_ms_swift(self)

    @property
    def _selector(self) -> Selector:
        assert isinstance(self.selector, Selector)
        return self.selector

    @property
    def _heads_differ(self) -> bool:
        return bool(self.dense_heads) or not isinstance(self.key_tokens, int)

    @property
    def _budget(self) -> int:
        assert isinstance(self.key_tokens, int)
        return self.key_tokens

    def to_dict(self) -> dict[str, Any]:
        """Name and every field, JSON-ready."""
        return {**super().to_dict(), "selector": self._selector.to_dict()}

    def window_of_head(self, kv_heads: int) -> tuple[int, ...]:
        """Window of each KV head, in tokens."""
        return windows_of_heads(self.windows, self.scale_of_head, kv_heads)

    @classmethod
    def from_profile(
        cls, profile: Profile | str | Path | dict[str, Any], *, layer: int
    ) -> Mechanism:
        """What a calibrated profile (or its file) prescribes for a layer of its model.

        Raises:
            InputError: The file is no profile, or the profile knows no such layer.
        """
        from longswift.mechanisms.profile import read_profile

        return read_profile(profile).mechanism(layer)

    def _grain(self, q_len: int) -> int:
        """Granularity of window edges: the selector's wish, if blocks and pools are multiples."""
        grain = self._selector.grain(q_len)
        fits = self.block % grain == 0 and (self.remainder is None or self.remainder % grain == 0)
        return grain if fits else self._selector.key_block

    def _pool_grain(self, q_len: int, bands: tuple[Band, ...]) -> int:
        """Granularity of the remainder's sums: as coarse as the edges of bands allow."""
        if q_len == 1 or self.remainder is None:
            # A cache's pages are ready, sums of them would be a pass over all for a single query.
            return self._grain(q_len)
        edges = (edge for band in bands for edge in (band.tile, band.left, band.right))
        return math.gcd(self.block, self.remainder, *edges)

    def bands(self, q_len: int, kv_heads: int, causal: bool) -> tuple[Band, ...]:
        """Band of each KV head."""
        grain = self._grain(q_len)
        return tuple(
            band_of(window, self.overlap, self.block, grain, causal)
            for window in self.window_of_head(kv_heads)
        )

    def crossover(self, device: torch.device | str) -> int:
        """``dense_below`` on a device."""
        return crossover(device) if self.dense_below is None else self.dense_below

    def reads_summary(self, q_len: int, k: Tensor) -> bool:
        return not self._is_dense(q_len, k, True)

    def _is_dense(self, q_len: int, k: Tensor, summarised: bool) -> bool:
        below = limit(self.dense_below, q_len, k, summarised=summarised)
        # What needs bands to be seen to be dense takes the long way.
        return k.shape[2] <= below and self.scale_of_head is None

    def _exact_rows(self, q: Tensor, k: Tensor, causal: bool, summarised: bool = False) -> int:
        """Leading query rows to compute exactly: below the crossover, or with all keys in reach."""
        q_len, (kv_heads, k_len) = q.shape[2], k.shape[1:3]
        if causal and self._is_dense(q_len, k, summarised):
            return q_len
        bands, beside = self.bands(q_len, kv_heads, causal), self.sinks + self._budget
        below = limit(self.dense_below, q_len, k, summarised=summarised)
        return count_exact(bands, q_len, k_len, causal, below, self.block, beside)

    def _check_bias(self, bias: PositionBias) -> None:
        super()._check_bias(bias)
        if self.key_tokens != 0:
            self._selector.check_bias(bias)

    def _strict(self, call: Call) -> bool:
        if not call.causal:
            return False
        return self.causality == "strict" or (self.causality == "auto" and call.training)

    def exact_part(self) -> Mechanism | None:
        return replace(self, remainder=None, delta=None, collect=False)

    def _at_once(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool,
        scale: float | None,
        backend: str,
        summarised: bool,
    ) -> AttentionResult | None:
        dense = causal and self._is_dense(q.shape[2], k, summarised)
        if not dense or self._heads_differ or self.collect:
            return None
        return attend_at_once(self.name, q, k, v, causal, scale, backend)

    @filled_up
    def _forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> AttentionResult:
        if self._heads_differ:
            return attend_by_head(self.name, head_groups(self, k.shape[1]), q, k, v, call)
        name, backend = dispatch.resolve(call.backend, q.device, q, k, v, bias=call.bias)
        q_len, k_len = q.shape[2], k.shape[2]
        exact_rows = self._exact_rows(q, k, call.causal, call.summary is not None)
        if (
            exact_rows < q_len
            and not self._strict(call)
            and come_in_turn(q_len, self.block, k, call)
        ):
            return forward_in_turn(self.name, self._forward, q, k, v, call, exact_rows)
        room = room_for(backend, q, k, v, call) if 0 < exact_rows < q_len else None
        parts: list[Partial] = []
        if exact_rows:
            end = k_len - q_len + exact_rows if call.causal else k_len
            first, keys, values = q, k, v
            if exact_rows < q_len:
                first, keys, values = q[:, :, :exact_rows], k[:, :, :end], v[:, :, :end]
            everything = full_pattern(end, k.shape[1], call.causal)
            part = backend.attend(first, keys, values, everything, call.scale, bias=call.bias)
            parts.append(part)
        pattern: BlockPattern | None = None
        short: Short | None = None
        extra: dict[str, Any] = {}
        more_keys: tuple[float, ...] = ()
        if exact_rows < q_len:
            rest = q[:, :, exact_rows:]
            into = None if room is None else Partial(*(x[:, :, exact_rows:] for x in room))
            pattern, bands = self._choose(rest, k, v, call, q_len, into)
            # Decoding may be handed page summaries; longer calls derive their own pools.
            part = attend_by_stretch(backend, rest, k, v, pattern, call, bands)
            extra["selector"] = self._selector.name
            if self.min_coverage is not None:
                short = self._short_blocks(rest, k, pattern, call)
                part, more_keys = fill_densely(
                    part, rest, k, v, pattern, call.scale, short.dense, backend, call.bias
                )
                more_keys = tuple(keys + short.keys for keys in more_keys)
                extra["guard"] = {
                    "blocks": short.dense.numel(),
                    "dense": int(short.dense.sum()),
                    "lowest": short.lowest,
                    "lowest_after": short.lowest_after,
                }
            if self.delta is not None and q_len > 1:
                part, scored = add_delta(
                    part,
                    rest,
                    k,
                    v,
                    stride=self.delta,
                    causal=call.causal,
                    scale=call.scale,
                    bias=call.bias,
                )
                more_keys = tuple(x + scored for x in more_keys or (0.0,) * k.shape[1])
            parts.append(part)
        mode = "dense" if pattern is None else "strict" if self._strict(call) else "shared"
        counted = pattern or full_pattern(k_len, k.shape[1], call.causal)
        shape = q_len, k_len, exact_rows
        stats = pattern_stats(self.name, name, mode, counted, *shape, more_keys=more_keys)
        if short is not None:
            share = float(short.dense.float().mean()) * (q_len - exact_rows) / q_len
            stats = replace(stats, dense_rows=stats.dense_rows + share)
        out, lse = parts[0] if len(parts) == 1 else joined(parts[0], parts[1], room)
        if self.collect:
            dense = None if short is None else short.dense
            mass = captured_mass(q, k, pattern, call.scale, lse, exact_rows, dense, call.bias)
            stats = replace(stats, captured=mass)
        return AttentionResult(out, lse, replace(stats, extra=extra) if extra else stats)

    def _short_blocks(self, q: Tensor, k: Tensor, pattern: BlockPattern, call: Call) -> Short:
        assert self.min_coverage is not None
        asked = call.scale, self.min_coverage, call.bias
        return short_blocks(q, k, pattern, *asked, strict=self._strict(call))

    @torch.no_grad()
    def _choose(
        self, q: Tensor, k: Tensor, v: Tensor, call: Call, asked: int, into: Partial | None = None
    ) -> tuple[BlockPattern, Partial | None]:
        """The pattern of these queries, and the bands' result, which the choice needed anyway.

        ``asked`` counts all queries of the call: what is left of a text is not decoding.
        """
        _, backend = dispatch.resolve(call.backend, q.device, q, k, v, bias=call.bias)
        bands = self.bands(asked, k.shape[1], call.causal)
        pattern = BlockPattern(
            causal=call.causal,
            bands=bands,
            block=self.block,
            pool=self.remainder,
            pool_grain=self._pool_grain(asked, bands),
        )
        strict = self._strict(call)
        lengths = q.shape[2], k.shape[2]
        sinks = sink_slots(pattern, *lengths, self.sinks, k.device).expand(k.shape[0], -1, -1, -1)
        if self.key_tokens == 0:
            return replace(pattern, tokens=sinks), None
        place = {} if into is None else {"into": into}
        band_part = backend.attend_bands(q, k, v, pattern, call.scale, call.bias, **place)
        request = Request(
            q=q,
            k=k,
            scale=call.scale,
            key_block=self._grain(asked),
            pattern=pattern,
            band_lse=band_part.lse,
            sinks=self.sinks,
            budget=self._budget,
            coverage=self.coverage,
            strict=strict,
            summary=call.summary,
            bias=call.bias,
            best_blocks=getattr(backend, "best_blocks", None),
            choose_by_bounds=dispatch.chooser(backend, q.device),
        )
        found: Selection = self._selector.select(request)
        since = found.visible_from
        if since is not None:
            since = torch.cat([torch.zeros_like(sinks), since], 3)
        # Statistics that read the tokens wait for a device, or take as long as a row's attention.
        known = since is None and self.coverage is None and self._selector.fills_budget
        known &= not q.is_cpu or lengths[0] == 1
        listed = tokens_listed(pattern, *lengths, self.sinks, self._budget) if known else None
        tokens = torch.cat([sinks, found.tokens], 3)
        pattern = replace(pattern, tokens=tokens, visible_from=since, listed=listed)
        return pattern, band_part

    @filled_up_choice
    def _visible(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        if self._heads_differ:
            return visible_by_head(head_groups(self, k.shape[1]), q, k, call)
        q_len, k_len, groups = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
        exact_rows = self._exact_rows(q, k, call.causal)
        seen = full_pattern(k_len, k.shape[1], call.causal).visible(q_len, k_len, groups, q.device)
        if exact_rows == q_len:
            return seen
        rest = q[:, :, exact_rows:]
        pattern, _ = self._choose(rest, k, k, call, q_len)
        part = pattern.visible(rest.shape[2], k_len, groups, q.device)
        seen = seen.expand(q.shape[0], -1, -1, -1)
        if self.min_coverage is not None:
            dense = self._short_blocks(rest, k, pattern, call).dense
            part = show_densely(part, seen[:, :, exact_rows:], dense, self.block)
        return torch.cat([seen[:, :, :exact_rows], part], 2)
