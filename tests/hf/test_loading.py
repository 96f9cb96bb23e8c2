"""Models that do not load say so in one line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from longswift.core.errors import ConfigError
from longswift.hf.loading import load


@pytest.mark.parametrize("keep", [5000, 60])
def test_damaged_weights(model_directory: Path, tmp_path: Path, keep: int) -> None:
    place = shutil.copytree(model_directory, tmp_path / "model")
    weights = place / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(ConfigError, match="may be incomplete"):
        load(place)
