"""Copy: a passage of random words, hidden at a depth, is to be said again word for word.

Not in RULER. It asks for many look-ups in a row, each of the word after the one just found, where
a needle asks for one. Where nothing is instructed, the passage's first words are given and the
rest is continued.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from longswift.core.errors import ConfigError, check_positive, problem
from longswift.eval.models import Codec
from longswift.eval.tasks import base, haystack


@dataclass(frozen=True, kw_only=True)
class Copy(base.Task):
    """One passage to copy.

    Attributes:
        words: Words of the passage.
        cue: Of these, how many are given where nothing is instructed; fewer than ``words``.
        haystack: ``"text"`` or ``"noise"``.
        depths: Size of the grid of depths.
        file: Text to hide in; Python's documentation by default.
    """

    name: ClassVar[str] = "copy"
    metrics: ClassVar[tuple[str, ...]] = ("words", "exact")
    axis: ClassVar[str | None] = "depth"

    words: int = 32
    cue: int = 8
    haystack: str = haystack.TEXT
    depths: int = 10
    file: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.name, words=self.words, cue=self.cue, depths=self.depths)
        haystack.check_kind(self.name, self.haystack)
        if self.cue >= self.words:
            raise ConfigError(
                problem(
                    f"{self.name}.cue",
                    expected=f"fewer than the passage's {self.words} words",
                    got=self.cue,
                    fix="Raise words or lower cue.",
                )
            )

    def _generate(self, codec: Codec, length: int, index: int) -> base.Sample:
        rng, form = self.random(length, index), self.form_for(codec)
        passage = rng.choices(haystack.english(), k=self.words)
        depth = haystack.grid(self.depths, index)
        if form == base.INSTRUCT:
            before, after = codec.frame(
                "Remember the passage between [copy] and [end] in the text below.\n\n",
                "\n\nQuestion: Repeat the passage between [copy] and [end], word for word.",
                " [copy]",
            )
            answer = " ".join(passage)
            # Another division into tokens than the passage's own must not be cut off.
            limit = len(codec.encode(f" {answer}")) + self.words
            hidden = codec.encode(f" [copy] {answer} [end].")
        else:
            before, begun = codec.begin(), " " + " ".join(passage[: self.cue])
            answer = " ".join(passage[self.cue :])
            after, limit = codec.split(f"{begun} ", answer)
            hidden = codec.encode(f"{begun} {answer}.")
        room = length - len(before) - len(after) - limit - len(hidden)
        if room < 1:
            raise base.too_short(self, length, length - room + 1)
        hay = haystack.filler(codec, self.haystack, self.file, room, rng)
        question = base.Question(ids=tuple(after), answers=(answer,), limit=limit, at=(depth,))
        return base.Sample(
            document=(*before, *haystack.plant(codec, hay, [hidden], [depth])),
            questions=(question,),
            meta={"form": form},
        )

    def score(self, sample: base.Sample, output: base.Output) -> list[base.Score]:
        """Share of the words that stand at their place, and whether all do."""
        scores = []
        for question, text in zip(sample.questions, output.texts, strict=True):
            wanted, said = question.answers[0].split(), text.partition("[end]")[0].split()
            right = [a == b.rstrip(".") for a, b in zip(wanted, said, strict=False)]
            share, at = sum(right) / len(wanted), question.at[0]
            scores.append(base.Score(metric="words", value=share, at=at))
            scores.append(base.Score(metric="exact", value=float(share == 1), at=at))
        return scores
