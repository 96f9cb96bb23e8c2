"""What a calibration found, in figures and in words."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean, stdev
from typing import Any

from longswift.eval import text as text_of
from longswift.eval.calibration import CAPTURED, Tried
from longswift.eval.results import Result
from longswift.mechanisms.profile import LayerProfile, Profile

PROFILE, DEFAULT = "profile", "default"
# How far the check may be from the prediction before the verdict says so.
CLOSE = 0.01


def gather(rows: list[dict[str, Any]]) -> dict[int, Tried]:
    """Means over the documents of the first half, by layer."""
    found: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        if row["part"] == "calibrate":
            found.setdefault(row["layer"], []).append(row)
    return {
        layer: Tried(
            shares=_mean([row["shares"] for row in group]),
            costs=_mean([row["costs"] for row in group]),
            dense=fmean(row["dense"] for row in group),
        )
        for layer, group in found.items()
    }


def _mean(tables: list[list[list[float]]]) -> list[list[float]]:
    return [
        [fmean(values) for values in zip(*lines, strict=True)]
        for lines in zip(*tables, strict=True)
    ]


def summarise(
    rows: list[dict[str, Any]],
    chosen: Mapping[int, tuple[list[float], list[float]]],
    dense: Mapping[int, float],
    criterion: str,
) -> dict[str, Any]:
    """What the profile promises, what unseen text says, and what it costs."""
    checks: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        if row["part"] == "check":
            checks.setdefault(row["layer"], []).append(row)
    layers: list[dict[str, Any]] = []
    for layer, (shares, cost) in chosen.items():
        by_name = {
            name: (
                _mean([[r["shares"][r["names"].index(name)]] for r in checks[layer]])[0],
                _mean([[r["costs"][r["names"].index(name)]] for r in checks[layer]])[0],
            )
            for name in (PROFILE, DEFAULT)
        }
        layers.append(
            {
                "layer": layer,
                "predicted": shares,
                "checked": by_name[PROFILE][0],
                "default": by_name[DEFAULT][0],
                "cost": cost,
                "default_cost": by_name[DEFAULT][1],
                "dense_cost": dense[layer],
            }
        )
    heads = [pair for one in layers for pair in zip(one["predicted"], one["checked"], strict=True)]
    predicted, checked = fmean(p for p, _ in heads), fmean(c for _, c in heads)
    documents: dict[int, list[float]] = {}
    for row in (row for group in checks.values() for row in group):
        documents.setdefault(row["document"], []).extend(row["shares"][row["names"].index(PROFILE)])
    each = [fmean(shares) for shares in documents.values()]
    full = fmean(one["dense_cost"] for one in layers)
    return {
        "criterion": criterion,
        "predicted": predicted,
        "checked": checked,
        "off": abs(predicted - checked),
        "worst_head_off": max(abs(p - c) for p, c in heads),
        "spread": stdev(each) if len(each) > 1 else None,
        "default": fmean(share for one in layers for share in one["default"]),
        "cost": fmean(c for one in layers for c in one["cost"]) / full,
        "default_cost": fmean(c for one in layers for c in one["default_cost"]) / full,
        "layers": layers,
    }


def verdict(result: Result, profile: Profile) -> str:
    """What was found, in words."""
    found = result.summary
    what = "of the attention mass" if found["criterion"] == CAPTURED else "of the heads' output"
    dense = sum(sum(layer.dense) for layer in profile.layers.values())
    heads = sum(len(layer.dense) for layer in profile.layers.values())
    held = "holds" if found["off"] <= CLOSE else "DOES NOT HOLD"
    spread = ""
    if found["spread"] is not None:
        spread = f"; its documents differ by {100 * found['spread']:.1f} points among themselves"
    return (
        f"The profile keeps {100 * found['predicted']:.1f} % {what} where the default keeps "
        f"{100 * found['default']:.1f} %, for {100 * found['cost']:.0f} % of full attention's "
        f"keys (default {100 * found['default_cost']:.0f} %), choosing included; {dense} of "
        f"{heads} KV heads are dense. Checked on text it has not seen it keeps "
        f"{100 * found['checked']:.1f} %: the prediction {held} (within 1 point; worst head off by "
        f"{100 * found['worst_head_off']:.1f}){spread}."
    )


def table(profile: Profile, result: Result) -> text_of.Table:
    """Every KV head's setting."""
    columns = ("layer.head", "window", "key tokens", "cost", "predicted", "checked", "default")
    cells = []
    for one in result.summary["layers"]:
        layer: LayerProfile = profile.layers[one["layer"]]
        kv_heads = profile.architecture.kv_heads
        size = profile.architecture.heads // kv_heads
        for head in range(kv_heads):
            own = slice(head * size, (head + 1) * size)
            window = profile.attention.windows[layer.scale[head]]
            cells.append(
                (
                    f"{one['layer']}.{head}",
                    "dense" if layer.dense[head] else f"{window:,}",
                    "-" if layer.dense[head] else f"{layer.key_tokens[head]:,}",
                    f"{100 * one['cost'][head] / one['dense_cost']:.0f} %",
                    *(
                        f"{100 * min(one[c][own]):.1f} %"
                        for c in ("predicted", "checked", "default")
                    ),
                )
            )
    title = (
        f"{result.config['model']}, target {result.config['target']:g}; worst query head of each "
        "KV head; cost in full attention's keys"
    )
    return text_of.Table(title, columns, cells)
