"""Perplexity by position: how well a text is predicted, early and late in the window.

Sample ``i`` is the window of ``length`` tokens that begins ``i * stride`` tokens into the text.
With ``stride`` equal to the length (the default) windows are disjoint and every token of them
counts; with a shorter one the window slides, and only tokens that no earlier window scored count,
each with at least ``length - stride`` tokens before it. Memory is O(length): the model reads in
chunks and logits exist for a few hundred tokens at a time. Means weigh tokens, not samples. Not in
RULER.

Alone it proves little about long context: most tokens need only their neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from longswift.core.errors import InputError, check_positive, problem
from longswift.eval.models import Codec
from longswift.eval.tasks import base, haystack


@dataclass(frozen=True, kw_only=True)
class Perplexity(base.Task):
    """Negative log-likelihood of a text, per token.

    Attributes:
        stride: Tokens from one window to the next; the length if None.
        parts: The window is reported in this many equal parts, by their share of the length.
        file: The text; Python's documentation by default.
    """

    name: ClassVar[str] = "perplexity"
    forms: ClassVar[tuple[str, ...]] = (base.CONTINUE,)
    metrics: ClassVar[tuple[str, ...]] = ("nll",)
    axis: ClassVar[str | None] = "position"
    likelihood: ClassVar[bool] = True

    stride: int | None = None
    parts: int = 8
    file: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(
            self.name, parts=self.parts, stride=1 if self.stride is None else self.stride
        )

    def available(self, codec: Codec, length: int, wanted: int) -> int:
        """Whole windows that the text holds."""
        tokens = len(haystack.text_tokens(codec, self.file))
        body, stride = self._sizes(codec, length)
        windows = 0 if tokens < body else 1 + (tokens - body) // stride
        if windows == 0:
            raise InputError(
                problem(
                    f"{self.name} at {length} tokens",
                    expected=f"a text of at least {body} tokens",
                    got=tokens,
                    fix="Give a longer file, or a shorter length.",
                )
            )
        return min(wanted, windows)

    def _sizes(self, codec: Codec, length: int) -> tuple[int, int]:
        """Tokens of text in a window, and from one window to the next."""
        body = length - len(codec.begin())
        stride = body if self.stride is None else self.stride
        if not 0 < stride <= body or body < 2:
            raise InputError(
                problem(
                    f"{self.name}.stride",
                    expected=f"from 1 to {max(1, body)} at {length} tokens",
                    got=stride,
                    fix="Lower the stride or raise the length.",
                )
            )
        return body, stride

    def _generate(self, codec: Codec, length: int, index: int) -> base.Sample:
        body, stride = self._sizes(codec, length)
        start = index * stride
        ids = haystack.text_tokens(codec, self.file)[start : start + body]
        if len(ids) < body:
            raise InputError(
                problem(
                    f"{self.name}, window {index}",
                    expected=f"{body} tokens of text",
                    got=len(ids),
                    fix="Ask for fewer samples, or give a longer file.",
                )
            )
        begin = codec.begin()
        # The loss of a token stands one place before it; a first token is predicted by nothing.
        first = max(0, len(begin) - 1 if index == 0 else length - stride - 1)
        return base.Sample(document=(*begin, *ids), meta={"form": base.CONTINUE, "first": first})

    def score(self, sample: base.Sample, output: base.Output) -> list[base.Score]:
        """Mean loss of each part of the window, weighed by its scored tokens."""
        first, length = sample.meta["first"], len(sample.document)
        sums: dict[int, list[float]] = {}
        for place in range(first, len(output.losses)):
            part = (place + 1) * self.parts // length
            sums.setdefault(part, []).append(output.losses[place])
        return [
            base.Score(
                metric="nll",
                value=sum(losses) / len(losses),
                weight=len(losses),
                at=(part + 0.5) / self.parts,
            )
            for part, losses in sums.items()
        ]
