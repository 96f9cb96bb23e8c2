"""An equal short fine-tuning: its rows, its resuming, and the table after it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from longswift.core.errors import ConfigError, LongSwiftError, UnsupportedError
from longswift.eval import mechanism_runs, mechanism_table, suite, tuning
from longswift.eval.comparison_plot import plot_comparison
from longswift.eval.models import load
from longswift.eval.tuning import Tuning, loss_of, rate_at, row, tune
from longswift.mechanisms import get_mechanism
from tests.eval.test_mechanism_runs import comparison

WINDOW = get_mechanism("sliding_window", window=32)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text to train on."""
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text("A list holds values. The name of a value is short. Nothing is hidden. " * 40)
    return file


def small(text: Path, **changes: Any) -> Tuning:
    return Tuning(**{"steps": 4, "rows": 2, "length": 300, "file": str(text), **changes})


def test_rows_are_text_and_questions_by_turns(model_directory: Path, text: Path) -> None:
    loaded = load(str(model_directory))
    asked = small(text, length=600)
    plain, needles = row(loaded, asked, 0), row(loaded, asked, 1)
    assert len(plain.ids) == 600 and not any(plain.answers)
    assert len(needles.ids) == len(needles.answers) <= 600
    # Two sentences hidden, both asked at the end with the number the document tells.
    told = loaded.decode(needles.ids)
    assert told.count("The secret number of") == 4
    answers = "".join(
        loaded.decode([token]) if answer else " "
        for token, answer in zip(needles.ids, needles.answers, strict=True)
    ).split()
    assert len(answers) == 2 and all(told.count(number) == 2 for number in answers)
    assert row(loaded, asked, 1) == needles != row(loaded, asked, 3)
    assert row(loaded, small(text, length=600, seed=1), 1) != needles


def test_loss_counts_text_and_answers_alike(model_directory: Path, text: Path) -> None:
    model = load(str(model_directory)).model.eval()
    ids, answers = [5, 6, 7, 8, 9], [False, False, False, True, True]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1].double()
        found = loss_of(model, tuning.Row(ids=ids, answers=answers))
    each = -logits.log_softmax(-1)[torch.arange(4), torch.tensor(ids[1:])]
    assert found.item() == pytest.approx((each[:2].mean() + each[2:].mean()).item(), abs=1e-5)
    alone = loss_of(model, tuning.Row(ids=ids, answers=[False] * 5))
    assert alone.item() == pytest.approx(each.mean().item(), abs=1e-5)


def test_rate_warms_up_and_ends_at_zero(text: Path) -> None:
    asked = small(text, steps=20, rate=0.5)
    rates = [rate_at(asked, step) for step in range(20)]
    assert rates[0] == 0.25 and max(rates) == 0.5 and 0 < rates[-1] < 0.03
    with pytest.raises(ConfigError, match="rate"):
        small(text, rate=2.0)


def test_an_interrupted_tuning_ends_in_the_same_weights(
    model_directory: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = small(text)
    whole = tune(load(str(model_directory)), WINDOW, asked, tmp_path / "a")
    assert len(whole) == 4
    monkeypatch.setattr(tuning, "_SAVE_SECONDS", 0.0)
    taken: list[float] = []

    def stop(advance: float = 0, text: str | None = None) -> None:
        taken.append(advance)
        if len(taken) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(load(str(model_directory)), WINDOW, asked, tmp_path / "b", step=stop)
    # Stopped in the third step: the second is the last that was saved.
    steps: list[float] = []
    resumed = tune(
        load(str(model_directory)),
        WINDOW,
        asked,
        tmp_path / "b",
        step=lambda advance=0, text=None: steps.append(advance),
    )
    assert resumed == whole and steps == [2, 1, 1]
    before, one, two = (
        load(str(place)).fingerprint()
        for place in (model_directory, tmp_path / "a" / "model", tmp_path / "b" / "model")
    )
    assert one == two != before
    # Finished: nothing is trained again. With other settings it is.
    monkeypatch.setattr(tuning, "loss_of", None)
    assert tune(load(str(model_directory)), WINDOW, asked, tmp_path / "b") == whole
    with pytest.raises(TypeError):
        tune(load(str(model_directory)), WINDOW, small(text, seed=1), tmp_path / "b")


def test_a_record_vouches_for_no_other_weights(
    model_directory: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, place = small(text), tmp_path / "run"
    tune(load(str(model_directory)), WINDOW, first, place)
    weights = load(str(place / "model")).fingerprint()

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tuning, "write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            tune(load(str(model_directory)), WINDOW, small(text, seed=1), place)
    assert load(str(place / "model")).fingerprint() != weights
    tune(load(str(model_directory)), WINDOW, first, place)
    assert load(str(place / "model")).fingerprint() == weights


def test_a_loss_that_is_not_finite_ends_the_tuning(
    model_directory: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        tuning, "loss_of", lambda *_: torch.tensor(float("nan"), requires_grad=True)
    )
    with pytest.raises(UnsupportedError, match="finite"):
        tune(load(str(model_directory)), WINDOW, small(text), tmp_path)


def test_the_table_shows_quality_before_and_after(
    model_directory: Path, text: Path, tmp_path: Path
) -> None:
    asked = comparison(model_directory, "full,sliding_window,ms_swift")
    asked = mechanism_runs.Comparison(**{**vars(asked), "tuning": small(text, rate=0.02)})
    output = tmp_path / "t.json"
    result = mechanism_runs.run(asked, output, progress=False)
    rows = {r["name"]: mechanism_table.MechanismRow(**r) for r in result.rows}
    assert list(rows) == ["full", "sliding_window", "ms_swift"]
    for name, one in rows.items():
        assert not one.note and set(one.tuned_scores) == {"needle"}
        # Four steps on few words: the text of the divergence is others', but its words are likelier
        # than uniform.
        assert one.tuned_perplexity != one.perplexity and one.tuned_loss is not None
        assert (tmp_path / "t.tuned" / name / "model" / "config.json").is_file()
        assert not (tmp_path / "t.tuned" / name / "checkpoint.pt").exists()
    assert rows["full"].tuned_perplexity_ratio == 1
    assert rows["ms_swift"].tuned_perplexity_ratio == pytest.approx(
        (rows["ms_swift"].tuned_perplexity or 0) / (rows["full"].tuned_perplexity or 1)
    )
    assert result.config["tuning"] == {**asdict(small(text, rate=0.02)), "file": "words.txt"}
    assert str(tmp_path) not in output.read_text()
    table = mechanism_table.quality(result)
    assert "needle, tuned" in table.columns and "4 equal steps" in table.title
    assert all(len(line) == len(table.columns) for line in table.rows)
    assert plot_comparison(result, tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
    # The tuned weights, asked by hand, give the figure of the table.
    once = suite.asked(
        model=str(tmp_path / "t.tuned" / "full" / "model"),
        tasks="needle",
        attention="full",
        lengths=(300,),
        samples=1,
        chunk=128,
    )
    by_hand = suite.run(once, progress=False)
    assert by_hand.rows[0]["score"] == rows["full"].tuned_scores["needle"]


def test_training_on_the_measured_text_is_refused(model_directory: Path, text: Path) -> None:
    asked = comparison(model_directory, "full,ms_swift")
    with pytest.raises(ConfigError, match="another text"):
        mechanism_runs.Comparison(**{**vars(asked), "file": str(text), "tuning": small(text)})


def test_what_cannot_be_read_is_found_out_before_anything_is_timed(
    model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mechanism_runs, "_measured", lambda *_: pytest.fail("timed first"))
    missing = tmp_path / "none.txt"
    asked = vars(comparison(model_directory, "full,ms_swift"))
    for wrong in (
        {"tuning": small(missing)},
        {"file": str(missing)},
        vars(comparison(model_directory, "full,ms_swift", file=missing)),
        vars(comparison(tmp_path / "no-model", "full,ms_swift")),
        vars(comparison(model_directory, "full,ms_swift", lengths=(10**9,))),
    ):
        with pytest.raises(LongSwiftError):
            mechanism_runs.run(
                mechanism_runs.Comparison(**{**asked, **wrong}), tmp_path / "t.json", progress=False
            )


def test_without_a_text_it_trains_on_what_is_not_held_out(tmp_path: Path) -> None:
    from longswift.eval.tuned_runs import training_text
    from longswift.tiny import corpus

    content = training_text(tmp_path).read_text()
    held_out = [body for _, body in corpus.documents("heldout") if len(body) > 500]
    assert len(content) > 10**6 and len(held_out) > 20
    # Not even what topics of the documentation quote of each other.
    assert not any(body[200:500] in content for body in held_out)
