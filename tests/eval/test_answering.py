"""Asking about a file: chunked reading, streaming, lengths the model cannot position."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import longswift
from longswift.core.errors import ConfigError, InputError
from longswift.eval.answering import Answer, Question, mechanism
from longswift.eval.models import load


@pytest.fixture
def document(tmp_path: Path) -> Path:
    file = tmp_path / "doc.txt"
    file.write_text("The import statement finds a module. " * 40, encoding="utf-8")
    return file


def question(model: Path, document: Path, **changes: Any) -> Question:
    options = {"model": str(model), "file": str(document), "prompt": "What?", "chunk": 128}
    return Question(**{**options, "max_new_tokens": 8, **changes})


def test_the_streamed_pieces_are_the_answer(model_directory: Path, document: Path) -> None:
    answers = {}
    for name in ("model", "full", "ms_swift"):
        answer = Answer(question(model_directory, document, mechanism=mechanism(name)))
        answers[name] = "".join(answer.stream())
        assert answers[name] == answer.loaded.decode(answer._made)
        assert "tokens/s" in answer.account() and "reads" in answer.describe()
    assert answers["model"] == answers["full"] == answers["ms_swift"]


def test_a_text_longer_than_the_model_is_refused_until_it_is_extended(
    model_directory: Path, document: Path, tmp_path: Path
) -> None:
    loaded = load(str(model_directory))
    loaded.model.config.max_position_embeddings = 128
    loaded.model.save_pretrained(tmp_path / "short")
    loaded.tokenizer.save_pretrained(tmp_path / "short")
    with pytest.raises(InputError, match="at most 128 tokens"):
        Answer(question(tmp_path / "short", document))
    longer = question(tmp_path / "short", document, max_length=4096, mechanism=longswift.Full())
    assert len("".join(Answer(longer).stream())) >= 0


def test_impossible_requests_are_refused(model_directory: Path, document: Path) -> None:
    with pytest.raises(ConfigError, match="block"):
        question(model_directory, document, mechanism=longswift.MSSwift(), chunk=100)
    with pytest.raises(ConfigError, match="yarn"):
        question(model_directory, document, rope="yawn")
    with pytest.raises(ConfigError, match="max_new_tokens"):
        question(model_directory, document, max_new_tokens=0)
    with pytest.raises(ConfigError, match="one mechanism"):
        mechanism("full,ms_swift")
    with pytest.raises(ConfigError):
        Answer(question(Path("/nowhere"), document))
    with pytest.raises(ConfigError, match="int8"):
        Answer(question(model_directory, document, dtype="int8"))
