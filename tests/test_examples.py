"""The README's examples run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
EXAMPLES = re.findall(r"```python\n(.*?)```", (REPO / "README.md").read_text("utf-8"), re.DOTALL)


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
