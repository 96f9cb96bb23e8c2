"""Profiles: JSON there and back, validation, and what layers they prescribe."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longswift import Full, InputError, MSSwift
from longswift.mechanisms.profile import Architecture, LayerProfile, Profile, read_profile

ARCHITECTURE = Architecture(model_type="llama", layers=4, heads=4, kv_heads=2, head_dim=8)
BASE = MSSwift(windows=(16, 32), sinks=2, key_tokens=16, block=16, remainder=32, dense_below=0)
PROFILE = Profile(
    architecture=ARCHITECTURE,
    attention=BASE,
    layers={
        1: LayerProfile(scale=(1, 0), key_tokens=(0, 32), dense=(False, False)),
        2: LayerProfile(scale=(0, 1), key_tokens=(16, 16), dense=(False, True)),
        3: LayerProfile(scale=(0, 0), key_tokens=(0, 0), dense=(True, True)),
    },
    calibration={"target": 0.9},
)


def test_profile_survives_json(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    file.write_text(PROFILE.to_json())
    assert read_profile(file) == PROFILE == read_profile(str(file))
    assert read_profile(PROFILE.to_dict()) == PROFILE and read_profile(PROFILE) is PROFILE


def test_layers_run_what_the_profile_says(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    file.write_text(PROFILE.to_json())
    assert MSSwift.from_profile(file, layer=0) == BASE
    assert MSSwift.from_profile(PROFILE, layer=1) == replace(
        BASE, scale_of_head=(1, 0), key_tokens=(0, 32)
    )
    assert MSSwift.from_profile(PROFILE, layer=2) == replace(
        BASE, scale_of_head=(0, 1), dense_heads=(1,)
    )
    assert MSSwift.from_profile(PROFILE.to_dict(), layer=3) == Full()
    assert PROFILE.mechanisms().keys() == {1, 2, 3}
    q, k = torch.randn(1, 4, 70, 8), torch.randn(1, 2, 70, 8)
    full, mixed = (m(q, k, k).out for m in (Full(), MSSwift.from_profile(PROFILE, layer=2)))
    torch.testing.assert_close(mixed[:, 2:], full[:, 2:])
    with pytest.raises(InputError, match="layer below 4"):
        MSSwift.from_profile(PROFILE, layer=4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "other"}, "calibrate"),
        ({"version": 2}, "version 1"),
        ({"layers": {"7": PROFILE.to_dict()["layers"]["1"]}}, "layers below 4"),
        ({"layers": {"x": PROFILE.to_dict()["layers"]["1"]}}, "fields of a profile"),
        ({"layers": {"1": {"scale": [0], "key_tokens": [1], "dense": [False]}}}, "2 entries"),
        ({"layers": {"1": {"scale": [0, 5], "key_tokens": [1, 1], "dense": [False, False]}}}, "sc"),
        ({"layers": {"1": {"scale": [0, 0], "key_tokens": [1, -1], "dense": [False] * 2}}}, "budg"),
        ({"layers": {"1": {"scale": [0, 0], "key_tokens": [1, 1], "dense": [0, 1]}}}, "dense"),
        ({"layers": {"1": {"scale": [0, 0]}}}, "fields of a profile"),
        ({"attention": {"name": "ms_swift", "windows": [0]}}, "fields of a profile"),
        ({"attention": []}, "fields of a profile"),
        ({"architecture": {"model_type": "llama"}}, "fields of a profile"),
        ({"architecture": {**PROFILE.to_dict()["architecture"], "heads": "4"}}, "whole numbers"),
        ({"architecture": {**PROFILE.to_dict()["architecture"], "layers": 4.0}}, "whole numbers"),
        ({"version": True}, "version 1, got True"),
        ({"version": "1"}, "version 1, got '1'"),
        ({"Layers": {}}, r"also \['Layers'\]"),
        ({"attention": {**PROFILE.to_dict()["attention"], "name": "full"}}, "got full"),
    ],
)
def test_other_content_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    file.write_text(json.dumps({**PROFILE.to_dict(), **change}))
    with pytest.raises(InputError, match=said):
        read_profile(file)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no JSON")
    for name in ("text", "nowhere"):
        with pytest.raises(InputError, match="longswift calibrate"):
            read_profile(tmp_path / name)


@pytest.mark.parametrize("name", ["model_type", "layers", "heads", "kv_heads", "head_dim"])
def test_other_architectures_are_refused(name: str) -> None:
    other = replace(ARCHITECTURE, **{name: "qwen3" if name == "model_type" else 9})
    with pytest.raises(InputError, match=f"{name} "):
        PROFILE.check(other)
    PROFILE.check(replace(ARCHITECTURE))
