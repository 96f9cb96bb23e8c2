"""``longswift calibrate``: a profile from the first half of a text, checked on the second."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from longswift.core.errors import ConfigError, problem
from longswift.core.mechanism import Mechanism, check_positive
from longswift.eval import options
from longswift.eval import text as text_of
from longswift.eval.calibration import (
    CAPTURED,
    CRITERIA,
    Candidate,
    Tried,
    Tryout,
    candidates,
    cheapest,
    variant,
)
from longswift.eval.models import TINY, Loaded, load
from longswift.eval.progress import Bar, bar
from longswift.eval.reading import check_chunk
from longswift.eval.results import Progress, Result, writable, write_text
from longswift.eval.rivals import FULL, Rival
from longswift.eval.samples import samples
from longswift.eval.walk import Walk, on_trial
from longswift.mechanisms.full import Full
from longswift.mechanisms.ms_swift import MSSwift
from longswift.mechanisms.profile import LayerProfile, Profile

KIND = "calibration"
BUDGETS = (0, 64, 128, 256, 512, 1024, 2048)
_PROFILE, _DEFAULT = "profile", "default"


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What to find.

    Attributes:
        mechanism: The MS-SWIFT configuration to start from, as ``Mechanism.to_dict`` gives it; its
            windows are the scales to choose from.
        target: What every head must keep of full attention, between 0 and 1.
        criterion: ``"captured"``: attention mass on the keys seen one by one. ``"output"``: 1
            minus the relative error of the head's output, means of the remainder included.
        budgets: Key tokens to choose from.
        model: ``tiny``, a directory or a name on the hub.
        file: UTF-8 text; held-out Python documentation by default.
        length: Tokens of a document, or None for what there is, at most 32k.
        documents: Documents of each half.
        blocks: About how many blocks of query rows are tried per layer and document.
        chunk: Tokens per forward pass.
        seed: Chooses the blocks.
        dtype: Name of a dtype, or ``"auto"``.
        device: Where to run.
        trust_remote_code: Allow the model to bring Python code of its own.
    """

    mechanism: dict[str, Any]
    target: float = 0.99
    criterion: str = CAPTURED
    budgets: tuple[int, ...] = BUDGETS
    model: str = TINY
    file: str | None = None
    length: int | None = None
    documents: int = 1
    blocks: int = 32
    chunk: int = 1024
    seed: int = 0
    dtype: str = "auto"
    device: str = "cpu"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_positive("calibrate", documents=self.documents, blocks=self.blocks, chunk=self.chunk)
        if not isinstance(self.target, float) or not 0.0 < self.target < 1.0:
            raise ConfigError(
                problem(
                    "--target",
                    expected="a share above 0 and below 1",
                    got=repr(self.target),
                    fix="For example 0.95.",
                )
            )
        if self.criterion not in CRITERIA:
            raise ConfigError(
                problem(
                    "--criterion",
                    expected=f"one of {', '.join(CRITERIA)}",
                    got=repr(self.criterion),
                    fix="Pick one.",
                )
            )
        if not self.budgets or min(self.budgets) < 0:
            raise ConfigError(
                problem(
                    "--budgets",
                    expected="numbers of key tokens >= 0",
                    got=self.budgets,
                    fix="For example 0,128,512.",
                )
            )


class _Calibrator:
    """One run: its model, its documents, and what is finished of it."""

    def __init__(self, asked: Calibration, loaded: Loaded, base: MSSwift, step: Bar) -> None:
        self.asked, self.loaded, self.base, self.step = asked, loaded, base, step
        self.found = candidates(base, asked.budgets)

    def tryout(self, ids: list[int], number: int, mechanisms: Any) -> Tryout:
        """Let mechanisms work on blocks of a document that the dense model reads."""
        blocks = max(1, (len(ids) - self.base.dense_below) // self.base.block)
        tried = Tryout(
            mechanisms,
            block=self.base.block,
            first=self.base.dense_below,
            share=self.asked.blocks / blocks,
            criterion=self.asked.criterion,
            seed=1000 * self.asked.seed + number,
        )
        model = self.loaded.model
        with on_trial(model), torch.inference_mode():
            walk = Walk(model, ids, self.asked.chunk, self.step)
            walk.read(Rival(FULL, Full()), tried)
        return tried

    def candidates_row(self, ids: list[int], number: int) -> list[dict[str, Any]]:
        """Every candidate on a document of the first half, by layer."""

        def every(_: int, kv_heads: int) -> dict[Any, Mechanism]:
            return {i: variant(self.base, c, kv_heads) for i, c in enumerate(self.found)}

        return self._rows("calibrate", number, self.tryout(ids, number, every))

    def check_rows(self, ids: list[int], number: int, profile: Profile) -> list[dict[str, Any]]:
        """The profile and the configuration it started from, on a document of the second half."""

        def both(layer: int, _: int) -> dict[Any, Mechanism]:
            return {_PROFILE: profile.mechanism(layer), _DEFAULT: self.base}

        return self._rows("check", number, self.tryout(ids, number, both))

    def _rows(self, part: str, number: int, tried: Tryout) -> list[dict[str, Any]]:
        return [
            {
                "part": part,
                "document": number,
                "layer": layer,
                "names": [str(name) for name in kept],
                "shares": [one.share(self.asked.criterion) for one in kept.values()],
                "costs": [one.cost() for one in kept.values()],
                "dense": tried.dense[layer][0] / tried.dense[layer][1],
            }
            for layer, kept in sorted(tried.kept.items())
        ]


def run(
    asked: Calibration, output: str | Path, *, fresh: bool = False, progress: bool = True
) -> tuple[Profile, Result]:
    """Calibrate, write the profile to ``output``, and check it on text it has not seen.

    Documents that an interrupted run of the same options has finished are reused.

    Args:
        asked: What to find.
        output: The profile's file.
        fresh: Start over.
        progress: Show a bar on stderr.

    Raises:
        InputError: The text is too short.
    """
    from longswift.hf.settings import architecture_of

    target = writable(output)
    base = options.from_json(asked.mechanism)
    if not isinstance(base, MSSwift):
        raise ConfigError(
            problem("calibrate", expected="ms_swift", got=base.name, fix="Leave --set to it.")
        )
    check_chunk("--chunk", asked.chunk, base)
    loaded = load(
        asked.model,
        dtype=asked.dtype,
        device=asked.device,
        trust_remote_code=asked.trust_remote_code,
    )
    # Earlier rows are exact; a block or two would say little about the rest.
    least = base.dense_below + 8 * base.block
    text = samples(
        loaded, asked.file, length=asked.length, documents=2 * asked.documents, least=least
    )
    config: dict[str, Any] = json.loads(json.dumps(asdict(asked)))
    config.update(
        file=None if asked.file is None else Path(asked.file).name,
        model=loaded.name,
        length=len(text.documents[0]),
        text_sha256=text.sha256,
        model_sha256=loaded.fingerprint(),
    )
    result = Result(kind=KIND, config=config, seed=asked.seed, rows=[])
    kept = Progress(result, target, fresh=fresh)
    # Texts drift; halves that alternate are more alike than a beginning and an end.
    numbered = list(enumerate(text.documents))
    even, odd = numbered[::2], numbered[1::2]
    architecture = architecture_of(loaded.model)
    with bar(text.tokens, "starting", shown=progress) as step:
        work = _Calibrator(asked, loaded, base, step)
        for number, ids in even:
            if kept.find(document=number) is None:
                kept.add(*work.candidates_row(ids, number))
            else:
                step(len(ids), "measured before")
        tried = gather(result.rows)
        chosen = {
            layer: cheapest(one, work.found, architecture.kv_heads, asked.target)
            for layer, one in tried.items()
        }
        profile = Profile(
            architecture=architecture,
            attention=variant_base(base),
            layers={layer: found[0] for layer, found in chosen.items()},
        )
        for number, ids in odd:
            if kept.find(document=number) is None:
                kept.add(*work.check_rows(ids, number, profile))
            else:
                step(len(ids), "measured before")
    result.summary.update(
        summarise(
            result.rows,
            {layer: (found[1], found[2]) for layer, found in chosen.items()},
            {layer: one.dense for layer, one in tried.items()},
            asked.criterion,
        )
    )
    result.summary["verdict"] = verdict(result, profile)
    known = ("model", "file", "length", "documents", "target", "criterion", "text_sha256")
    profile = Profile(
        architecture=profile.architecture,
        attention=profile.attention,
        layers=profile.layers,
        calibration={
            **{name: config[name] for name in known},
            **result.summary,
            "date": result.date,
            "environment": result.environment.to_dict(),
        },
    )
    write_text(target, profile.to_json())
    kept.done()
    return profile, result


def variant_base(base: MSSwift) -> MSSwift:
    """What all heads share; layers that were not seen run it."""
    return MSSwift(**{k: v for k, v in base.to_dict().items() if k not in ("name", "collect")})


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
            for name in (_PROFILE, _DEFAULT)
        }
        layers.append(
            {
                "layer": layer,
                "predicted": shares,
                "checked": by_name[_PROFILE][0],
                "default": by_name[_DEFAULT][0],
                "cost": cost,
                "default_cost": by_name[_DEFAULT][1],
                "dense_cost": dense[layer],
            }
        )
    heads = [pair for one in layers for pair in zip(one["predicted"], one["checked"], strict=True)]
    predicted, checked = fmean(p for p, _ in heads), fmean(c for _, c in heads)
    full = fmean(one["dense_cost"] for one in layers)
    return {
        "criterion": criterion,
        "predicted": predicted,
        "checked": checked,
        "off": abs(predicted - checked),
        "worst_head_off": max(abs(p - c) for p, c in heads),
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
    held = "holds" if found["off"] <= 0.01 else "DOES NOT HOLD"
    return (
        f"The profile keeps {100 * found['predicted']:.1f} % {what} where the default keeps "
        f"{100 * found['default']:.1f} %, for {100 * found['cost']:.0f} % of full attention's "
        f"keys (default {100 * found['default_cost']:.0f} %), choosing included; {dense} of "
        f"{heads} KV heads are dense. Checked on text it has not seen it keeps "
        f"{100 * found['checked']:.1f} %: the prediction {held} (within 1 point; worst head off by "
        f"{100 * found['worst_head_off']:.1f})."
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


__all__ = ["BUDGETS", "Calibration", "Candidate", "run", "table", "verdict"]
