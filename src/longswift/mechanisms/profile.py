"""Profiles: what calibration found for every KV head of one model, as JSON beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from longswift.core.errors import InputError, problem
from longswift.core.mechanism import Mechanism
from longswift.mechanisms.full import Full
from longswift.mechanisms.ms_swift import MSSwift

FORMAT = "longswift-profile"
VERSION = 1
_FIELDS = {"format", "version", "architecture", "attention", "layers", "calibration"}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The model a profile belongs to, as far as attention knows it.

    Attributes:
        model_type: The configuration's ``model_type``.
        layers: Layers of the text decoder.
        heads: Query heads.
        kv_heads: Key/value heads.
        head_dim: Width of a head.
    """

    model_type: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        counts = (self.layers, self.heads, self.kv_heads, self.head_dim)
        if type(self.model_type) is not str or any(type(n) is not int or n < 1 for n in counts):
            raise _refuse("an architecture of a name and whole numbers", asdict(self))


@dataclass(frozen=True, kw_only=True)
class LayerProfile:
    """One layer, an entry per KV head.

    Attributes:
        scale: Index into the windows of the profile's attention.
        key_tokens: Budget.
        dense: Whether the head sees every key.
    """

    scale: tuple[int, ...]
    key_tokens: tuple[int, ...]
    dense: tuple[bool, ...]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Settings of single heads.

    Attributes:
        architecture: The model it was made for; others are refused.
        attention: What all layers share, and what layers without an entry run.
        layers: Calibrated layers by index.
        calibration: Target, text, predictions and check, for the reader.
    """

    architecture: Architecture
    attention: MSSwift
    layers: Mapping[int, LayerProfile]
    calibration: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kv_heads, windows = self.architecture.kv_heads, len(self.attention.windows)
        for index, layer in self.layers.items():
            if not 0 <= index < self.architecture.layers:
                raise _refuse(f"layers below {self.architecture.layers}", f"layer {index}")
            if not len(layer.scale) == len(layer.key_tokens) == len(layer.dense) == kv_heads:
                raise _refuse(f"{kv_heads} entries per layer, one per KV head", asdict(layer))
            if not all(type(s) is int and 0 <= s < windows for s in layer.scale):
                raise _refuse(f"scales below {windows}", layer.scale)
            if not all(type(b) is int and b >= 0 for b in layer.key_tokens):
                raise _refuse("budgets of at least 0", layer.key_tokens)
            if not all(isinstance(d, bool) for d in layer.dense):
                raise _refuse("dense heads as true or false", layer.dense)

    def mechanism(self, layer: int) -> Mechanism:
        """What a layer runs.

        Raises:
            InputError: The model has no such layer.
        """
        if not 0 <= layer < self.architecture.layers:
            raise _refuse(f"a layer below {self.architecture.layers}", layer)
        found = self.layers.get(layer)
        if found is None:
            return self.attention
        if all(found.dense):
            return Full()
        options = {**self.attention.to_dict(), "scale_of_head": found.scale}
        options["key_tokens"] = _one(found.key_tokens)
        options["dense_heads"] = tuple(i for i, dense in enumerate(found.dense) if dense)
        del options["name"]
        return MSSwift(**options)

    def mechanisms(self) -> dict[int, Mechanism]:
        """What every calibrated layer runs."""
        return {layer: self.mechanism(layer) for layer in self.layers}

    def check(self, architecture: Architecture) -> None:
        """Raise ``InputError`` unless the profile was made for this architecture."""
        mine, theirs = asdict(self.architecture), asdict(architecture)
        wrong = [name for name in mine if mine[name] != theirs[name]]
        if wrong:
            raise InputError(
                problem(
                    "profile",
                    expected=", ".join(f"{name} {mine[name]}" for name in wrong),
                    got=", ".join(f"{name} {theirs[name]}" for name in wrong),
                    fix="It belongs to another model; make one with longswift calibrate.",
                )
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary, ready for JSON."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "architecture": asdict(self.architecture),
            "attention": self.attention.to_dict(),
            "layers": {
                str(index): {name: list(value) for name, value in asdict(layer).items()}
                for index, layer in self.layers.items()
            },
            "calibration": self.calibration,
        }

    @classmethod
    def from_dict(cls, content: Any) -> Profile:
        """Inverse of ``to_dict``.

        Raises:
            InputError: No profile, another version, or impossible entries.
        """
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise _refuse("a profile written by longswift calibrate", "something else")
        version = content.get("version")
        if type(version) is not int or version != VERSION:
            raise _refuse(f"version {VERSION}", repr(version))
        if unknown := sorted(set(content) - _FIELDS):
            raise _refuse(f"the fields {', '.join(sorted(_FIELDS))}", f"also {unknown}")
        try:
            if content["attention"].get("name") != MSSwift.name:
                raise _refuse(f"attention {MSSwift.name}", content["attention"].get("name"))
            attention = {k: v for k, v in content["attention"].items() if k != "name"}
            return cls(
                architecture=Architecture(**content["architecture"]),
                attention=MSSwift(**attention),
                layers={
                    int(index): LayerProfile(**{k: tuple(v) for k, v in layer.items()})
                    for index, layer in content["layers"].items()
                },
                calibration=dict(content.get("calibration", {})),
            )
        except InputError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _refuse("the fields of a profile", f"{type(error).__name__}: {error}") from None

    def to_json(self) -> str:
        """JSON text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"


def read_profile(profile: Profile | str | Path | dict[str, Any]) -> Profile:
    """A profile from a file, its content, or itself.

    Raises:
        InputError: The file is missing, or no profile.
    """
    if isinstance(profile, Profile):
        return profile
    if isinstance(profile, dict):
        return Profile.from_dict(profile)
    try:
        content = json.loads(Path(profile).read_text(encoding="utf-8"))
    except OSError as error:
        raise _refuse("a file", f"{profile} ({error.strerror or error})") from None
    except ValueError as error:
        raise _refuse("JSON", f"{profile} ({error})") from None
    return Profile.from_dict(content)


def _one(budgets: tuple[int, ...]) -> int | tuple[int, ...]:
    return budgets[0] if len(set(budgets)) == 1 else budgets


def _refuse(expected: str, got: object) -> InputError:
    return InputError(
        problem("profile", expected=expected, got=got, fix="Make one with longswift calibrate.")
    )
