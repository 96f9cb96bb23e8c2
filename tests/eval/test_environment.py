"""What is told about the machine."""

from __future__ import annotations

import json

from longswift.eval import inventory
from longswift.eval.environment import environment


def test_the_environment_knows_versions_and_threads() -> None:
    here = environment()
    assert {"longswift", "python", "torch", "transformers"} <= set(here.versions)
    assert here.threads == 1 and here.cores >= 1 and here.system


def test_the_inventory_lists_backends_and_mechanisms() -> None:
    found = inventory.inventory()
    assert found.backends["eager"]["usable"] and found.backends["eager"]["reason"]
    assert all(found.mechanisms.values()) and "ms_swift" in found.mechanisms
    assert json.loads(inventory.as_json(found))["mechanisms"] == found.mechanisms
    assert [table.title for table in inventory.tables(found)][0] == "versions"
