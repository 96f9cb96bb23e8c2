"""The selectors of MS-SWIFT once more, from their descriptions: see ``naive``."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from tests.mechanisms.naive import Array, Asked, NaiveSwift, log_sum_of_best, softmax


@dataclass(frozen=True, kw_only=True)
class NaiveByRow(NaiveSwift):
    """Selectors that say what a key block is worth to a row, whatever the mode."""

    def worth(self, asked: Asked) -> dict[int, float]:
        rows = [
            self.worth_to_row(asked, g, i)
            for g in range(asked.q.shape[0])
            for i in range(asked.q.shape[1])
        ]
        return dict(zip(asked.outside, np.max(rows, 0).tolist(), strict=True))


@dataclass(frozen=True, kw_only=True)
class NaivePooled(NaiveByRow):
    """Mean keys, perhaps with the variance of every channel."""

    selector: ClassVar[str] = "pooled"
    least_share: float = 0.0
    variance: bool = False

    def worth_to_row(self, asked: Asked, g: int, i: int) -> Array:
        row, estimates = asked.q[g, i], []
        for b in asked.outside:
            keys = asked.keys(b, self.key_block)
            mean = sum(keys) / len(keys)
            estimate = row @ mean
            if self.variance:
                spread = sum((key - mean) ** 2 for key in keys) / len(keys)
                estimate += sum(row**2 * spread) / 2
            estimates.append(estimate)
        return softmax(np.array(estimates))


@dataclass(frozen=True, kw_only=True)
class NaiveLowRank(NaiveByRow):
    """Scores in the directions along which the first keys are longest."""

    selector: ClassVar[str] = "lowrank"
    pages: ClassVar[bool] = False
    least_share: float = 0.0
    rank: int = 3
    fit: int = 1 << 20

    def worth_to_row(self, asked: Asked, g: int, i: int) -> Array:
        q, k = asked.q, asked.k
        few = q.shape[0] * q.shape[1] <= self.rank and q.shape[1] < self.block
        if few and not (self.strict and self.causal):
            along = np.eye(k.shape[1])
        else:
            along = self.directions(k, asked.start)
        row = along @ (along.T @ q[g, i])
        best = np.array([(asked.keys(b, self.key_block) @ row).max() for b in asked.outside])
        return np.exp(best - np.logaddexp(np.logaddexp.reduce(best), asked.window[g, i]))

    def directions(self, k: Array, start: int) -> Array:
        """Orthonormal columns ``[D, rank]``."""
        prefix = len(k)
        if self.causal:
            prefix = 1
            while 2 * prefix <= start:
                prefix *= 2
        keys = k[: min(prefix, self.fit)]
        moment = sum(np.outer(key, key) for key in keys)
        dim = k.shape[1]
        for channel in range(dim):
            # Without it, directions no key has would be up to rounding.
            moment[channel, channel] += (
                1e-4 * (keys**2).sum() / dim * (dim - 1 - channel) / (dim - 1)
            )
        return np.linalg.eigh(moment)[1][:, -self.rank :]


@dataclass(frozen=True, kw_only=True)
class NaiveAnchor(NaiveSwift):
    """Every ``stride``-th row of a block and its last one score every key."""

    selector: ClassVar[str] = "anchor"
    pages: ClassVar[bool] = False
    stride: int = 5

    def choose(
        self, q: Array, k: Array, rows: list[int], offset: int, start: int, end: int
    ) -> dict[int, int]:
        outside = self.outside(len(k), start, end)
        if self.key_tokens == 0 or not outside:
            return {}
        strict = self.strict and self.causal
        inside = [(offset + row) % self.block for row in rows]
        anchors = [i for i, place in enumerate(inside) if self.is_anchor(place)]
        if not strict and len(rows) - 1 not in anchors:
            anchors.append(len(rows) - 1)
        window = self.window_lse(q, k, rows, offset, start, end)[:, anchors]
        tokens = self.tokens_of(outside, len(k))
        probs = self.probabilities(q[:, anchors], k, tokens, window)
        best = probs.max(0)
        free = [i for i, t in enumerate(tokens) if t >= self.sinks]
        if strict:
            complete = sum(self.is_anchor(place) for place in range(self.block))
            best = best * (np.array(tokens) >= self.sinks)
            turns = self.in_turn(best, self.key_tokens, complete)
            return {tokens[c]: offset + rows[anchors[turn]] for c, turn in turns.items()}
        chosen = sorted(free, key=lambda i: -best[:, i].max())[: self.key_tokens]
        if self.coverage is not None:
            chosen = self.cover(chosen, tokens, probs, q[:, anchors], k, window)
        return {tokens[i]: 0 for i in chosen}

    def is_anchor(self, place: int) -> bool:
        return place % self.stride == 0 or place == self.block - 1


@dataclass(frozen=True, kw_only=True)
class NaiveTree(NaiveSwift):
    """Boxes around boxes of keys; the best are opened until key blocks are reached."""

    tree: int | None = 2

    def propose(self, asked: Asked, sink_blocks: list[int], wanted: int) -> list[int]:
        assert self.tree is not None
        every = math.ceil(len(asked.k) / self.key_block)
        leaves = asked.start // self.key_block if self.causal else every
        opened = max(2, self.beam * wanted)
        level = 0
        while math.ceil(leaves / self.tree**level) > 4 * opened * self.tree:
            level += 1
        if asked.q.shape[1] < self.block or asked.q.shape[1] == 1:
            level = 0
        nodes = list(range(math.ceil(every / self.tree**level)))
        while True:
            rank = self.ranks(asked, nodes, self.tree**level, every)
            best = sorted(rank, key=lambda j: -rank[j])
            if level == 0:
                return best[:wanted]
            nodes = [j * self.tree + c for j in best[:opened] for c in range(self.tree)]
            level -= 1

    def ranks(self, asked: Asked, nodes: list[int], size: int, every: int) -> dict[int, float]:
        """What nodes of ``size`` key blocks are worth; those with no candidate are left out."""
        candidates = set(asked.outside)
        whole: list[int] = []
        rank = {}
        for j in nodes:
            inside = range(j * size, (j + 1) * size)
            if not self.causal:
                inside = range(j * size, min((j + 1) * size, every))
            if inside and all(b in candidates for b in inside):
                whole.append(j)
            elif any(b in candidates for b in inside):
                rank[j] = math.inf
        if whole:
            worth = np.zeros(len(whole))
            for part in self.row_groups(asked.q):
                bounds = [self.bound(part, asked.keys(j, size * self.key_block)) for j in whole]
                worth = np.maximum(worth, softmax(np.array(bounds)))
            rank.update(zip(whole, worth.tolist(), strict=True))
        sink_blocks = math.ceil(self.sinks / self.key_block)
        return {j: r for j, r in rank.items() if (j + 1) * size > sink_blocks}


@dataclass(frozen=True, kw_only=True)
class NaiveCentroids(NaiveSwift):
    """Means of similar rows score every key; single and strict rows bound boxes."""

    selector: ClassVar[str] = "centroids"
    rows: int = 4
    far: int = 60
    # Candidates from which on a sample of tiles weighs the groups: every so many, from the first.
    many: int = 4096
    tile: int = 64
    every: int = 8
    first: int = 4
    single: bool = False

    def choose(
        self, q: Array, k: Array, rows: list[int], offset: int, start: int, end: int
    ) -> dict[int, int]:
        if len(rows) == 1 or self.bias is not None or self.strict and self.causal:
            return super().choose(q, k, rows, offset, start, end)
        position = offset + rows[0] if self.causal else len(k)
        most, reach = self.rows, self.far
        while reach < position:
            most, reach = 2 * most, 2 * reach
        most = math.ceil(most * len(rows) / self.block)
        few = {"rows": most, "most_proposals": self.proposals}
        alone = replace(self, key_block=1, single=True, **few)
        return NaiveSwift.choose(alone, q, k, rows, offset, start, end)

    def worth(self, asked: Asked) -> dict[int, float]:
        if not self.single:
            return super().worth(asked)
        keys = asked.outside
        sampled = [
            i
            for i, key in enumerate(keys)
            if len(keys) < self.many or key // self.tile % self.every == self.first
        ]
        rank = np.full(len(keys), -math.inf)
        for group in self.halves(list(asked.q.reshape(-1, asked.q.shape[-1]))):
            scores = asked.k[keys] @ (sum(group) / len(group))
            every = len(keys) < self.many
            total = log_sum_of_best(scores[sampled], np.array(keys)[sampled], 1 if every else 16)
            rank = np.maximum(rank, scores - total)
        return dict(zip(keys, rank.tolist(), strict=True))

    def halves(self, rows: list[Array]) -> list[list[Array]]:
        """Groups of at most so many rows; of an odd number the last counts twice."""
        if len(rows) <= self.rows:
            return [rows]
        rows = rows + rows[-1:] * (len(rows) % 2)
        channel = int(np.argmax(np.var(rows, axis=0)))
        middle = len(rows) // 2
        order = sorted(range(len(rows)), key=lambda i: (rows[i][channel], i))
        low, high = sorted(order[:middle]), sorted(order[middle:])
        return self.halves([rows[i] for i in low]) + self.halves([rows[i] for i in high])
