"""What a calibration found, in figures and in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from statistics import fmean, stdev
from typing import Any

from longswift.eval import text as text_of
from longswift.eval.calibration import CAPTURED, Candidate, Tried, most_kept, with_choice
from longswift.eval.halves import CHECK, CHOOSE
from longswift.eval.prediction import expected, margin, mean_share, pool
from longswift.eval.results import Result
from longswift.mechanisms.profile import LayerProfile, Profile

PROFILE, DEFAULT = "profile", "default"
# How far the check may be from the prediction before the verdict says so.
CLOSE = 0.01
# The same for the interval of another document: eight that are so close to each other give less.
NARROW = 0.025


def by_document(
    rows: list[dict[str, Any]], part: int, name: str | None = None
) -> list[dict[int, Tried]]:
    """What one half of each document says, by layer.

    Args:
        rows: Of both halves.
        part: Which.
        name: Of one mechanism, or None for all of them.
    """
    found: dict[int, dict[int, Tried]] = {}
    for row in rows:
        if row["part"] == part:
            names = row["names"]
            wanted = range(len(names)) if name is None else [names.index(name)]
            shares, costs = ([row[key][i] for i in wanted] for key in ("shares", "costs"))
            one = Tried(shares=shares, costs=costs, dense=row["dense"])
            found.setdefault(row["document"], {})[row["layer"]] = one
    return [found[number] for number in sorted(found)]


def summarise(
    rows: list[dict[str, Any]],
    profile: Profile,
    found: Sequence[Candidate],
    target: float,
    criterion: str,
) -> dict[str, Any]:
    """What the profile promises, what the other half says, and what it costs.

    Args:
        rows: Of both halves.
        profile: What was chosen.
        found: The candidates.
        target: What every head was to keep.
        criterion: What was measured.
    """
    chosen = profile.layers
    seen, unseen = by_document(rows, CHOOSE), by_document(rows, CHECK, PROFILE)
    tried, checks = pool(seen), pool(unseen)
    default = pool(by_document(rows, CHECK, DEFAULT))
    layers: list[dict[str, Any]] = []
    for layer, setting in chosen.items():
        shares, costs = with_choice(tried[layer], setting, found)
        layers.append(
            {
                "layer": layer,
                "predicted": shares,
                "checked": checks[layer].shares[0],
                "default": default[layer].shares[0],
                "most_kept": most_kept(tried[layer], profile.architecture.kv_heads),
                "cost": costs,
                "default_cost": default[layer].costs[0],
                "dense_cost": tried[layer].dense,
            }
        )
    heads = [pair for one in layers for pair in zip(one["predicted"], one["checked"], strict=True)]
    predicted = [mean_share(one, chosen, found) for one in seen]
    checked = [fmean(s for tried in one.values() for s in tried.shares[0]) for one in unseen]
    other = expected(seen, found, profile.architecture.kv_heads, target)
    full = fmean(one["dense_cost"] for one in layers)
    return {
        "criterion": criterion,
        "predicted": fmean(predicted),
        "checked": fmean(checked),
        "off": abs(fmean(predicted) - fmean(checked)),
        "off_margin": margin([p - c for p, c in zip(predicted, checked, strict=True)]),
        "worst_head_off": max(abs(p - c) for p, c in heads),
        "predicted_each": predicted,
        "checked_each": checked,
        "another": None if other is None else asdict(other),
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
    if dense == heads:
        return _nothing_saved(result, heads, what)
    agrees = held(found["off"], found["off_margin"], len(found["checked_each"]))
    by_chance = found["off_margin"]
    chance = "" if by_chance is None else f" +- {100 * by_chance:.1f}"
    return (
        f"The profile keeps {100 * found['predicted']:.1f} % {what} where the default keeps "
        f"{100 * found['default']:.1f} %, for {100 * found['cost']:.0f} % of full attention's "
        f"keys (default {100 * found['default_cost']:.0f} %), choosing included; {dense} of "
        f"{heads} KV heads are dense. Checked on the half of the text that did not choose it, it "
        f"keeps {100 * found['checked']:.1f} %: {agrees} (within 1 point; off by "
        f"{100 * found['off']:.1f}{chance}, worst head by {100 * found['worst_head_off']:.1f}). "
        f"{of_another(found['another'])}"
    )


def held(off: float, chance: float | None, documents: int) -> str:
    """Whether the check agrees with the prediction, by the interval of their difference."""
    if chance is not None and off + chance <= CLOSE:
        return "the prediction holds"
    if off > CLOSE and chance is not None and off > chance:
        return "the prediction DOES NOT HOLD"
    many = f"{documents} documents" if documents > 1 else "one document"
    return f"whether the prediction holds CANNOT BE TOLD from {many}"


def _nothing_saved(result: Result, heads: int, what: str) -> str:
    """Every head is dense: which candidate came nearest, and what to try."""
    found, target = result.summary, f"{100 * result.config['target']:g} %"
    said = f"The profile SAVES NOTHING at this target: all {heads} KV heads are dense"
    tried = [
        (share, one["layer"], head)
        for one in found["layers"]
        for head, share in enumerate(one["most_kept"])
        if share is not None
    ]
    longer = "a longer text (--length), of which a budget is a smaller part"
    if not tried:
        return (
            f"{said}, because every window and budget tried costs at least as much as full "
            f"attention on {result.config['length']:,} tokens. Try {longer}, smaller --budgets or "
            "narrower windows (--set ms_swift.windows=[...])."
        )
    share, layer, head = max(tried)
    criterion = ""
    if found["criterion"] == CAPTURED:
        criterion = ", or --criterion output, which counts what the means keep, too"
    return (
        f"{said}, because no window and budget tried keeps {target} {what} in any of them for "
        f"fewer keys than full attention's. The nearest keeps {100 * share:.1f} % (layer {layer}, "
        f"KV head {head}; default settings {100 * found['default']:.1f} % on average). Try a "
        f"--target of at most {math.floor(1000 * share) / 1000:g}, {longer}, larger --budgets or "
        f"wider windows (--set ms_swift.windows=[...]){criterion}."
    )


def of_another(other: dict[str, Any] | None) -> str:
    """What to expect of text that was not read at all."""
    if other is None:
        return (
            "What it keeps in another document is UNKNOWN: one document says nothing about "
            "others. Give a longer text, or a lower --length."
        )
    count, spread = len(other["each"]), stdev(other["each"])
    said = (
        f"Another document like these {count} is expected to keep {100 * other['mean']:.1f} % "
        f"(95 % interval for one: {100 * other['low']:.1f} to {100 * other['high']:.1f} %)"
    )
    if spread <= CLOSE and other["mean"] - other["low"] <= NARROW:
        return f"{said}."
    if spread <= CLOSE:
        return f"{said}: UNCERTAIN, because {count} documents are few. Give a longer text."
    return (
        f"{said}: UNCERTAIN, because they differ by {100 * spread:.1f} points among themselves. "
        "Calibrate on text of the kind you will read, and leave the target some room."
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
