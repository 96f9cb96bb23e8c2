"""Documents with secrets."""

from __future__ import annotations

from pathlib import Path

import pytest

from longswift.core.errors import InputError
from longswift.eval.documents import source
from longswift.eval.exams import exams
from longswift.eval.models import load


def test_every_secret_is_in_the_document_and_the_length_is_exact(model_directory: Path) -> None:
    loaded = load(str(model_directory))
    found = exams(loaded, source(None), length=700, documents=2, secrets=3, seed=0)
    assert len({exam.answers for exam in found}) == len(found) == 2
    assert sorted(d for exam in found for d in exam.depths) == pytest.approx(
        [(i + 0.5) / 6 for i in range(6)], abs=0.02
    )
    for exam in found:
        assert len(exam.document) == 700
        text = loaded.decode(exam.document)
        for question, answer in zip(exam.questions, exam.answers, strict=True):
            assert f"{loaded.decode(question).rstrip()} {answer}." in text


def test_too_short_for_its_secrets(model_directory: Path) -> None:
    loaded = load(str(model_directory))
    with pytest.raises(InputError, match="so that 3 secrets fit"):
        exams(loaded, source(None), length=20, documents=1, secrets=3, seed=0)
    with pytest.raises(InputError, match="longer --file"):
        exams(loaded, "a few words", length=700, documents=1, secrets=3, seed=0)
