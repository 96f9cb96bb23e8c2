"""Options as people type them, turned into values or into a one-line error."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from longswift.core.errors import ConfigError, problem
from longswift.core.mechanism import Mechanism

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16", "float64")


def names(text: str) -> list[str]:
    """The parts of a comma-separated list, without blanks and repetitions."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def length(text: str) -> int:
    """A number of tokens; ``32k`` means 32 * 1024.

    Raises:
        ConfigError: Not a positive number.
    """
    plain = text.strip().lower().replace("_", "")
    digits, factor = (plain[:-1], 1024) if plain.endswith("k") else (plain, 1)
    if not (digits.isascii() and digits.isdigit()) or int(digits) < 1:
        raise ConfigError(
            problem(
                "length",
                expected="a positive number of tokens such as 32768 or 32k",
                got=repr(text),
                fix="Give lengths as 4096,32768.",
            )
        )
    return int(digits) * factor


def lengths(text: str) -> tuple[int, ...]:
    """Comma-separated lengths, ascending."""
    found = sorted({length(part) for part in names(text)})
    if not found:
        raise ConfigError(
            problem("lengths", expected="at least one", got=repr(text), fix="Try 4096,32768.")
        )
    return tuple(found)


def dtype(name: str) -> torch.dtype:
    """A dtype by its PyTorch name.

    Raises:
        ConfigError: Not a floating dtype attention computes in.
    """
    import torch

    if name not in DTYPES:
        raise ConfigError(
            problem(
                "dtype", expected=f"one of {', '.join(DTYPES)}", got=repr(name), fix="Pick one."
            )
        )
    return getattr(torch, name)


def device(name: str) -> torch.device:
    """A device that this machine has.

    Raises:
        ConfigError: Unknown, or not present.
    """
    import torch

    try:
        found = torch.device(name)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            problem(
                "device",
                expected="one this machine has, e.g. cpu",
                got=f"{name!r} ({str(error).splitlines()[0]})",
                fix="Use --device cpu.",
            )
        ) from None
    return found


def mechanisms(text: str, settings: Sequence[str] = ()) -> dict[str, Mechanism]:
    """Mechanisms by name, with single options changed.

    Args:
        text: Comma-separated names.
        settings: ``name.option=value``; the value is JSON, or a plain word.

    Raises:
        ConfigError: Unknown mechanism or option, or a setting for a mechanism not in ``text``.
    """
    chosen = [name.replace("-", "_") for name in names(text)]
    return {name: from_json({"name": name, **o}) for name, o in assign(chosen, settings).items()}


def assign(chosen: Sequence[str], settings: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The options that ``settings`` give to each of the mechanisms ``chosen``.

    Raises:
        ConfigError: Nothing chosen, or a setting for a mechanism that is not.
    """
    options: dict[str, dict[str, Any]] = {name: {} for name in chosen}
    for setting in settings:
        target, equals, value = setting.partition("=")
        name, _, option = target.strip().partition(".")
        name = name.replace("-", "_")
        if not equals or not option or name not in options:
            raise ConfigError(
                problem(
                    "--set",
                    expected=f"NAME.OPTION=VALUE with NAME among {', '.join(chosen) or 'none'}",
                    got=repr(setting),
                    fix="For instance --set ms_swift.key_tokens=128.",
                )
            )
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = value
        options[name][option] = parsed
    if not chosen:
        raise ConfigError(
            problem("mechanism", expected="at least one name", got="''", fix="Try ms_swift.")
        )
    return options


def from_json(config: dict[str, Any]) -> Mechanism:
    """A mechanism from its ``to_dict`` after a trip through JSON, which knows no tuples."""
    from longswift.mechanisms import from_dict

    def tuples(value: Any) -> Any:
        return tuple(tuples(item) for item in value) if isinstance(value, list) else value

    return from_dict({key: tuples(value) for key, value in config.items()})
