"""Options as people type them, turned into values or into a one-line error."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from longswift.core.errors import ConfigError, InputError, LongSwiftError, problem
from longswift.core.mechanism import Mechanism
from longswift.core.registry import unknown_name

if TYPE_CHECKING:
    import torch

    from longswift.eval.tasks.base import Task
    from longswift.memory.base import MemoryConfig

T = TypeVar("T")
ALL = "all"
# Where settings are given beside a profile, which has its own.
CALIBRATE = "Calibrate with the options you want."
_DIGITS = 12
DTYPES = ("float32", "bfloat16", "float16", "float64")


def names(text: str) -> list[str]:
    """The parts of a comma-separated list, without blanks and repetitions."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def labelled(text: str | None, known: Mapping[str, T]) -> dict[str, T]:
    """The entries of a table with labels separated by semicolons; all of them for no text.

    Raises:
        InputError: An unknown label.
    """
    wanted = text.split(";") if text else list(known)
    unknown = [label for label in wanted if label not in known]
    if unknown:
        raise InputError(
            problem("--only", expected=f"some of {list(known)}", got=unknown, fix="Pick.")
        )
    return {label: known[label] for label in wanted}


def length(text: str) -> int:
    """A number of tokens; ``32k`` means 32 * 1024.

    Raises:
        ConfigError: Not a positive number.
    """
    plain = text.strip().lower().replace("_", "")
    digits, factor = (plain[:-1], 1024) if plain.endswith("k") else (plain, 1)
    # No text has a trillion tokens, and Python reads no number of thousands of digits.
    known = digits.isascii() and digits.isdigit() and len(digits) <= _DIGITS
    if not known or int(digits) < 1:
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


def counts(text: str, what: str = "counts", least: int = 0) -> tuple[int, ...]:
    """Comma-separated counts of at least ``least``, ascending; ``what`` names them in errors.

    Raises:
        ConfigError: Something else.
    """
    parts = names(text)
    if not parts or not all(
        part.isascii() and part.isdigit() and len(part) <= _DIGITS and int(part) >= least
        for part in parts
    ):
        raise ConfigError(
            problem(
                what,
                expected=f"whole numbers of at least {least}",
                got=repr(text),
                fix=f"Give them as {least},64,256.",
            )
        )
    return tuple(sorted({int(part) for part in parts}))


def dtype(name: str, *also: str) -> torch.dtype:
    """A dtype by its PyTorch name; ``also`` is what else the option takes, for the error.

    Raises:
        ConfigError: Not a floating dtype attention computes in.
    """
    import torch

    if name not in DTYPES:
        raise ConfigError(
            problem(
                "dtype",
                expected=f"one of {', '.join((*DTYPES, *also))}",
                got=repr(name),
                fix="Pick one.",
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
        # The device meta makes tensors that hold nothing.
        torch.zeros(1, device=found).item()
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
    return {name: from_json(config) for name, config in configs("mechanism", text, settings)}


def choose(text: str, settings: Sequence[str] = ()) -> tuple[list[Mechanism], dict[str, str]]:
    """Mechanisms by name, ``"all"`` for the whole table; those that need options are named.

    Returns:
        The mechanisms, and why others of ``"all"`` were left out.
    """
    from longswift.mechanisms import list_mechanisms

    if text.strip() != ALL:
        _check_known(text, list_mechanisms())
        return list(mechanisms(text, settings).values()), {}
    return _every(list_mechanisms(), settings, from_json)


def choose_attentions(
    text: str, settings: Sequence[str] = ()
) -> tuple[list[Mechanism | MemoryConfig], dict[str, str]]:
    """``choose`` among mechanisms and memories."""
    from longswift.mechanisms import list_mechanisms
    from longswift.memory import list_memories

    known = [*list_mechanisms(), *list_memories()]
    if text.strip() != ALL:
        _check_known(text, known)
        chosen = configs("mechanism", text, settings)
        return [attention_from_json(config) for _, config in chosen], {}
    return _every(known, settings, attention_from_json)


def _check_known(text: str, known: Sequence[str]) -> None:
    for name in names(text):
        if name.replace("-", "_") not in known:
            raise unknown_name("mechanism", name, known, ALL)


def _every(
    known: list[str], settings: Sequence[str], build: Callable[[dict[str, Any]], T]
) -> tuple[list[T], dict[str, str]]:
    """Everything that can be built, and why the rest cannot."""
    # A setting for an unknown name must be refused, whatever else is left out.
    if strange := [s for s in settings if s not in settings_of(settings, known)]:
        check_targets(strange, known)
    found, left_out = [], {}
    for name in known:
        mine = settings_of(settings, [name])
        try:
            found += [build(config) for _, config in configs("mechanism", name, mine)]
        except LongSwiftError as error:
            if mine:
                raise
            left_out[name] = str(error)
    return found, left_out


def tasks(
    text: str, settings: Sequence[str] = (), *, questions: Path | None = None, **common: Any
) -> dict[str, Task]:
    """Evaluation tasks by name, with single options changed.

    Args:
        text: Comma-separated names.
        settings: ``name.option=value`` as for ``mechanisms``.
        questions: File of the task ``qa``.
        common: Options of every task that has them; None leaves a default.

    Raises:
        ConfigError: Unknown task or option, or a setting for a task not in ``text``.
    """
    from longswift.eval.tasks import TASKS, from_dict

    if questions is not None:
        if "qa" not in names(text):
            raise ConfigError(
                problem(
                    "--questions",
                    expected="the task qa, which asks them, among --tasks",
                    got=repr(text),
                    fix="Add qa, or leave out the file.",
                )
            )
        settings = [*settings, f"qa.file={json.dumps(str(questions))}"]
    found = {}
    for name, config in configs("task", text, settings):
        cls = TASKS.get(name)
        known = {f.name for f in fields(cls)} - ({"form"} if len(cls.forms) == 1 else set())
        # The questions of qa come from a file of another kind than the text of the others.
        known -= {"file"} if name == "qa" else set()
        shared = {k: v for k, v in common.items() if k in known and v is not None}
        found[name] = from_dict({**shared, **config})
    return found


def check_unused(option: str, given: Mapping[str, object], fix: str) -> None:
    """Check that nothing was given that ``option`` makes no use of.

    Args:
        option: What the command does instead, as the error names it.
        given: Options by name, with their values; None, False and empty ones were not given.
        fix: What to do about the others.

    Raises:
        ConfigError: Something was.
    """
    for name, value in given.items():
        if value is not None and value is not False and value != ():
            raise ConfigError(
                problem(option, expected=f"no {name} beside it", got=repr(value), fix=fix)
            )


def settings_of(settings: Sequence[str], chosen: Sequence[str]) -> list[str]:
    """Those settings whose name is among ``chosen``."""
    known = {name.replace("-", "_") for name in chosen}
    return [s for s in settings if s.partition(".")[0].strip().replace("-", "_") in known]


def parted(
    settings: Sequence[str], tasks: Sequence[str], mechanisms: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Settings of tasks, and those of mechanisms.

    Raises:
        ConfigError: One is neither.
    """
    check_targets(settings, [*tasks, *mechanisms])
    mine = settings_of(settings, tasks)
    return mine, [setting for setting in settings if setting not in mine]


def is_set(settings: Sequence[str], target: str) -> bool:
    """Whether one of ``settings`` is of ``target``, a ``name.option``."""
    return target in (s.replace("-", "_").partition("=")[0].strip() for s in settings)


def check_targets(settings: Sequence[str], chosen: Sequence[str]) -> None:
    """Check that each setting is ``NAME.OPTION=VALUE`` with a name among ``chosen``.

    Raises:
        ConfigError: One is not.
    """
    for setting in settings:
        target, equals, _ = setting.partition("=")
        name, _, option = target.strip().partition(".")
        if not equals or not option or not name:
            raise ConfigError(
                problem(
                    "--set",
                    expected="NAME.OPTION=VALUE",
                    got=repr(setting),
                    fix="For instance --set ms_swift.key_tokens=128.",
                )
            )
        if name.replace("-", "_") not in chosen:
            raise ConfigError(
                problem(
                    "--set",
                    expected=f"an option of what runs here ({', '.join(chosen) or 'nothing'})",
                    got=f"{name!r} in {setting!r}",
                    fix="Correct the name, or let the command run that, too.",
                )
            )


def configs(kind: str, text: str, settings: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and options of each part of ``text``."""
    chosen = [name.replace("-", "_") for name in names(text)]
    options: dict[str, dict[str, object]] = {name: {} for name in chosen}
    check_targets(settings, chosen)
    for setting in settings:
        target, _, value = setting.partition("=")
        name, _, option = target.strip().partition(".")
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = value
        options[name.replace("-", "_")][option] = parsed
    if not chosen:
        example = "ms_swift" if kind == "mechanism" else "needle"
        raise ConfigError(
            problem(kind, expected="at least one name", got=repr(text), fix=f"Try {example}.")
        )
    for name in chosen:
        yield name, {"name": name, **options[name]}


def from_json(config: dict[str, Any]) -> Mechanism:
    """A mechanism from its ``to_dict`` after a trip through JSON, which knows no tuples."""
    from longswift.mechanisms import from_dict

    return from_dict({key: _tuples(value) for key, value in config.items()})


def attention_from_json(config: dict[str, Any]) -> Mechanism | MemoryConfig:
    """``from_json`` of a mechanism or a memory."""
    from longswift.memory import list_memories, memory_from_dict

    if config.get("name") not in list_memories():
        return from_json(config)
    return memory_from_dict({key: _tuples(value) for key, value in config.items()})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
