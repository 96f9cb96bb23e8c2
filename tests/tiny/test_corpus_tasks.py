"""The corpus splits, and secrets that are in their document exactly once."""

from __future__ import annotations

import subprocess
import sys

import pytest

from longswift.tiny import corpus, tasks


def test_splits_share_nothing():
    train = dict(corpus.documents("train"))
    heldout = dict(corpus.documents("heldout"))
    assert not train.keys() & heldout.keys()
    prose = [name for name in heldout if name.startswith("topic:")]
    assert 10 <= len(prose) <= 40
    assert list(heldout)[: len(prose)] == prose


def test_text_is_the_same_in_another_process():
    code = (
        "import hashlib; from longswift.tiny import corpus;"
        "print(hashlib.sha256(corpus.text('heldout').encode()).hexdigest())"
    )
    first, second = (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(2)
    )
    assert first.stdout == second.stdout
    # Roughly three characters make a token, and the long tests need 131072 tokens.
    assert len(corpus.text("heldout")) > 400_000


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="expected a split"):
        corpus.documents("test")


@pytest.mark.parametrize("n", [1, 5, 32])
def test_every_answer_is_in_the_text_once(n):
    text = corpus.text("heldout")[:20_000]
    hidden = tasks.hide_secrets(text, n, seed=3)
    assert len(set(hidden.words)) == n
    for word, question, answer in zip(hidden.words, hidden.questions, hidden.answers, strict=True):
        assert question == tasks.question(word)
        assert hidden.document.count(f"{question} {answer}.") == 1
        assert hidden.document.count(f" {word} ") == 1
    assert hidden == tasks.hide_secrets(text, n, seed=3)
    assert hidden.answers != tasks.hide_secrets(text, n, seed=4).answers


def test_removing_the_sentences_restores_the_text():
    text = corpus.text("heldout")[:5000]
    hidden = tasks.hide_secrets(text, 4, seed=1)
    rest = hidden.document
    for word, answer in zip(hidden.words, hidden.answers, strict=True):
        rest = rest.replace(tasks.statement(word, answer), "")
    assert rest == text


def test_token_ids_keep_depths_and_order():
    hidden = tasks.hide_secrets(
        list(range(1000)), 2, seed=0, depths=(0.75, 0.25), encode=lambda s: [-1] * len(s)
    )
    assert sorted(hidden.depths) == [0.25, 0.75]
    assert [t for t in hidden.document if t >= 0] == list(range(1000))
    assert hidden.document[250] == -1


def test_bad_requests_say_what_to_do():
    with pytest.raises(ValueError, match="at least one secret"):
        tasks.hide_secrets("text", 0)
    with pytest.raises(ValueError, match="pass the tokenizer's encode"):
        tasks.hide_secrets([1, 2, 3], 1)
    with pytest.raises(ValueError, match="expected 2 depths"):
        tasks.hide_secrets("text", 2, depths=(0.5,))
