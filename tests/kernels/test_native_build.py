"""The compiled kernels: what happens where they are missing, broken or not to be built."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from longswift import ConfigError, SlidingWindow, UnsupportedError
from longswift.core import compiled
from longswift.kernels import dispatch


@pytest.fixture
def forgetful() -> Iterator[None]:
    for remembered in (compiled.operators, compiled.library, dispatch.trusted):
        remembered.cache_clear()
    yield
    for remembered in (compiled.operators, compiled.library, dispatch.trusted):
        remembered.cache_clear()


@pytest.mark.usefixtures("forgetful")
def test_without_them_everything_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    even = torch.randn(1, 1, 4, 16)
    monkeypatch.setenv("LONGSWIFT_NATIVE", "0")
    assert SlidingWindow(window=2)(even, even, even).stats.backend == "eager"
    with pytest.raises(ConfigError, match="LONGSWIFT_NATIVE=0"):
        SlidingWindow(window=2)(even, even, even, backend="native")
    monkeypatch.delenv("LONGSWIFT_NATIVE")
    monkeypatch.setenv("LONGSWIFT_CACHE", str(tmp_path))
    compiled.library.cache_clear()
    if compiled.reason() is not None:
        assert SlidingWindow(window=2)(even, even, even).stats.backend == "eager"
        assert "longswift build" in str(compiled.reason()) or "kernels" in str(compiled.reason())


@pytest.mark.usefixtures("forgetful")
def test_a_library_that_does_not_load_is_named_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if compiled.supported() is not None:
        pytest.skip(str(compiled.supported()))
    monkeypatch.setenv("LONGSWIFT_CACHE", str(tmp_path))
    compiled.library.cache_clear()
    compiled.library().parent.mkdir(parents=True)
    compiled.library().write_bytes(b"no library")
    with pytest.warns(UserWarning, match="are not used"):
        assert compiled.operators() is None


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("built", [True, False])
def test_only_who_has_compiled_before_is_told_to_do_it_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, built: bool
) -> None:
    if compiled.supported() is not None:
        pytest.skip(str(compiled.supported()))
    monkeypatch.setenv("LONGSWIFT_CACHE", str(tmp_path))
    compiled.library.cache_clear()
    if built:
        other = tmp_path / "another" / compiled.library().name
        other.parent.mkdir()
        other.touch()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert compiled.operators() is None
    assert [("longswift build" in str(one.message)) for one in told] == [True] * built


@pytest.mark.usefixtures("forgetful")
def test_a_cache_that_cannot_be_written_to_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if compiled.supported() is not None or shutil.which("c++") is None:
        pytest.skip("nothing could be built here")
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LONGSWIFT_CACHE", str(tmp_path / "file" / "below"))
    compiled.library.cache_clear()
    with pytest.raises(UnsupportedError, match="LONGSWIFT_CACHE"):
        compiled.build()


@pytest.mark.usefixtures("forgetful")
def test_building_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if compiled.supported() is not None:
        pytest.skip(str(compiled.supported()))
    monkeypatch.setenv("LONGSWIFT_CACHE", str(tmp_path))
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    compiled.library.cache_clear()
    with pytest.raises(UnsupportedError, match=r"expected c\+\+ on the PATH"):
        compiled.build()
    assert not list(tmp_path.rglob("*.so"))
