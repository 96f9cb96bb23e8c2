"""Passkey: one number, said twice in a sentence, among a few sentences over and over.

Mohtashami and Jaggi, 2023 (arXiv 2305.16300); the easiest look-up there is. Not in RULER, whose
``niah_single_1`` is the nearest relative. Differences from the original: our own sentences and a
grid of depths instead of random places.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from longswift.core.errors import check_positive
from longswift.eval.models import Codec
from longswift.eval.tasks import base, haystack

_LIMIT = 16


@dataclass(frozen=True, kw_only=True)
class Passkey(base.Task):
    """One pass key in noise.

    Attributes:
        haystack: ``"noise"`` or ``"text"``.
        digits: Digits of the key.
        depths: Size of the grid of depths.
        file: Text to hide in; Python's documentation by default.
    """

    name: ClassVar[str] = "passkey"
    forms: ClassVar[tuple[str, ...]] = (base.INSTRUCT, base.CONTINUE, base.KEY_VALUE)
    axis: ClassVar[str | None] = "depth"

    haystack: str = haystack.NOISE
    digits: int = 5
    depths: int = 10
    file: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.name, digits=self.digits, depths=self.depths)
        haystack.check_kind(self.name, self.haystack)

    def _generate(self, codec: Codec, length: int, index: int) -> base.Sample:
        rng, form = self.random(length, index), self.form_for(codec)
        key, depth = haystack.digits(rng, self.digits), haystack.grid(self.depths, index)
        begun = " The pass key is"
        hidden = f"{begun} {key}. Remember it: {key} is the pass key."
        if form == base.KEY_VALUE:
            begun = "\npass key ->"
            hidden = f"{begun} {key}\n"
        if form == base.INSTRUCT:
            before, after = codec.frame(
                "Somewhere in the text below a pass key is told. Find it and remember it.\n\n",
                "\n\nQuestion: What is the pass key?",
                begun,
            )
            limit = _LIMIT
        else:
            before = codec.begin()
            after, limit = codec.split(f"{begun} ", key)
        needle = codec.encode(hidden)
        room = length - len(before) - len(after) - limit - len(needle)
        if room < 1:
            raise base.too_short(self, length, length - room + 1)
        hay = haystack.filler(codec, self.haystack, self.file, room, rng)
        document = haystack.plant(codec, hay, [needle], [depth])
        question = base.Question(ids=tuple(after), answers=(key,), limit=limit, at=(depth,))
        return base.Sample(
            document=(*before, *document), questions=(question,), meta={"form": form}
        )
