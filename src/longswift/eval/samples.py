"""Pieces of the user's text as a model reads them: the documents of a measurement."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from longswift.core.errors import InputError, problem
from longswift.eval.documents import source
from longswift.eval.models import Loaded

LONGEST = 32768


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Consecutive pieces of one text, equally long.

    Attributes:
        documents: Token ids, each with what the tokenizer puts before a text.
        sha256: Of the text.
    """

    documents: list[list[int]]
    sha256: str

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return sum(len(ids) for ids in self.documents)


def samples(
    loaded: Loaded,
    file: str | None,
    *,
    length: int | None,
    documents: int,
    fewest: int | None = None,
    least: int = 2,
) -> Samples:
    """Cut a text into documents.

    Args:
        loaded: The model that will read them.
        file: UTF-8 text, or None for held-out Python documentation.
        length: Tokens of a document; by default as many as there are, at most 32k and at most what
            the model can position.
        documents: How many to cut, from the start.
        fewest: Be content with as few where the text has no more; by default with ``documents``.
        least: The shortest document that makes sense.

    Raises:
        InputError: The text is too short, or the documents too long for the model.
    """
    from longswift.hf.extending import limit_of

    text, asked = source(file), length
    begin, ids = loaded.begin(), loaded.encode(text)
    limit = limit_of(loaded.model) or LONGEST
    if fewest is not None:
        fit = len(ids) // max(1, (least if length is None else length) - len(begin))
        documents = max(fewest, min(documents, fit))
    if length is None:
        length = min(LONGEST, limit, len(ids) // documents + len(begin))
    loaded.check_length(length)
    room = length - len(begin)
    if asked is not None and asked < least:
        raise InputError(
            problem(
                "length",
                expected=f"at least {least:,} tokens",
                got=f"{asked:,}",
                fix="Shorter documents say nothing here; give a longer --length.",
            )
        )
    if length < least or len(ids) < documents * room:
        raise InputError(
            problem(
                "text",
                expected=f"{documents} x {max(length, least):,} tokens",
                got=f"{len(ids):,} tokens",
                fix="Give a longer file, or lower --length or --documents.",
            )
        )
    cut = [[*begin, *ids[i * room : (i + 1) * room]] for i in range(documents)]
    return Samples(documents=cut, sha256=hashlib.sha256(text.encode()).hexdigest())
