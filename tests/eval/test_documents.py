"""Reading the user's text, and options as people type them."""

from __future__ import annotations

from pathlib import Path

import pytest

from longswift.core.errors import ConfigError, InputError
from longswift.eval import options
from longswift.eval.documents import read_text


def test_text_is_read_without_its_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffGrüße\n".encode())
    assert read_text(file) == "Grüße\n"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "empty"),
        (b" \n\t", "empty"),
        (b"a\0b", "binary"),
        ("Grüße".encode("utf-16"), "UTF-16"),
        ("Grüße".encode("latin-1"), "offset 2"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path: Path, content: bytes, why: str) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(content)
    with pytest.raises(InputError, match=why) as error:
        read_text(file)
    assert "\n" not in str(error.value)


def test_missing_files_and_directories_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_text(tmp_path / "none")
    with pytest.raises(InputError, match="directory"):
        read_text(tmp_path)


def test_lengths() -> None:
    assert options.lengths("32k, 4096,4096") == (4096, 32768)
    assert options.length("131_072") == 131072
    for text in ("", "x", "0", "-1", "1.5", "k", "4096;8192", "²", "9" * 5000):
        with pytest.raises(ConfigError):
            options.lengths(text)


def test_mechanisms_with_settings() -> None:
    found = options.mechanisms("full,sliding-window", ["sliding_window.window=64"])
    assert list(found) == ["full", "sliding_window"]
    assert found["sliding_window"].to_dict()["window"] == 64
    swift = options.mechanisms("ms_swift", ["ms_swift.windows=[64,128]"])["ms_swift"]
    assert options.from_json(swift.to_dict()) == swift


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("", []),
        ("nothing", []),
        ("full", ["full"]),
        ("full", ["sliding_window.window=3"]),
        ("sliding_window", ["sliding_window.wimdow=3"]),
        ("sliding_window", ["sliding_window.window=wide"]),
    ],
)
def test_impossible_mechanisms_are_refused(text: str, settings: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        options.mechanisms(text, settings)
    assert "\n" not in str(error.value)


def test_dtypes_and_devices() -> None:
    assert str(options.dtype("bfloat16")) == "torch.bfloat16"
    assert options.device("cpu").type == "cpu"
    with pytest.raises(ConfigError, match="int8"):
        options.dtype("int8")
    with pytest.raises(ConfigError, match="nonsense"):
        options.device("nonsense")
