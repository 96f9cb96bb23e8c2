"""The page that shows, in a text, what a model looks at."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from longswift.core.errors import ConfigError, UnsupportedError, problem
from longswift.core.files import write_text
from longswift.eval import pages, pattern_table
from longswift.eval.models import load
from longswift.eval.options import from_json
from longswift.eval.patterns import SHORTEST, Why, options_in_words, picture
from longswift.eval.results import writable
from longswift.eval.words import View, Words, look

_NOTES: dict[Why, str] = {
    Why.GLOBAL: "always seen",
    Why.WINDOW: "near the block of queries",
    Why.CHOSEN: "asked for by content",
    Why.FULL_ROW: "this row sees everything",
    Why.SUMMARY: "not seen exactly",
    Why.NOTHING: "not seen, or later",
}


def write(shown: Words, path: str | Path) -> Path:
    """Write the page in one step."""
    name = shown.mechanism["name"]
    labels = {why: pattern_table.label(name, why) for why in Why}
    first = shown.views[0]
    shares = dict(first.shares)
    wanted = {w.word for w in first.wanted}
    asking = set(shown.asking)
    css = ["asking" if i in asking else "" for i in range(len(shown.words))]

    def classes(i: int) -> str:
        why = int(first.why[i])
        lost = " lost" if why < Why.STATE and i in wanted else ""
        return f"{css[i]} r{why}{lost}".strip()

    used = {int(digit) for view in shown.views for digit in view.why}
    html = pages.page(
        "words.html",
        shown=shown,
        name=name,
        config=options_in_words(from_json(shown.mechanism)),
        # Source code is read by its columns.
        code=sum(word.startswith(("\n  ", "\n\t")) for word in shown.words) > len(shown.words) / 20,
        words=[
            {
                "blank": text[: len(text) - len(text.lstrip())],
                "text": text.lstrip(),
                "css": classes(i),
                # Shares differ by orders of magnitude; their roots do so less.
                "depth": round(math.sqrt(shares.get(i, 0.0)), 3),
            }
            for i, text in enumerate(shown.words)
        ],
        marks=[
            {"why": int(why), "label": labels[why], "note": _NOTES[why]}
            for why in sorted(_NOTES, reverse=True)
            if int(why) in used
        ],
        data={
            "views": shown.to_dict()["views"],
            "css": css,
            "labels": {int(why): label for why, label in labels.items()},
            "stories": [_story(view, labels) for view in shown.views],
        },
    )
    return write_text(path, html)


def _story(view: View, labels: dict[Why, str]) -> str:
    """What one head sees and misses, in a sentence."""
    window = f" (window {view.window:,})" if view.window else ""
    parts = sorted(view.parts.items(), key=lambda part: -part[1])
    told = ", ".join(f"{100 * part:.1f} % {labels[Why[name]]}" for name, part in parts)
    return (
        f"Layer {view.layer}, KV head {view.head}{window}: the {view.keys:,.0f} keys seen exactly "
        f"hold {100 * view.seen:.1f} % of what full attention gives here. By reason: {told}."
    )


@dataclass(frozen=True, kw_only=True)
class Page:
    """What to show.

    Attributes:
        model: ``tiny``, a directory or a name on the hub.
        file: UTF-8 text.
        mechanism: Name of the mechanism.
        settings: ``OPTION=VALUE`` of the mechanism.
        query: Follows the text; its words ask.
        position: Or the block of queries around this token.
    """

    model: str | None
    file: str | None
    mechanism: str = "ms_swift"
    settings: tuple[str, ...] = ()
    query: str | None = None
    position: int | None = None

    def __post_init__(self) -> None:
        if self.model is None or self.file is None:
            missing = "MODEL" if self.model is None else "--file"
            raise ConfigError(
                problem(
                    missing,
                    expected="a model and a text",
                    got="only one of them",
                    fix="For instance: longswift patterns tiny --file my.txt --query 'What is'.",
                )
            )


def run(page: Page, path: str | Path) -> list[str]:
    """Read, look, write the page; returns what it says in lines.

    Raises:
        InputError: The file is no text, or there is no such position.
        ConfigError: The model or the mechanism cannot be had.
        UnsupportedError: The mechanism makes no choice.
    """
    assert page.model is not None and page.file is not None
    target = writable(path, endings=(".html", ".htm"))
    mechanism = pattern_table.reading(page.mechanism, page.settings)
    (small,) = pattern_table.mechanisms(mechanism.name, (), SHORTEST)
    if Why.STATE in picture(small, SHORTEST, causal=small.supports_causal).reasons:
        raise UnsupportedError(
            problem(
                mechanism.name,
                expected="a mechanism that sees some keys and not others",
                got="one that sees all of them through a state",
                fix="There is no choice of words to show; try ms_swift.",
            )
        )
    shown = look(load(page.model), mechanism, page.file, query=page.query, position=page.position)
    write(shown, target)
    return [_line(shown, view) for view in shown.views]


def _line(shown: Words, view: View) -> str:
    words = [shown.words[w.word].strip() for w in view.wanted if w.why == Why.CHOSEN]
    told = ", ".join(words[:6]) or "none of the most wanted words"
    return (
        f"layer {view.layer}, KV head {view.head}: {view.keys:,.0f} keys hold "
        f"{100 * view.seen:.0f} % of the attention; key tokens: {told}"
    )
