"""Full attention as the judge: of single layers on the same inputs, and of whole models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longswift.core.observe import Observed
from longswift.core.softmax import accumulator_dtype
from longswift.core.types import AttentionResult
from longswift.eval.reading import SCORED_ROWS, finite, next_token_logits
from longswift.eval.rivals import FULL, Rival
from longswift.mechanisms.coverage import sample_rows
from longswift.mechanisms.patterned import dense_keys

PARTS = 8


@dataclass(frozen=True, kw_only=True)
class HeadRow:
    """One query head of one layer under one rival, on full attention's own inputs.

    Attributes:
        document: Index of the document.
        name: Rival.
        layer: Layer.
        head: Query head.
        density: Keys scored over the keys full attention scores.
        captured_mean: Share of full attention's mass on the keys seen one by one, mean over rows;
            None where the rival sees no subset of keys.
        captured_p10: Tenth percentile over rows.
        captured_min: Smallest over rows.
        error: Relative L2 error of the head's output over all rows.
        rows: Query rows judged.
    """

    document: int
    name: str
    layer: int
    head: int
    density: float
    captured_mean: float | None
    captured_p10: float | None
    captured_min: float | None
    error: float
    rows: int


@dataclass(frozen=True, kw_only=True)
class EndRow:
    """The whole model under one rival, its own errors included, against the dense model.

    Attributes:
        document: Index of the document.
        name: Rival, or ``"full"``.
        tokens: Tokens read.
        keys_per_query: Mean number of keys scored per query in the layers replaced.
        density: The same as a share of full attention's.
        nll: Mean negative log-likelihood per token, nats.
        kl: Mean divergence of the next-token distribution from the dense model's, nats; None where
            the dense model did not run.
        agreement: Share of positions with the dense model's likeliest token.
        kl_by_part: ``kl`` of each eighth of the document.
    """

    document: int
    name: str
    tokens: int
    keys_per_query: float
    density: float
    nll: float
    kl: float | None
    agreement: float | None
    kl_by_part: list[float] | None


@dataclass
class _Seen:
    """What one rival did in one layer so far."""

    mass: list[Tensor] = field(default_factory=list)  # [Hq, rows]
    wrong: Any = 0.0  # [Hq]
    right: Any = 0.0
    keys: Any = 0.0
    dense: float = 0.0
    rows: int = 0


class LayerJudge:
    """An observer that lets every rival attend to what full attention attended to.

    Args:
        rivals: Who is judged.
        own: The rival that runs in the model, when it is not full attention; the truth is then
            computed here, for sampled rows.
        rows_per_call: How many rows are sampled then.
    """

    def __init__(
        self, rivals: Sequence[Rival], own: Rival | None = None, rows_per_call: int = 0
    ) -> None:
        self._rivals, self._own, self._count = rivals, own, rows_per_call
        self._seen: dict[tuple[str, int], _Seen] = {}

    def __call__(self, call: Observed) -> None:
        """Judge one call of a layer; batch rows count as further query rows."""
        rows = torch.arange(call.q.shape[2], device=call.q.device)
        if self._own is None:
            truth = call.result.out, call.result.lse
        else:
            chosen = sample_rows(call.q.shape[2], call.k.shape[2], self._count)
            rows = torch.tensor(chosen, device=call.q.device)
            truth = attend_rows(call, rows)
        for rival in self._rivals:
            self._judge(rival, call, rows, *truth)

    def _judge(self, rival: Rival, call: Observed, rows: Tensor, out: Tensor, lse: Tensor) -> None:
        mechanism = rival.choose(call.layer)

        def run(other: Any) -> AttentionResult:
            options = {"causal": call.causal, "scale": call.scale, "bias": call.bias}
            return other(call.q, call.k, call.v, **options)

        same = rival is self._own or self._own is None and mechanism == call.mechanism
        result = call.result if same else run(mechanism)
        seen = self._seen.setdefault((rival.name, call.layer or 0), _Seen())
        exact = mechanism.exact_part()
        if exact is not None:
            part = result if exact == mechanism else run(exact)
            mass = (part.lse[:, :, rows] - lse).exp().clamp(max=1.0)
            seen.mass.append(mass.transpose(0, 1).flatten(1).float().cpu())
        acc = accumulator_dtype(out.dtype)
        theirs = result.out[:, :, rows].to(acc)
        seen.wrong = seen.wrong + (theirs - out.to(acc)).square().sum((0, 2, 3), dtype=torch.double)
        seen.right = seen.right + out.to(acc).square().sum((0, 2, 3), dtype=torch.double)
        kv_heads = call.k.shape[1]
        density = result.stats.density_by_head or (result.stats.density,) * kv_heads
        by_head = torch.tensor(density, dtype=torch.double)
        pairs = call.q.shape[2] * dense_keys(call.q.shape[2], call.k.shape[2], call.causal)
        seen.keys = seen.keys + pairs * by_head.repeat_interleave(call.q.shape[1] // kv_heads)
        seen.dense += pairs
        seen.rows += rows.numel() * call.q.shape[0]

    def rows(self, document: int) -> list[HeadRow]:
        """What was found, by rival, layer and head."""
        found = []
        for (name, layer), seen in self._seen.items():
            mass = torch.cat(seen.mass, 1).numpy() if seen.mass else None
            error = (seen.wrong / seen.right.clamp(min=1e-300)).sqrt().tolist()
            density = (seen.keys / seen.dense).tolist()
            for head in range(len(error)):
                own: Any = None if mass is None else mass[head].astype(np.float64)
                found.append(
                    HeadRow(
                        document=document,
                        name=name,
                        layer=layer,
                        head=head,
                        density=density[head],
                        captured_mean=None if own is None else float(own.mean()),
                        captured_p10=None if own is None else float(np.quantile(own, 0.1)),
                        captured_min=None if own is None else float(own.min()),
                        error=error[head],
                        rows=seen.rows,
                    )
                )
        return found


def attend_rows(call: Observed, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Full attention of the query rows ``rows [P]``, ascending: ``O(P * Lk)``, in steps."""
    q, k, v = call.q, call.k, call.v
    batch, heads, kv_heads = q.shape[0], q.shape[1], k.shape[1]
    acc = accumulator_dtype(q.dtype)
    keys, values = k.to(acc), v.to(acc)
    bias = None if call.bias is None else call.bias.scores(q, k)
    outs, sums = [], []
    for part in rows.split(16):
        position = part + (k.shape[2] - q.shape[2])
        end = int(position[-1]) + 1 if call.causal else k.shape[2]
        stacked = (q[:, :, part].to(acc) * call.scale).reshape(batch, kv_heads, -1, q.shape[3])
        scores = stacked @ keys[:, :, :end].transpose(2, 3)
        scores = scores.view(batch, heads, len(part), end)
        if bias is not None:
            scores = scores + bias.rows(position, end)
        if call.causal:
            later = torch.arange(end, device=q.device) > position[:, None]
            scores = scores.masked_fill(later, float("-inf"))
        sums.append(torch.logsumexp(scores, -1))
        probs = (scores - sums[-1].unsqueeze(-1)).exp().view(batch, kv_heads, -1, end)
        outs.append((probs @ values[:, :, :end]).view(batch, heads, len(part), -1))
    return torch.cat(outs, 2), torch.cat(sums, 2)


class EndJudge:
    """Next-token distributions of rivals against the dense model's, a few hundred rows at a time.

    Args:
        model: The model, for its output layer.
        ids: The document.
    """

    def __init__(self, model: Any, ids: Sequence[int]) -> None:
        self._model = model
        self._ids = torch.tensor(ids, device=model.device)
        self._sums: dict[str, Tensor] = {}

    def add(self, start: int, dense: Tensor | None, rivals: dict[str, Tensor]) -> None:
        """Compare hidden states ``[1, T, width]`` of positions from ``start`` on."""
        length = next(iter(rivals.values())).shape[1]
        for first in range(0, length, SCORED_ROWS):
            rows = slice(first, first + SCORED_ROWS)
            position = torch.arange(start + first, start + min(length, first + SCORED_ROWS))
            part = position * PARTS // len(self._ids)
            truth = None if dense is None else self._log_probs(dense, rows)
            # Where full attention is what is measured, its own reading counts.
            if truth is not None and FULL not in rivals:
                self._note(FULL, position, part, truth, truth)
            for name, hidden in rivals.items():
                self._note(name, position, part, truth, self._log_probs(hidden, rows))

    def _log_probs(self, hidden: Tensor, rows: slice) -> Tensor:
        return finite(next_token_logits(self._model, hidden[0, rows])).log_softmax(-1)

    def _note(
        self, name: str, position: Tensor, part: Tensor, truth: Tensor | None, theirs: Tensor
    ) -> None:
        sums = self._sums.setdefault(name, torch.zeros(4, PARTS, dtype=torch.double))
        sums[0].index_add_(0, part, torch.ones(len(part), dtype=torch.double))
        if truth is not None:
            # Of equal distributions rounding may leave less than nothing.
            kl = (truth.exp() * (truth - theirs)).sum(-1).clamp(min=0.0)
            same = truth.argmax(-1) == theirs.argmax(-1)
            sums[1].index_add_(0, part, kl.double().cpu())
            sums[2].index_add_(0, part, same.double().cpu())
        # The last token has no successor to predict.
        known = position[position + 1 < len(self._ids)]
        target = self._ids[(known + 1).to(self._ids.device)]
        nll = -theirs[: len(known)].gather(1, target[:, None]).squeeze(1)
        sums[3].index_add_(0, part[: len(known)], nll.double().cpu())

    def rows(self, document: int, keys: dict[str, float]) -> list[EndRow]:
        """What was found; ``keys`` holds each rival's keys per query."""
        found = []
        dense = FULL in self._sums
        for name, sums in self._sums.items():
            count, kl, same, nll = sums.tolist()
            total = sum(count)
            found.append(
                EndRow(
                    document=document,
                    name=name,
                    tokens=len(self._ids),
                    keys_per_query=keys[name],
                    density=keys[name] / ((len(self._ids) + 1) / 2),
                    nll=sum(nll) / max(1, len(self._ids) - 1),
                    kl=sum(kl) / total if dense else None,
                    agreement=sum(same) / total if dense else None,
                    kl_by_part=[a / max(1.0, b) for a, b in zip(kl, count, strict=True)]
                    if dense
                    else None,
                )
            )
        return found
