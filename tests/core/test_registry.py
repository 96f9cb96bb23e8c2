"""Names, options, saved configurations and plug-ins."""

from __future__ import annotations

import json
import pickle
from dataclasses import FrozenInstanceError, fields
from importlib.metadata import EntryPoint

import pytest

from longswift import ConfigError, Full, MSSwift, from_dict, get_mechanism, list_mechanisms
from longswift.core import registry
from longswift.core.mechanism import Mechanism
from longswift.mechanisms.selectors import SELECTORS


def test_the_table() -> None:
    assert list_mechanisms()[:3] == ["full", "sliding_window", "ms_swift"]
    for name in list_mechanisms():
        mechanism = get_mechanism(name)
        assert isinstance(mechanism, Mechanism)
        assert mechanism.name == name


def test_names_may_have_hyphens() -> None:
    assert get_mechanism("ms-swift") == MSSwift()


@pytest.mark.parametrize(
    "name,hint", [("ms_swiff", "ms_swift"), ("slidingwindow", "sliding_window"), ("", "full")]
)
def test_unknown_names_list_the_known(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        get_mechanism(name)


@pytest.mark.parametrize("name", [None, 3, b"full", ["full"]])
def test_names_are_text(name: object) -> None:
    with pytest.raises(ConfigError, match="mechanism"):
        get_mechanism(name)  # type: ignore[arg-type]


def test_unknown_options_are_named() -> None:
    with pytest.raises(ConfigError, match="windw") as caught:
        get_mechanism("sliding_window", windw=3)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="options among window, .*Did you mean 'window'"):
        get_mechanism("sliding_window", windw=3, window=3)
    with pytest.raises(ConfigError, match="mechanism 'full': expected no options, got 'window'"):
        get_mechanism("full", window=3)


@pytest.mark.parametrize("name", list_mechanisms())
def test_configuration_survives_json(name: str) -> None:
    mechanism = get_mechanism(name)
    saved = json.loads(json.dumps(mechanism.to_dict()))
    assert saved["name"] == name
    assert from_dict(saved) == mechanism
    assert hash(from_dict(saved)) == hash(mechanism)
    assert pickle.loads(pickle.dumps(mechanism)) == mechanism


def test_changed_configuration_survives_json() -> None:
    mechanism = MSSwift(
        windows=(64, 256),
        scale_of_head=(1, 0, 0),
        coverage=0.9,
        remainder=None,
        selector={"name": "bounds", "proposals": 4},
    )
    assert from_dict(json.loads(json.dumps(mechanism.to_dict()))) == mechanism
    assert mechanism != MSSwift()


@pytest.mark.parametrize("name", SELECTORS.names())
def test_selectors_survive_json(name: str) -> None:
    mechanism = MSSwift(selector={"name": name, "key_block": 32})
    saved = json.loads(json.dumps(mechanism.to_dict()))
    assert saved["selector"]["name"] == name
    assert from_dict(saved) == mechanism
    assert pickle.loads(pickle.dumps(mechanism)) == mechanism
    assert MSSwift(selector=name) == MSSwift(selector={"name": name})


@pytest.mark.parametrize("saved", [None, {}, {"window": 3}, "full", [("name", "full")]])
def test_bad_saved_configuration(saved: object) -> None:
    with pytest.raises(ConfigError, match="mechanism"):
        from_dict(saved)  # type: ignore[arg-type]


def test_mechanisms_are_immutable() -> None:
    mechanism = MSSwift()
    with pytest.raises(FrozenInstanceError):
        mechanism.sinks = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        MSSwift((128,))  # type: ignore[misc]
    assert {f.name for f in fields(mechanism)} == {*mechanism.to_dict()} - {"name"}


def test_plug_ins_add_names_and_do_not_replace_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        EntryPoint("mine", "longswift.mechanisms.full:Full", "longswift.mechanisms"),
        EntryPoint("ms_swift", "longswift.mechanisms.full:Full", "longswift.mechanisms"),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: found)
    assert "mine" in list_mechanisms()
    assert get_mechanism("mine") == Full()
    assert isinstance(get_mechanism("ms_swift"), MSSwift)
