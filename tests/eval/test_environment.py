"""What is told about the machine."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from longswift.eval import inventory
from longswift.eval.environment import environment


def test_the_environment_knows_versions_and_threads() -> None:
    here = environment()
    assert {"longswift", "python", "torch", "transformers"} <= set(here.versions)
    assert here.threads == 1 and here.cores >= 1 and here.system
    assert here.place("cpu") == "1 thread(s), cpu"
    assert replace(here, accelerator="A GPU").place("cuda:0") == "A GPU"


def test_versions_of_a_gpu_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91300)
    found = environment().versions
    assert found["cuda"] == "13.0" and found["cudnn"] == "91300"


def test_the_inventory_lists_backends_and_mechanisms() -> None:
    found = inventory.inventory()
    assert found.backends["eager"]["usable"] and found.backends["eager"]["reason"]
    assert all(found.mechanisms.values()) and "ms_swift" in found.mechanisms
    assert json.loads(inventory.as_json(found))["mechanisms"] == found.mechanisms
    assert [table.title for table in inventory.tables(found)][0] == "versions"
