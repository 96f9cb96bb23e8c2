"""Words a model asks for: exact shares against Transformers' own weights, and the page."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from longswift.core.errors import InputError
from longswift.core.observe import Observed, observe
from longswift.eval import pattern_table, words_page
from longswift.eval.models import Loaded, load
from longswift.eval.patterns import Why
from longswift.eval.words import Words, look
from longswift.tiny.tasks import made_up_word

SMALL = ["windows=8,16", "block=16", "sinks=2", "key_tokens=4", "remainder=16"]
SELECTOR = 'selector={"name": "bounds", "key_block": 4, "row_group": 4}'
TEXT = (
    "The  import statement\n\n    finds <script>alert('no')</script> a module & binds it: "
    # No sentence twice: equal keys are equally good choices.
    + " ".join(made_up_word(random.Random(i)) for i in range(90))
)


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "doc.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def loaded(model_directory: Path) -> Loaded:
    return load(str(model_directory))


def shown(loaded: Loaded, document: Path, **options: Any) -> Words:
    mechanism = pattern_table.reading("ms_swift", [*SMALL, SELECTOR])
    return look(loaded, mechanism, str(document), **options)


def ids_of(loaded: Loaded, text: str) -> list[int]:
    return [*loaded.begin(), *loaded.encode(text)]


def test_shares_are_those_of_transformers_own_attention(loaded: Loaded, document: Path) -> None:
    found = shown(loaded, document, position=-40)
    ids = ids_of(loaded, TEXT)
    assert found.tokens == len(ids)
    start, end = found.block
    assert start <= len(ids) - 40 < end and start % 16 == 0
    loaded.model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = loaded.model(torch.tensor([ids[:end]]), output_attentions=True).attentions
    # The first layer has a window of its own and is left alone; the second is the one shown.
    assert {view.layer for view in found.views} == {1}
    assert [view.head for view in found.views] == [0, 1]
    marks = len(loaded.begin())
    for view in found.views:
        group = weights[1][0, 2 * view.head : 2 * view.head + 2, start:end]
        share = dict(view.shares)
        for wanted in view.wanted:
            assert share[wanted.word] == pytest.approx(wanted.share, abs=1e-4)
        # A word is a sum over its tokens: rebuild it from the text alone.
        text, cut = "".join(found.words[marks:]), 0
        borders = []
        for word in found.words[marks:]:
            borders.append(cut)
            cut += len(word)
        offsets = loaded.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        owner = [
            marks + max(i for i, b in enumerate(borders) if b <= max(first, last - 1))
            for first, last in offsets["offset_mapping"]
        ]
        owner = [*range(marks), *owner][:end]
        for word, value in share.items():
            tokens = [i for i, w in enumerate(owner) if w == word]
            assert float(group[..., tokens].sum(-1).max()) == pytest.approx(value, abs=2e-3)
        assert sum(view.parts.values()) == pytest.approx(1, abs=1e-3)
        exact = sum(v for k, v in view.parts.items() if Why[k] >= Why.FULL_ROW)
        assert view.seen == pytest.approx(exact, abs=1e-6)


def test_the_words_are_the_text_and_the_query_asks(loaded: Loaded, document: Path) -> None:
    found = shown(loaded, document, query=" which section? ")
    marks = len(loaded.begin())
    assert "".join(found.words[marks:]) == f"{TEXT.rstrip()} which section?"
    assert {found.words[i].strip() for i in found.asking} <= {"which", "section?"}
    assert all(len(view.why) == len(found.words) for view in found.views)
    for view in found.views:
        assert {w.asked_by for w in view.wanted} <= set(found.asking)


def test_chosen_words_are_those_the_mechanism_chose(loaded: Loaded, document: Path) -> None:
    """Against ``visible()`` of all queries in one call."""
    from longswift.hf import SwiftCache

    found = shown(loaded, document)
    calls: list[Observed] = []
    ids = torch.tensor([ids_of(loaded, TEXT)])
    with observe(calls.append), torch.no_grad():
        loaded.model(ids, past_key_values=SwiftCache(loaded.model.config))
    call = next(c for c in calls if c.layer == 1)
    seen = call.mechanism.visible(call.q, call.k, scale=call.scale)[0]
    start, end = found.block
    for view, window in zip(found.views, (16, 8), strict=True):
        mine = seen[2 * view.head : 2 * view.head + 2, start:end]
        assert view.window == window
        assert view.keys == pytest.approx(float(mine[0].sum(1).float().mean()))
        chosen = view.why.count(str(int(Why.CHOSEN)))
        assert 1 <= chosen <= 4
        assert view.why[0] == str(int(Why.GLOBAL))
        assert view.why[-1] == str(int(Why.WINDOW))
        assert int(mine[0, -1, 2 : -window - 16].sum()) >= chosen


def test_a_chunked_reading_shows_the_same(
    loaded: Loaded, document: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = shown(loaded, document)
    monkeypatch.setattr("longswift.eval.words._CHUNK", 32)
    pieces = shown(loaded, document)
    for a, b in zip(whole.views, pieces.views, strict=True):
        assert a.why == b.why and a.keys == b.keys
        assert a.seen == pytest.approx(b.seen, abs=1e-4)


def test_the_page_is_self_contained_and_escapes_the_text(
    model_directory: Path, document: Path, tmp_path: Path
) -> None:
    page = words_page.Page(
        model=str(model_directory), file=str(document), settings=(*SMALL, SELECTOR)
    )
    lines = words_page.run(page, tmp_path / "words.html")
    assert len(lines) == 2 and lines[0].startswith("layer 1, KV head 0: ")
    html = (tmp_path / "words.html").read_text(encoding="utf-8")
    assert "<script>alert" not in html and "&lt;script&gt;alert" in html
    assert not re.search(r"https?://|<link|src=|@import|url\(", html)
    assert 'name="viewport"' in html and "prefers-color-scheme: dark" in html
    body = html[html.index('id="text"') : html.index("<noscript>")]
    assert len(re.findall(r"<b id=", body)) == len(re.findall(r"\S+", TEXT)) + 1
    assert str(tmp_path) not in html
    assert sorted(p.name for p in tmp_path.iterdir()) == ["words.html"]


def test_impossible_requests_are_refused(loaded: Loaded, document: Path) -> None:
    with pytest.raises(InputError, match="position"):
        shown(loaded, document, position=100_000)
    with pytest.raises(InputError, match="one of them"):
        shown(loaded, document, position=3, query="what")
    with pytest.raises(InputError, match="query"):
        shown(loaded, document, query="  ")
    with pytest.raises(InputError, match="no such file"):
        shown(loaded, document.parent / "none.txt")
    with pytest.raises(ValueError, match="--file"):
        words_page.Page(model="tiny", file=None)
    with pytest.raises(ValueError, match="MODEL"):
        words_page.Page(model=None, file="x")
