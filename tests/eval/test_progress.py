"""Bars on a terminal, and none elsewhere."""

from __future__ import annotations

import io
import sys
import threading

import pytest

from longswift.eval.progress import bar, silent


class Terminal(io.StringIO):
    """A text stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("timed", [True, False])
def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, timed: bool) -> None:
    """A timed one has no thread of its own, and is drawn all the same."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    before = threading.active_count()
    with bar(4, "starting", timed=timed) as step:
        assert threading.active_count() == before + (not timed)
        step(2, "reading the second half")
        if timed:
            assert "reading the second half" in sys.stderr.getvalue()  # type: ignore[attr-defined]
        step(2)


def test_no_bar_off_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with bar(4, "starting") as step:
        assert step is silent
    monkeypatch.setattr(sys, "stderr", Terminal())
    with bar(4, "starting", shown=False) as step:
        assert step is silent
