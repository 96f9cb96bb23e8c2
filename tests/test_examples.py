"""The examples of the README and of the training page run as they stand."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).parents[1]


def blocks(page: str) -> list[str]:
    """The Python code blocks of a page."""
    return re.findall(r"```python\n(.*?)```", (REPO / page).read_text("utf-8"), re.DOTALL)


EXAMPLES = blocks("README.md")


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == 2
    assert len([line for line in EXAMPLES[0].splitlines() if line.strip()]) <= 11


@pytest.mark.parametrize("index", range(len(EXAMPLES)))
def test_example(
    index: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(REPO)
    exec(compile(EXAMPLES[index], f"README.md, example {index + 1}", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_training_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    losses = []
    for number, block in enumerate(blocks("docs/training.md"), 1):
        needs = re.findall(r"^import (lightning|deepspeed)$", block, re.MULTILINE)
        if all(find_spec(name) for name in needs):
            exec(compile(block, f"docs/training.md, block {number}", "exec"), names)
            losses.append(names.pop("loss", None))
    assert len(losses) >= 4
    assert all(loss is None or 0 < float(loss.detach()) < 5 for loss in losses)
    assert [loss is not None for loss in losses[:4]] == [False, False, True, True]
