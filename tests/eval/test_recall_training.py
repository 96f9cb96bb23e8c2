"""The training benchmark: its task cannot be solved nearby, and its runs continue."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from longswift.eval.results import load

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "recall.py"


@pytest.fixture(scope="module")
def recall() -> Any:
    spec = importlib.util.spec_from_file_location("recall", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["recall"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("part", [0, 2])
def test_answers_are_in_one_part_and_nowhere_else(recall: Any, part: int) -> None:
    data = recall.sequences(64, torch.Generator().manual_seed(0), part)
    again = recall.sequences(64, torch.Generator().manual_seed(0), part)
    assert torch.equal(data.ids, again.ids)
    assert ((data.labels >= 0).sum(1) == recall.QUESTIONS).all()
    for ids, labels in zip(data.ids.tolist(), data.labels.tolist(), strict=True):
        told = dict(divmod(x, recall.LETTERS) for x in ids if x < recall.QUESTION)
        assert len(told) == recall.SLOTS
        begin = part * recall.PART
        others = ids[:begin] + ids[begin + recall.PART :]
        assert all(x >= recall.QUESTION for x in others)
        for place, answer in enumerate(labels):
            if answer >= 0:
                assert place >= recall.LENGTH - recall.PART
                assert answer == recall.ANSWER + told[ids[place] - recall.QUESTION]


def test_no_window_reaches_the_answers(recall: Any) -> None:
    """A change of the first part moves no answer of the control, and those of the others."""
    data = recall.sequences(2, torch.Generator().manual_seed(0))
    other = data.ids.clone()
    other[:, : recall.PART] = recall.FILLER
    for name in recall.ATTENTIONS:
        model = recall.build(name, 0).eval()
        with torch.no_grad():
            last = [model(x).logits[:, recall.LENGTH - recall.PART :] for x in (data.ids, other)]
        assert torch.equal(*last) == (name == "window"), name


def test_runs_continue_and_are_drawn(
    recall: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, picture = tmp_path / "recall.json", tmp_path / "recall.png"
    arguments = ["recall", "--attention", "infini,window", "--steps", "2", "--rows", "2"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--json", str(target), "--png", str(picture)])
    trained: list[str] = []
    train = recall.train

    def interrupted(name: str, *options: Any) -> Any:
        trained.append(name)
        if trained == ["infini", "window"]:
            raise KeyboardInterrupt
        return train(name, *options)

    monkeypatch.setattr(recall, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recall.main()
    assert recall.main() == 0
    assert trained == ["infini", "window", "window"]
    rows = load(target, "recall").rows
    assert [row["attention"] for row in rows] == ["infini", "window"]
    assert rows[0]["gate_before"] == [0.5] * 8 and rows[0]["gate_after"] != [0.5] * 8
    assert rows[1]["gate_before"] == []
    assert rows[0]["parameters"] - rows[1]["parameters"] == 8
    assert picture.read_bytes().startswith(b"\x89PNG")
    for wrong in (["--attention", "nothing"], ["--told", "5"]):
        monkeypatch.setattr(sys, "argv", ["recall", *wrong])
        assert recall.main() == 2
