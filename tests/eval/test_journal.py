"""A journal keeps whole lines, drops torn ones, and knows its run."""

from __future__ import annotations

from pathlib import Path

import pytest

from longswift.core.errors import InputError
from longswift.eval.journal import Journal

RUN = {"config": {"model": "tiny", "lengths": (1, 2)}, "environment": {"threads": 1}}


def test_lines_come_back(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "a.jsonl"
    first = Journal(file, RUN)
    first.add({"index": 0, "text": "line\nbreak"})
    first.add({"index": 1})
    second = Journal(file, RUN)
    assert second.reused == 2 and second.entries == first.entries
    assert second.find(index=0) == [{"index": 0, "text": "line\nbreak"}]
    assert Journal(file, RUN, fresh=True).entries == [] and file.read_bytes().count(b"\n") == 1
    memory = Journal(None, RUN)
    memory.add({"index": 3})
    assert memory.entries == [{"index": 3}] and memory.reused == 0


@pytest.mark.parametrize("kept", range(0, 60, 7))
def test_a_torn_line_is_dropped_and_the_next_one_whole(tmp_path: Path, kept: int) -> None:
    file = tmp_path / "a.jsonl"
    journal = Journal(file, RUN)
    journal.add({"index": 0})
    size = file.stat().st_size
    journal.add({"index": 1, "text": "x" * 40})
    with file.open("r+b") as content:
        content.truncate(size + kept)
    again = Journal(file, RUN)
    assert again.entries == [{"index": 0}]
    again.add({"index": 2})
    assert Journal(file, RUN).entries == [{"index": 0}, {"index": 2}]


def test_a_torn_first_line_is_a_fresh_start(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    Journal(file, RUN)
    file.write_bytes(file.read_bytes()[:10])
    Journal(file, RUN).add({"index": 0})
    assert Journal(file, RUN).entries == [{"index": 0}]


def test_another_run_is_refused_by_what_differs(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    Journal(file, RUN)
    other = {**RUN, "environment": {"threads": 2}}
    with pytest.raises(InputError, match=r"environment\.threads"):
        Journal(file, other)
    whole = file.read_bytes()
    file.write_bytes(whole + b"no json\n")
    with pytest.raises(InputError, match="no journal"):
        Journal(file, RUN)
    for content in ("no json\n", '{"rows": []}\n'):
        file.write_text(content)
        for fresh in (False, True):
            with pytest.raises(InputError, match="something else"):
                Journal(file, RUN, fresh=fresh)
        assert file.read_text() == content
