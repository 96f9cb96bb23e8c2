"""A lazy table from names to classes: ``name -> "module:Class"``, open to entry points."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import entry_points
from inspect import Parameter, signature
from typing import Any, Generic, TypeVar

from longswift.core.errors import ConfigError, problem

T = TypeVar("T")


def unknown_name(kind: str, name: object, known: Sequence[str], *also: str) -> ConfigError:
    """The error for a name that nobody knows, with the nearest one that somebody does.

    Args:
        kind: What was named.
        name: What it was called.
        known: Every name, as the tables have them.
        also: What else is accepted in this place.
    """
    names = [*known, *also]
    near = difflib.get_close_matches(str(name).replace("-", "_"), names, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else "Pick one of these names."
    return ConfigError(
        problem(
            kind,
            expected=f"one of {', '.join(names)}",
            got=repr(name),
            fix=f"{hint} '-' is accepted for '_'.",
        )
    )


class Registry(Generic[T]):
    """Names to classes, imported on first use.

    Args:
        kind: What is registered, for error messages.
        table: ``{name: "module:Class"}``.
        entry_point_group: Installed packages may add names here; ours win on a clash.
    """

    def __init__(self, kind: str, table: dict[str, str], entry_point_group: str) -> None:
        self._kind = kind
        self._table = table
        self._group = entry_point_group

    def _targets(self) -> dict[str, str]:
        plugins = {point.name: point.value for point in entry_points(group=self._group)}
        return {**plugins, **self._table}

    def names(self) -> list[str]:
        """Every registered name, ours first."""
        return list(self._table) + sorted(set(self._targets()) - set(self._table))

    def get(self, name: str) -> type[T]:
        """The class behind ``name``.

        Raises:
            ConfigError: The name is unknown; see ``unknown_name``.
        """
        if not isinstance(name, str):
            raise unknown_name(self._kind, name, self.names())
        name = name.replace("-", "_")
        # Asking what all installed packages add takes milliseconds.
        targets = self._table if name in self._table else self._targets()
        if name not in targets:
            raise unknown_name(self._kind, name, self.names())
        module, _, attribute = targets[name].partition(":")
        return getattr(import_module(module), attribute)

    def build(self, name: str, config: dict[str, Any]) -> T:
        """An instance of ``name`` from keyword arguments; unknown keywords are named."""
        cls = self.get(name)
        known = signature(cls).parameters
        takes_all = any(one.kind is Parameter.VAR_KEYWORD for one in known.values())
        unknown = [option for option in config if option not in known and not takes_all]
        if unknown:
            near = difflib.get_close_matches(unknown[0], known, n=1)
            raise ConfigError(
                problem(
                    f"{self._kind} {name!r}",
                    expected=f"options among {', '.join(known)}" if known else "no options",
                    got=", ".join(repr(option) for option in unknown),
                    fix=f"Did you mean {near[0]!r}?" if near else f"See help({cls.__name__}).",
                )
            )
        try:
            return cls(**config)
        except TypeError as error:
            raise ConfigError(
                problem(
                    f"{self._kind} {name!r}",
                    expected="its documented options",
                    got=f"{sorted(config)} ({error})",
                    fix=f"See help({cls.__name__}).",
                )
            ) from None

    def from_dict(self, config: dict[str, Any]) -> T:
        """An instance from its name and options in one dictionary, as ``to_dict`` saves them."""
        if not isinstance(config, dict) or "name" not in config:
            raise ConfigError(
                problem(
                    f"{self._kind} config",
                    expected="a dictionary with a 'name'",
                    got=repr(config),
                    fix="Save one with its to_dict().",
                )
            )
        return self.build(config["name"], {k: v for k, v in config.items() if k != "name"})
