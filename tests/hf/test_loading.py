"""Models that do not load say so in one line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from longswift.core.errors import ConfigError
from longswift.hf.loading import load


@pytest.mark.parametrize("keep", [5000, 60])
def test_damaged_weights(model_directory: Path, tmp_path: Path, keep: int) -> None:
    place = shutil.copytree(model_directory, tmp_path / "model")
    weights = place / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(ConfigError, match="may be incomplete"):
        load(place)


def test_lacking_weights(model_directory: Path, tmp_path: Path) -> None:
    place = shutil.copytree(model_directory, tmp_path / "model")
    weights = load_file(place / "model.safetensors")
    lacking = [name for name in weights if ".1." in name]
    save_file({k: v for k, v in weights.items() if k not in lacking}, place / "model.safetensors")
    with pytest.raises(ConfigError, match=f"none called .*, and {len(lacking) - 1} more"):
        load(place)


def test_weights_of_another_shape(model_directory: Path, tmp_path: Path) -> None:
    place = shutil.copytree(model_directory, tmp_path / "model")
    weights = load_file(place / "model.safetensors")
    save_file(weights | {"model.norm.weight": torch.zeros(3)}, place / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model\.norm\.weight \[3\] for "):
        load(place)


def test_a_lost_shard(model_directory: Path, tmp_path: Path) -> None:
    place = shutil.copytree(model_directory, tmp_path / "model")
    (place / "model.safetensors").unlink()
    model, _ = load(model_directory)
    model.save_pretrained(place, max_shard_size="20KB")
    load(place)
    sorted(place.glob("*.safetensors"))[1].unlink()
    with pytest.raises(ConfigError, match="fetch that file again"):
        load(place)
