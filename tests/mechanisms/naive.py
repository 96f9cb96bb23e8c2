"""MS-SWIFT once more, from its description alone: one row, one head, one key at a time.

Nothing here calls the library. Slow, for one unpadded sequence of a hundred tokens or so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max())
    return e / e.sum()


class Asked(NamedTuple):
    """What a block of rows of one KV head asks about.

    Attributes:
        q: ``[G, rows, D]``, scaled.
        k: ``[Lk, D]``.
        start: Position of the block's first row on the grid of blocks.
        outside: Key blocks outside the window.
        window: ``[G, rows]`` log-sum-exp over the window.
    """

    q: Array
    k: Array
    start: int
    outside: list[int]
    window: Array

    def keys(self, block: int, size: int) -> Array:
        """Keys of a block of ``size``."""
        return self.k[block * size : (block + 1) * size]


def log_sum_of_best(scores: Array, places: Array, together: int = 16) -> Array:
    """Log-sum-exp over the best of every so many places in a row of ``scores [*, n]``."""
    parts = {int(place) // together for place in places}
    best = [scores[..., places // together == part].max(-1) for part in parts]
    return np.logaddexp.reduce(best)


@dataclass(frozen=True, kw_only=True)
class NaiveSwift:
    """The options of ``MSSwift`` and of its ``bounds`` selector that decide what is seen."""

    windows: tuple[int, ...]
    overlap: float = 0.5
    sinks: int = 4
    key_tokens: int = 16
    coverage: float | None = None
    block: int = 16
    dense_below: int = 0
    key_block: int = 8
    row_group: int = 4
    proposals: int = 2
    most_proposals: int = 3
    key_radius: float = 0.5
    row_radius: float = 0.25
    page_radius: float = 0.75
    least_share: float = 0.125
    tree: int | None = None
    beam: int = 1
    remainder: int | None = None
    # Pools that may lie before a block of queries.
    most_pools: int = 512
    strict: bool = False
    causal: bool = True
    # By query head and key position minus query position, [Hq, 2 * most + 1]; while one block
    # chooses, of its heads.
    bias: Array | None = None
    # Of the rows of the block that chooses.
    positions: tuple[int, ...] = ()

    selector: ClassVar[str] = "bounds"
    # Whether decoding is by pages.
    pages: ClassVar[bool] = True

    def added(self, head: int, offset: int) -> float:
        """What a head's score grows by; beyond the table as at its end."""
        if self.bias is None:
            return 0.0
        most = self.bias.shape[1] // 2
        return float(self.bias[head, min(max(offset, -most), most) + most])

    def scores(self, q: Array, k: Array, keys: list[int], positions: tuple[int, ...]) -> Array:
        """``[G, rows, keys]`` of scaled queries ``[G, rows, D]``."""
        if self.bias is None:
            return np.asarray(q @ k[keys].T)
        added = [[[self.added(g, j - p) for j in keys] for p in positions] for g in range(len(q))]
        return q @ k[keys].T + np.array(added).reshape(*q.shape[:2], len(keys))

    def most_added(self, head: int, block: int, positions: tuple[int, ...], n: int) -> float:
        """Largest bias between a block of keys, complete or not, and some queries."""
        if self.bias is None:
            return 0.0
        keys = range(block * self.key_block, (block + 1) * self.key_block)
        return max(self.added(head, j - p) for j in keys for p in positions if j - p < n)

    def with_pages(self, q_len: int) -> NaiveSwift:
        """Itself, with blocks of 16 keys if a single query is decoded and they fit."""
        fits = (
            16 % self.key_block == 0 and self.block % 16 == 0 and (self.remainder or 16) % 16 == 0
        )
        decodes = q_len == 1 and fits and self.pages
        if not decodes or self.key_block == 16:
            return self
        return replace(self, key_block=16, key_radius=self.page_radius)

    def scale_order(self) -> list[int]:
        """Windows in the order in which heads take them: the middle one, then the next narrower."""
        middle = len(self.windows) // 2
        order = sorted(range(len(self.windows)), key=lambda i: (abs(i - middle), i))
        return [self.windows[i] for i in order]

    def shape(self, window: int) -> tuple[int, int]:
        """Tile and reach beyond it of a window."""
        tile = max(self.block, int(round((1 - self.overlap) * window)) // self.block * self.block)
        beyond = max(window - tile, round(self.overlap * window))
        if not self.causal:
            beyond = math.ceil(beyond / 2)
        return tile, math.ceil(beyond / self.key_block) * self.key_block

    def band(self, window: int, position: int, n: int) -> tuple[int, int]:
        """First and one-past-last key of the window of the query at ``position``."""
        tile, beyond = self.shape(window)
        start = position // tile * tile
        return max(0, start - beyond), min(n, start + tile + (0 if self.causal else beyond))

    def pool_size(self, position: int, n: int) -> int:
        """Tokens per pool for the query at ``position``: doubled until few lie before its block."""
        assert self.remainder is not None
        begins = position // self.block * self.block if self.causal else n - 1
        size = self.remainder
        while begins >= self.most_pools * size:
            size *= 2
        return size

    def dense_until(self, n: int, kv_heads: int) -> int:
        """Position of the first row that is not computed exactly."""
        windows = [self.scale_order()[h % len(self.windows)] for h in range(kv_heads)]
        seen = self.sinks + self.key_tokens
        if not self.causal:
            reach = min(self.shape(w)[0] + 2 * self.shape(w)[1] for w in windows) + seen
            return n if n < self.dense_below or n <= reach else 0
        covered = []
        for window in windows:
            tile, beyond = self.shape(window)
            position = 0
            while position // tile * tile - beyond <= seen:
                position += tile
            covered.append(position)
        return max(min(covered), math.ceil(self.dense_below / self.block) * self.block)

    def visible(self, q: Array, k: Array, scale: float) -> NDArray[np.bool_]:
        """Which keys each query sees: ``q [Hq, Lq, D]``, ``k [Hkv, Lk, D]`` to ``[Hq, Lq, Lk]``."""
        heads, q_len, _ = q.shape
        kv_heads, n, _ = k.shape
        groups = heads // kv_heads
        offset = n - q_len
        seen = np.zeros((heads, q_len, n), dtype=bool)
        dense = self.with_pages(q_len).dense_until(n, kv_heads)
        for row in range(q_len):
            if offset + row < dense:
                seen[:, row, : offset + row + 1 if self.causal else n] = True
        first_row = max(0, dense - offset)
        rest = self.with_pages(q_len)
        for kv in range(kv_heads):
            window = self.scale_order()[kv % len(self.windows)]
            own = slice(kv * groups, (kv + 1) * groups)
            for rows in self.row_blocks(first_row, q_len, offset):
                start, end = rest.band(window, offset + rows[0], n)
                alone = replace(
                    rest,
                    bias=None if self.bias is None else self.bias[own],
                    positions=tuple(offset + row for row in rows),
                )
                since = alone.choose(q[own][:, rows] * scale, k[kv], rows, offset, start, end)
                for row in rows:
                    position = offset + row
                    keys = [j for j in range(n) if start <= j < end or j < self.sinks]
                    keys += [j for j, first in since.items() if first <= position]
                    for j in keys:
                        if not self.causal or j <= position:
                            seen[own, row, j] = True
        return seen

    def row_blocks(self, first_row: int, q_len: int, offset: int) -> list[list[int]]:
        blocks: dict[int, list[int]] = {}
        for row in range(first_row, q_len):
            blocks.setdefault((offset + row) // self.block, []).append(row)
        return list(blocks.values())

    def choose(
        self, q: Array, k: Array, rows: list[int], offset: int, start: int, end: int
    ) -> dict[int, int]:
        """Key tokens of one block and KV head, and the first query position that sees each.

        Args:
            q: ``[G, rows, D]``, scaled.
            k: ``[Lk, D]``.
            rows: Query rows of the block.
            offset: Position of query row 0.
            start: First key of the window.
            end: One past its last key.
        """
        n = len(k)
        outside = self.outside(n, start, end)
        if self.key_tokens == 0 or not outside:
            return {}
        window = self.window_lse(q, k, rows, offset, start, end)
        asked = Asked(q, k, (offset + rows[0]) // self.block * self.block, outside, window)
        sink_blocks = [b for b in outside if b * self.key_block < self.sinks]
        if self.strict and self.causal:
            return self.choose_strictly(asked, rows, offset, sink_blocks)
        # Few rows are offered as much as costs what a complete block costs.
        offered = min(self.most_proposals, self.proposals * self.block // len(rows))
        offered = max(self.proposals, offered)
        wanted = math.ceil(offered * self.key_tokens / self.key_block)
        if len(rows) == 1 < self.block:
            before = offset + rows[0] if self.causal else len(k)
            wanted = max(wanted, math.ceil(self.least_share * before / self.key_block))
        proposed = self.propose(asked, sink_blocks, wanted)
        tokens = self.tokens_of([*proposed, *sink_blocks], n)
        probs = self.probabilities(q, k, tokens, window)
        scores = self.scores(q, k, tokens, self.positions)
        total = np.logaddexp(log_sum_of_best(scores, np.argsort(np.argsort(tokens))), window)
        best = (scores - total[..., None]).max((0, 1))
        free = [i for i, t in enumerate(tokens) if t >= self.sinks]
        chosen = sorted(free, key=lambda i: -best[i])[: self.key_tokens]
        if self.coverage is not None:
            chosen = self.cover(chosen, tokens, probs, q, k, window)
        return {tokens[i]: 0 for i in chosen}

    def outside(self, n: int, start: int, end: int) -> list[int]:
        """Key blocks before the window and, in bidirectional attention, after it."""
        found = []
        for b in range(math.ceil(n / self.key_block)):
            first, last = b * self.key_block, (b + 1) * self.key_block
            if last <= start or not self.causal and first >= end:
                found.append(b)
        return found

    def window_lse(
        self, q: Array, k: Array, rows: list[int], offset: int, start: int, end: int
    ) -> Array:
        """What the window already holds takes part in every probability."""
        window = np.empty(q.shape[:2])
        for g in range(q.shape[0]):
            for i, row in enumerate(rows):
                last = min(end, offset + row + 1) if self.causal else end
                scores = self.scores(q, k, list(range(start, last)), self.positions)
                window[g, i] = np.logaddexp.reduce(scores[g, i])
        return window

    def propose(self, asked: Asked, sink_blocks: list[int], wanted: int) -> list[int]:
        """The key blocks that are worth most."""
        rank = self.worth(asked)
        free = set(asked.outside) - set(sink_blocks)
        return sorted(free, key=lambda b: -rank[b])[:wanted]

    def worth(self, asked: Asked) -> dict[int, float]:
        """What every candidate is worth to the block: the best of its groups of rows and heads."""
        rank = dict.fromkeys(asked.outside, -math.inf)
        parts = self.row_groups(asked.q)
        each = len(parts) // len(asked.q)
        for index, part in enumerate(parts):
            first = index % each * parts[0].shape[0]
            places = self.positions[first : first + len(part)]
            bounds = [
                self.bound(part, asked.keys(b, self.key_block))
                + self.most_added(index // each, b, places, len(asked.k))
                for b in asked.outside
            ]
            for b, p in zip(asked.outside, softmax(np.array(bounds)), strict=True):
                rank[b] = max(rank[b], p)
        return rank

    def row_groups(self, q: Array) -> list[Array]:
        """Rows that are bounded together; those of a cut block are bounded one by one."""
        rows = q.shape[1]
        group = 1 if rows < self.block or rows == 1 else self.row_group
        return [q[g, i : i + group] for g in range(q.shape[0]) for i in range(0, rows, group)]

    def worth_to_row(self, asked: Asked, g: int, i: int) -> Array:
        """What every candidate is worth to one row of one head, for strict causality."""
        row = asked.q[g, i : i + 1]
        bounds = [
            self.bound(row, asked.keys(b, self.key_block))
            + self.most_added(g, b, self.positions[i : i + 1], len(asked.k))
            for b in asked.outside
        ]
        return softmax(np.array(bounds))

    def bound(self, q: Array, keys: Array) -> float:
        """Upper bound of every score between two boxes, their radii shrunk."""
        qc, qr = (q.max(0) + q.min(0)) / 2, (q.max(0) - q.min(0)) / 2
        kc, kr = (keys.max(0) + keys.min(0)) / 2, (keys.max(0) - keys.min(0)) / 2
        a, b = self.key_radius, self.row_radius
        return float(qc @ kc + a * (abs(qc) + b * qr) @ kr + b * qr @ abs(kc))

    def tokens_of(self, blocks: list[int], n: int) -> list[int]:
        size = self.key_block
        return [j for b in blocks for j in range(b * size, min((b + 1) * size, n))]

    def probabilities(
        self,
        q: Array,
        k: Array,
        tokens: list[int],
        window: Array,
        rows: slice = slice(None),
    ) -> Array:
        """Exact probabilities of ``tokens``, normalised with the window, ``[G, rows, tokens]``."""
        scores = self.scores(q, k, tokens, self.positions[rows])
        total = np.logaddexp(np.logaddexp.reduce(scores, -1), window)
        return np.exp(scores - total[..., None])

    def cover(
        self,
        chosen: list[int],
        tokens: list[int],
        probs: Array,
        q: Array,
        k: Array,
        window: Array,
    ) -> list[int]:
        """The best tokens until every row has the coverage; the one that crosses it stays."""
        assert self.coverage is not None
        scores = self.scores(q, k, tokens, self.positions)
        total = np.logaddexp(np.logaddexp.reduce(scores, -1), window)
        have = np.exp(window - total)
        have = have + probs[..., [i for i, t in enumerate(tokens) if t < self.sinks]].sum(-1)
        kept = []
        for i in chosen:
            if (have < self.coverage).any():
                kept.append(i)
            have = have + probs[..., i]
        return kept

    def choose_strictly(
        self, asked: Asked, rows: list[int], offset: int, sink_blocks: list[int]
    ) -> dict[int, int]:
        """First come, first served: every row adds what it wants to what earlier rows took."""
        q, k, _, outside, window = asked
        size = self.key_block
        candidates = [b for b in outside if b not in sink_blocks]
        worth = np.zeros((len(rows), len(candidates)))
        for g in range(q.shape[0]):
            for i in range(len(rows)):
                shares = dict(zip(outside, self.worth_to_row(asked, g, i), strict=True))
                worth[i] = np.maximum(worth[i], [shares[b] for b in candidates])
        wanted = math.ceil(self.proposals * self.key_tokens / size)
        turns = self.in_turn(worth, wanted, self.block)
        proposed = {candidates[c]: row for c, row in turns.items()}
        order = [*proposed, *sink_blocks]
        tokens = self.tokens_of(order, len(k))
        since = {t: proposed.get(t // size, 0) for t in tokens}
        want = np.zeros((len(rows), len(tokens)))
        for i in range(len(rows)):
            shown = [c for c, t in enumerate(tokens) if since[t] <= i]
            now = slice(i, i + 1)
            some = [tokens[c] for c in shown]
            probs = self.probabilities(q[:, now], k, some, window[:, now], now)
            for c, p in zip(shown, probs[:, 0].max(0), strict=True):
                want[i, c] = 0.0 if tokens[c] < self.sinks else p
        chosen = self.in_turn(want, self.key_tokens, self.block)
        return {tokens[c]: offset + rows[row] for c, row in chosen.items()}

    def in_turn(self, want: Array, budget: int, rows: int) -> dict[int, int]:
        """Column to the row that took it: a quarter of the budget at once, the rest evenly."""
        taken: dict[int, int] = {}
        given, at_once = 0, max(1, budget // 4)
        for row in range(len(want)):
            due = at_once + (budget - at_once) * (row + 1) // rows
            quota, given = due - given, due
            free = [c for c in range(want.shape[1]) if c not in taken and want[row, c] > 0]
            for c in sorted(free, key=lambda c: -want[row, c])[:quota]:
                taken[c] = row
        return taken

    def attend(self, q: Array, k: Array, v: Array, scale: float) -> tuple[Array, Array]:
        """Output and log-sum-exp under ``visible``, the remainder's pools by explicit loops."""
        heads, q_len, _ = q.shape
        kv_heads, n, _ = k.shape
        seen = self.visible(q, k, scale)
        dense = self.with_pages(q_len).dense_until(n, kv_heads)
        pages = self.with_pages(q_len)
        out, lse = np.zeros((heads, q_len, v.shape[-1])), np.zeros((heads, q_len))
        for h in range(heads):
            kv = h * kv_heads // heads
            window = self.scale_order()[kv % len(self.windows)]
            for row in range(q_len):
                position = n - q_len + row
                exact = np.flatnonzero(seen[h, row])
                added = [self.added(h, int(j) - position) for j in exact]
                scores, values = [k[kv, exact] @ q[h, row] * scale + added], [v[kv, exact]]
                if self.remainder is not None and position >= dense:
                    start, end = pages.band(window, position, n)
                    rest = [j for j in range(n) if not seen[h, row, j]]
                    size = self.pool_size(position, n)
                    for pool in range(math.ceil(n / size)):
                        in_pool = [j for j in rest if j // size == pool]
                        right = [] if self.causal else [j for j in in_pool if j >= end]
                        for members in ([j for j in in_pool if j < start], right):
                            if members:
                                mean = k[kv, members].mean(0) @ q[h, row] * scale
                                mean += np.mean([self.added(h, j - position) for j in members])
                                scores.append(np.array([mean + math.log(len(members))]))
                                values.append(v[kv, members].mean(0, keepdims=True))
                every = np.concatenate(scores)
                lse[h, row] = np.logaddexp.reduce(every)
                out[h, row] = softmax(every) @ np.concatenate(values)
        return out, lse


@dataclass(frozen=True, kw_only=True)
class NaiveAntidiagonal(NaiveSwift):
    """Whole key blocks by the sums of antidiagonals of ``stride x stride`` tiles of scores."""

    selector: ClassVar[str] = "antidiagonal"
    pages: ClassVar[bool] = False
    stride: int = 4

    def choose(
        self, q: Array, k: Array, rows: list[int], offset: int, start: int, end: int
    ) -> dict[int, int]:
        n, size = len(k), self.key_block
        outside = self.outside(n, start, end)
        if not outside:
            return {}
        share = dict.fromkeys(outside, 0.0)
        for g in range(q.shape[0]):
            for i in range(0, len(rows), self.stride):
                sums = []
                for b in outside:
                    for j in range(b * size, (b + 1) * size, self.stride):
                        pairs = [(i + self.stride - 1 - s, j + s) for s in range(self.stride)]
                        # Beyond the end the last row and the last key are repeated.
                        scores = [
                            q[g, min(r, len(rows) - 1)] @ k[min(c, n - 1)]
                            + self.added(g, c - (offset + rows[0] + r))
                            for r, c in pairs
                        ]
                        sums.append(sum(scores) / self.stride)
                probs = softmax(np.array(sums)).reshape(len(outside), -1).sum(1)
                for b, p in zip(outside, probs, strict=True):
                    share[b] += p
        free = [b for b in outside if (b + 1) * size > self.sinks]
        total = sum(share[b] for b in free)
        kept, have = [], 0.0
        for b in sorted(free, key=lambda b: -share[b])[: self.key_tokens // size]:
            if self.coverage is None or have < self.coverage * total:
                kept.append(b)
            have += share[b]
        return {j: 0 for j in self.tokens_of(kept, n) if j >= self.sinks}
