"""THE table of tasks: one line each. CLI names and tests come from it."""

from __future__ import annotations

from typing import Any

from longswift.core.registry import Registry
from longswift.eval.tasks.base import Task

TASKS: Registry[Task] = Registry(
    "task",
    {
        "needle": "longswift.eval.tasks.needle:Needle",
        "needle_multikey": "longswift.eval.tasks.needle:MultiKey",
        "needle_multivalue": "longswift.eval.tasks.needle:MultiValue",
        "needle_multiquery": "longswift.eval.tasks.needle:MultiQuery",
        "kv": "longswift.eval.tasks.kv:KeyValue",
        "variable_tracking": "longswift.eval.tasks.variable_tracking:VariableTracking",
        "common_words": "longswift.eval.tasks.common_words:CommonWords",
        "frequent_words": "longswift.eval.tasks.frequent_words:FrequentWords",
        "copy": "longswift.eval.tasks.copying:Copy",
        "passkey": "longswift.eval.tasks.passkey:Passkey",
        "qa": "longswift.eval.tasks.qa:QA",
        "perplexity": "longswift.eval.tasks.perplexity:Perplexity",
    },
    entry_point_group="longswift.tasks",
)


def list_tasks() -> list[str]:
    """Names of every task, those of installed plug-ins included."""
    return TASKS.names()


def get_task(name: str, **config: Any) -> Task:
    """The task ``name`` with these options.

    Raises:
        ConfigError: Unknown name, unknown option, or an impossible value.
    """
    return TASKS.build(name, config)


def from_dict(config: dict[str, Any]) -> Task:
    """Inverse of ``Task.to_dict``."""
    return TASKS.build(config["name"], {k: v for k, v in config.items() if k != "name"})
