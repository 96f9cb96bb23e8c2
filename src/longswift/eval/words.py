"""Which words of a text a model's attention asks for, and which of them MS-SWIFT lets it see.

A model reads a text; for one block of queries and every layer and KV head the exact attention
probabilities over all earlier words are set beside the keys that the mechanism chose.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from longswift.core.errors import InputError, UnsupportedError, problem
from longswift.core.mechanism import Mechanism
from longswift.core.observe import Observed, observe
from longswift.eval import reading
from longswift.eval.documents import read_text
from longswift.eval.models import Loaded
from longswift.eval.patterns import Why, reasons

_CHUNK = 1024
_LISTED = 12
# A word with less than this share of a row's attention is not worth a colour.
_FAINT = 0.002


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A word that full attention looks at.

    Attributes:
        word: Index of the word.
        share: Largest share of attention that a query row and head of the group gives it.
        asked_by: Index of the word whose row that is.
        why: ``Why`` it is seen, or ``SUMMARY`` or ``NOTHING`` if it is not.
    """

    word: int
    share: float
    asked_by: int
    why: int


@dataclass(frozen=True, kw_only=True)
class View:
    """One KV head of one layer.

    Attributes:
        layer: Index of the layer.
        head: Index of the KV head.
        window: Window of the head in tokens, or None.
        seen: Share of the exact attention that falls on keys seen exactly, mean over the rows and
            the query heads of the group.
        keys: Keys seen exactly, mean over the rows.
        parts: That share by reason, ``{Why: share}``.
        why: ``Why`` of each word as a string of digits.
        shares: ``[word, share]`` of every word above a faint one, see ``Wanted.share``.
        wanted: The words most looked at.
    """

    layer: int
    head: int
    window: int | None
    seen: float
    keys: float
    parts: dict[str, float]
    why: str
    shares: list[tuple[int, float]]
    wanted: list[Wanted]


@dataclass(frozen=True, kw_only=True)
class Words:
    """A text, a block of queries in it, and what every head asks for.

    Attributes:
        model: Name of the model.
        mechanism: Configuration of the mechanism.
        tokens: Tokens the model read.
        block: First and one-past-last token of the block of queries.
        words: The text, cut before each word; concatenated it is the text that was read.
        asking: Indices of the words whose rows ask.
        views: Layer by layer, head by head.
    """

    model: str
    mechanism: dict[str, Any]
    tokens: int
    block: tuple[int, int]
    words: list[str]
    asking: list[int]
    views: list[View]

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Text:
    """Token ids, the words they belong to, and which tokens ask."""

    ids: list[int]
    words: list[str]
    word_of: list[int]
    rows: range


def look(
    loaded: Loaded,
    mechanism: Mechanism,
    file: str,
    *,
    query: str | None = None,
    position: int | None = None,
) -> Words:
    """Read a text and see what the queries at one place look at.

    Args:
        loaded: The model; its attention is replaced by ``mechanism``.
        mechanism: The mechanism.
        file: UTF-8 text.
        query: Appended to the text after a space; its tokens ask.
        position: Or the block of queries around this token asks; negative from the end.
            Without either, the last block asks.

    Raises:
        InputError: The file is no text, or has no such position.
        UnsupportedError: The tokenizer cannot tell where its tokens lie in a text.
    """
    from longswift.hf import SwiftCache, check_length

    text = _tokenize(loaded, read_text(file), query)
    check_length(loaded.model, len(text.ids), "Give a shorter file or a model of a longer window.")
    block, start, end = _block(mechanism, text, query, position)
    rows = text.rows if query is not None else range(start, end)
    rows = range(max(rows.start, start), min(rows.stop, end))
    loaded.use(mechanism)
    chunk = _CHUNK // block * block or block
    first = start // chunk * chunk
    cache = SwiftCache(loaded.model.config)
    reading.read(loaded.model, text.ids[:first], cache, chunk=chunk)
    views: list[View] = []

    def receive(call: Observed) -> None:
        # Layers with a window of the model's own run another mechanism.
        if call.layer is not None and call.mechanism.name == mechanism.name:
            views.extend(_views(call, slice(start - first, end - first), text, rows))

    with observe(receive):
        reading.read(loaded.model, text.ids[first:end], cache, chunk=chunk)
    if not views:
        raise UnsupportedError(
            problem(
                loaded.name,
                expected="layers with full attention, which a mechanism can replace",
                got="none",
                fix="Use a model that has some.",
            )
        )
    return Words(
        model=loaded.name,
        mechanism=mechanism.to_dict(),
        tokens=len(text.ids),
        block=(start, end),
        words=text.words,
        asking=sorted({text.word_of[row] for row in rows}),
        views=sorted(views, key=lambda view: (view.layer, view.head)),
    )


def _tokenize(loaded: Loaded, text: str, query: str | None) -> _Text:
    if not getattr(loaded.tokenizer, "is_fast", False):
        raise UnsupportedError(
            problem(
                type(loaded.tokenizer).__name__,
                expected="a tokenizer that tells where each token lies in the text",
                got="one that does not",
                fix="Use a model with a fast tokenizer (tokenizer.json).",
            )
        )
    asked_from = len(text)
    if query is not None:
        if not query.strip():
            raise InputError(
                problem("query", expected="some words", got=repr(query), fix="Ask something.")
            )
        text = text.rstrip()
        asked_from = len(text)
        text = f"{text} {query.strip()}"
    encoded = loaded.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    begin = loaded.begin()
    # A word carries the blanks before it, as most tokens do.
    cuts = [match.start() for match in re.finditer(r"\s*\S+|\s+$", text)]
    pieces = [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)], strict=True)]
    offsets = encoded["offset_mapping"]
    # The last character decides: a token of a blank and a letter belongs to the letter's word.
    inside = [bisect_right(cuts, max(a, b - 1)) - 1 for a, b in offsets]
    marks = len(begin)
    ids = [*begin, *loaded.known(encoded["input_ids"])]
    first = next((i for i, (_, b) in enumerate(offsets) if b > asked_from), len(offsets))
    return _Text(
        ids=ids,
        words=[*(loaded.tokenizer.convert_ids_to_tokens(i) for i in begin), *pieces],
        word_of=[*range(marks), *(marks + w for w in inside)],
        rows=range(marks + first, len(ids)),
    )


def _block(
    mechanism: Mechanism, text: _Text, query: str | None, position: int | None
) -> tuple[int, int, int]:
    """Size of the mechanism's query blocks, and the borders of the one that asks."""
    length = len(text.ids)
    if query is not None and position is not None:
        raise InputError(
            problem(
                "query, position",
                expected="one of them",
                got="both",
                fix="A query is asked at the end of the text.",
            )
        )
    at = length - 1 if position is None else position + (length if position < 0 else 0)
    if not 0 <= at < length:
        raise InputError(
            problem(
                "position",
                expected=f"a token from {-length} to {length - 1}",
                got=position,
                fix="Count the tokens of the text.",
            )
        )
    block = int(getattr(mechanism, "block", 64))
    start = at // block * block
    return block, start, min(start + block, length)


@torch.inference_mode()
def _views(call: Observed, queries: slice, text: _Text, rows: range) -> list[View]:
    """Every KV head of one layer; ``queries`` are the rows of the call that form the block."""
    mechanism, q, k = call.mechanism, call.q[:1, :, queries], call.k[:1]
    kv_heads, k_len, q_len = k.shape[1], k.shape[2], q.shape[2]
    groups = q.shape[1] // kv_heads
    seen = mechanism.visible(q, k, causal=True, scale=call.scale, bias=call.bias)[0]
    # A group shares its keys, so its first head speaks for all.
    why = reasons(mechanism, seen[::groups].cpu(), causal=True)
    position = torch.arange(k_len - q_len, k_len, device=q.device)
    keys = k[0].float().repeat_interleave(groups, 0)
    scores = q[0].float() @ keys.transpose(-1, -2) * call.scale
    if call.bias is not None:
        scores = scores + call.bias.scores(q, k).rows(position, k_len)
    hidden = torch.arange(k_len, device=q.device) > position[:, None]
    probs = scores.masked_fill(hidden, float("-inf")).softmax(-1).cpu()
    begin = k_len - q_len
    mine = slice(rows.start - begin, rows.stop - begin)
    windows = getattr(mechanism, "window_of_head", lambda heads: (None,) * heads)(kv_heads)
    rest = Why.SUMMARY if getattr(mechanism, "remainder", None) else Why.NOTHING
    found = []
    for head in range(kv_heads):
        share = probs[head * groups : (head + 1) * groups, mine]
        reason = why[head, mine]
        reason = torch.where((reason == 0) & ~hidden.cpu()[mine], int(rest), reason)
        found.append(_view(call.layer or 0, head, windows[head], share, reason, text, rows))
    return found


def _view(
    layer: int,
    head: int,
    window: int | None,
    share: Tensor,
    why: Tensor,
    text: _Text,
    rows: range,
) -> View:
    """One KV head from its exact probabilities ``[G, R, Lk]`` and reasons ``[R, Lk]``."""
    words, k_len = len(text.words), share.shape[2]
    word_of = torch.tensor(text.word_of[:k_len])
    by_word = torch.zeros(*share.shape[:2], words).index_add_(2, word_of, share)
    by_row, row = by_word.amax(0).max(0)
    strongest = torch.zeros(words, dtype=torch.uint8)
    strongest.scatter_reduce_(0, word_of, why.amax(0).to(torch.uint8), "amax")
    mean = share.mean(0)
    parts = {why_.name: float(mean[why == int(why_)].sum()) / len(rows) for why_ in Why}
    exact = why >= int(Why.FULL_ROW)
    best = by_row.topk(min(_LISTED, words))
    return View(
        layer=layer,
        head=head,
        window=window,
        seen=float(mean[exact].sum()) / len(rows),
        keys=float(exact.sum()) / len(rows),
        parts={name: part for name, part in parts.items() if part},
        why="".join(map(str, strongest.tolist())),
        shares=[(i, round(p, 4)) for i, p in enumerate(by_row.tolist()) if p >= _FAINT],
        wanted=[
            Wanted(
                word=word,
                share=share_,
                asked_by=text.word_of[rows[int(row[word])]],
                why=int(strongest[word]),
            )
            for share_, word in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            if share_ >= _FAINT
        ],
    )
