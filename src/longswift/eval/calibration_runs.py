"""``longswift calibrate``: a profile from the first half of a text, checked on the second."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from longswift.core.errors import ConfigError, problem
from longswift.core.mechanism import Mechanism, check_positive
from longswift.eval import options
from longswift.eval.calibration import (
    CAPTURED,
    CRITERIA,
    Tryout,
    candidates,
    cheapest,
    variant,
)
from longswift.eval.calibration_summary import DEFAULT, PROFILE, gather, summarise, verdict
from longswift.eval.models import TINY, Loaded, load
from longswift.eval.progress import Bar, bar
from longswift.eval.reading import check_chunk
from longswift.eval.results import Progress, Result, writable, write_text
from longswift.eval.rivals import FULL, Rival
from longswift.eval.samples import samples
from longswift.eval.walk import Walk, on_trial
from longswift.mechanisms.full import Full
from longswift.mechanisms.ms_swift import MSSwift
from longswift.mechanisms.profile import Profile

KIND = "calibration"
BUDGETS = (0, 64, 128, 256, 512, 1024, 2048)


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
    documents: int = 4
    blocks: int = 16
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
            share=min(1.0, self.asked.blocks / blocks),
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
            return {PROFILE: profile.mechanism(layer), DEFAULT: self.base}

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
            attention=replace(base, collect=False),
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
