"""Pictures of patterns: every mechanism of the table, the right reason for every pair."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import longswift
from longswift.core.errors import ConfigError, InputError, UnsupportedError
from longswift.core.mechanism import Call, Mechanism
from longswift.core.types import AttentionResult, AttentionStats
from longswift.eval import pattern_plots, pattern_table
from longswift.eval.patterns import Heads, Picture, Why, options_in_words, picture, reasons
from longswift.mechanisms import list_mechanisms


@dataclass(frozen=True, kw_only=True)
class Summing(Mechanism):
    """Linear attention written down densely: no softmax, every key through a state."""

    name: ClassVar[str] = "summing"

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> AttentionResult:
        weights = torch.nn.functional.elu(q) + 1
        weights = weights @ (torch.nn.functional.elu(k) + 1).transpose(-1, -2)
        weights = weights.tril() if call.causal else weights
        total = weights.sum(-1, keepdim=True)
        stats = AttentionStats(
            mechanism=self.name,
            backend="eager",
            mode="dense",
            keys_per_query=0.0,
            density=1.0,
            dense_rows=0.0,
        )
        return AttentionResult(weights / total @ v, total.squeeze(-1).log(), stats)

    def _visible(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        seen = torch.ones(1, q.shape[1], q.shape[2], k.shape[2], dtype=torch.bool)
        return seen.tril() if call.causal else seen


def forms(mechanism: Mechanism) -> list[bool]:
    return [
        causal
        for causal, has in ((True, mechanism.supports_causal), (False, True))
        if has and (causal or mechanism.supports_bidirectional)
    ]


@pytest.mark.parametrize("length", [16, 50])
@pytest.mark.parametrize("name", list_mechanisms())
def test_every_mechanism_has_a_picture_that_tells_the_truth(name: str, length: int) -> None:
    (mechanism,) = pattern_table.mechanisms(name, [], length)
    for causal in forms(mechanism):
        shown = picture(mechanism, length, causal=causal)
        for heads in shown.heads:
            assert heads.why.shape == (length, length)
            if causal:
                assert not heads.why.triu(1).any(), "a picture shows the future"
            assert heads.why.any(1).all(), "a token sees nothing"
        if shown.subset:
            q, k = torch.randn(2, 1, 3, length, 8, dtype=torch.float64)
            assert Why.SUMMARY not in shown.reasons and Why.STATE not in shown.reasons
            if not isinstance(mechanism, longswift.MSSwift):
                seen = mechanism.visible(q, k, causal=causal)[0]
                assert shown.density == pytest.approx(
                    float(seen.sum()) / (3 * (length * (length + 1) / 2 if causal else length**2))
                )


def test_ms_swift_says_why() -> None:
    """Every reason, against the definition of the mechanism."""
    mechanism = longswift.MSSwift(
        windows=(8,),
        sinks=2,
        key_tokens=4,
        block=4,
        remainder=8,
        dense_below=24,
        selector={"name": "bounds", "key_block": 2, "row_group": 2},
    )
    why = picture(mechanism, 64).heads[0].why
    assert (why[24:, :2] == Why.GLOBAL).all()
    for row in range(24, 64):
        # Windows of 8 that overlap by half: tiles of 4 queries, and 4 keys before.
        start = row // 4 * 4 - 4
        assert (why[row, start : row + 1] == Why.WINDOW).all()
        before = why[row, 2:start]
        assert int((before == Why.CHOSEN).sum()) <= 4
        assert ((before == Why.CHOSEN) | (before == Why.SUMMARY)).all()
    assert (why[20, 2:16] == Why.FULL_ROW).all()
    assert picture(longswift.MSSwift(remainder=None, dense_below=0), 16).subset


def test_without_a_remainder_nothing_is_summarised() -> None:
    options = ["remainder=null"]
    (mechanism,) = pattern_table.mechanisms("ms_swift", options, 64)
    assert picture(mechanism, 64).subset
    (mechanism,) = pattern_table.mechanisms("ms_swift", [], 64)
    shown = picture(mechanism, 64)
    assert not shown.subset and Why.SUMMARY in shown.reasons


@pytest.mark.parametrize("causal", [True, False])
def test_a_state_is_not_drawn_as_a_choice_of_keys(causal: bool) -> None:
    shown = picture(Summing(), 32, causal=causal)
    assert shown.reasons == [Why.STATE] and not shown.subset
    assert "no subset" in pattern_plots.lines([shown])[0]


def test_shapes_are_recognised_without_knowing_the_mechanism() -> None:
    """Global tokens, a window, the rest: from what is seen alone."""
    n = 20
    seen = (torch.arange(n)[:, None] - torch.arange(n)).abs() <= 1
    seen[:, 5] = seen[5, :] = True
    seen[15, 9] = True
    why = reasons(Summing(), seen[None], causal=False)[0]
    assert why[15, 9] == Why.CHOSEN
    assert why[10, 9] == why[10, 11] == Why.WINDOW
    assert (why[:, 5] == Why.GLOBAL).all()
    assert (why[5, 8:] == Why.FULL_ROW).all()
    assert why[15, 0] == Why.NOTHING


def test_a_sliding_window_with_global_tokens() -> None:
    mechanism = longswift.SlidingWindow(window=5, global_tokens=2)
    why = picture(mechanism, 32).heads[0].why
    assert (why[10:, :2] == Why.GLOBAL).all()
    assert (why[10, 6:11] == Why.WINDOW).all() and not why[10, 2:6].any()
    both = picture(mechanism, 32, causal=False).heads[0].why
    assert (both[0, 10:] == Why.FULL_ROW).all()


def test_rectangles_cover_every_pair_once() -> None:
    why = torch.randint(0, 7, (17, 23), dtype=torch.uint8)
    drawn = torch.zeros_like(why)
    for x, y, width, height, reason in pattern_plots.rectangles(why):
        assert not drawn[y : y + height, x : x + width].any()
        drawn[y : y + height, x : x + width] = int(reason)
    assert (drawn == why).all()


def lightness(colour: str) -> float:
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)
    ]
    return 116 * (0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]) ** (1 / 3) - 16


def test_greys_tell_the_reasons_apart() -> None:
    """Background, and every reason, at least seven steps of lightness apart."""
    steps = sorted([100.0, *(lightness(c) for c in pattern_plots.COLOURS.values())])
    assert all(b - a > 7 for a, b in zip(steps, steps[1:], strict=False)), steps
    assert set(pattern_plots.COLOURS) == set(Why) - {Why.NOTHING}


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_pictures_are_deterministic(tmp_path: Path, suffix: str) -> None:
    first, second = tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}"
    for path in (first, second):
        pattern_plots.draw("ms_swift", path, length=16)
    assert first.read_bytes() == second.read_bytes()
    begin = b"\x89PNG" if suffix == "png" else b"<?xml"
    assert first.read_bytes().startswith(begin)


def test_a_sheet_shows_the_whole_table(tmp_path: Path) -> None:
    shown = pattern_plots.draw(None, tmp_path / "all.svg", length=16, causal=False)
    assert [p.mechanism.name for p in shown] == list_mechanisms()
    assert [p.causal for p in shown] == [not p.mechanism.supports_bidirectional for p in shown]


def test_options_are_written_as_people_write_them() -> None:
    (one,) = pattern_table.mechanisms("ms-swift", ["windows=4,12", "sinks=3"], 64)
    assert isinstance(one, longswift.MSSwift) and one.windows == (4, 12) and one.sinks == 3
    _, two = pattern_table.mechanisms("full,sliding_window", ["sliding_window.window=3"], 64)
    assert two == longswift.SlidingWindow(window=3)


@pytest.mark.parametrize(
    ("options", "error", "why"),
    [
        ({"names": "none_such"}, ConfigError, "none_such"),
        ({"length": 8}, ConfigError, "16 to 512"),
        ({"length": 4096}, ConfigError, "16 to 512"),
        ({"path": "picture.pdf"}, InputError, ".svg"),
        ({"names": "ms_swift", "settings": ["colour=1"]}, ConfigError, "colour"),
        ({"names": "ms_swift,full", "settings": ["sinks=1"]}, ConfigError, "NAME.OPTION"),
    ],
)
def test_impossible_pictures_are_refused(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], why: str
) -> None:
    options = {"names": None, **options}
    with pytest.raises(error, match=why):
        pattern_plots.draw(path=tmp_path / options.pop("path", "a.png"), **options)
    assert list(tmp_path.iterdir()) == []


def test_a_form_that_does_not_exist_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(longswift.SlidingWindow, "supports_causal", False)
    with pytest.raises(UnsupportedError, match="sliding_window"):
        pattern_plots.draw("sliding_window", tmp_path / "a.png", length=16)
    shown = pattern_plots.draw(None, tmp_path / "a.png", length=16)
    assert [p.causal for p in shown if p.mechanism.name == "sliding_window"] == [False]


def test_picture_counts_its_reasons() -> None:
    why = torch.tensor([[6, 0], [5, 4]], dtype=torch.uint8)
    shown = Picture(
        mechanism=longswift.Full(),
        causal=True,
        heads=(Heads(label="every head", why=why),),
        subset=True,
        density=1.0,
    )
    assert shown.length == 2 and shown.reasons == [Why.GLOBAL, Why.WINDOW, Why.CHOSEN]


def test_a_title_shows_no_empty_options() -> None:
    (mechanism,) = pattern_table.mechanisms("ms_swift", [], 64)
    words = options_in_words(mechanism)
    assert "dense_heads" not in words and "=," not in words and "windows=8/16/32" in words
    (dense,) = pattern_table.mechanisms("ms_swift", ["dense_heads=[1]"], 64)
    assert "dense_heads=1" in options_in_words(dense)
