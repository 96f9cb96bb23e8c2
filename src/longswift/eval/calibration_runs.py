"""``longswift calibrate``: a profile from one half of a text, checked on the other."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from longswift.core.errors import ConfigError, check_positive, problem
from longswift.core.files import write_text
from longswift.core.mechanism import Mechanism
from longswift.eval import options
from longswift.eval.calibration import (
    CAPTURED,
    CRITERIA,
    Tryout,
    candidates,
    cheapest,
    variant,
)
from longswift.eval.calibration_summary import DEFAULT, PROFILE, by_document, summarise, verdict
from longswift.eval.halves import CHECK, CHOOSE, STRETCH, Half
from longswift.eval.models import TINY, Loaded, load
from longswift.eval.prediction import pool
from longswift.eval.progress import Bar, bar
from longswift.eval.reading import check_chunk
from longswift.eval.results import Progress, Result, writable
from longswift.eval.rivals import FULL, Rival
from longswift.eval.samples import samples
from longswift.eval.walk import Walk, on_trial
from longswift.extend.rope import check_kind
from longswift.mechanisms.full import Full
from longswift.mechanisms.ms_swift import MSSwift
from longswift.mechanisms.profile import FORMAT, Profile

KIND = "calibration"
BUDGETS = (0, 64, 128, 256, 512, 1024, 2048)
# Fewer say too little about how documents differ.
DOCUMENTS = 8


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
        documents: Documents to read, or None for as many as there are, at least two, at most
            eight. Each gives every other stretch to the choice and the others to the check.
        blocks: About how many blocks of query rows are tried per layer, document and half.
        max_length: Extend the model's positions to this many tokens.
        rope: Scaling of rotary positions for that.
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
    documents: int | None = None
    max_length: int | None = None
    rope: str | None = "yarn"
    blocks: int = 8
    chunk: int = 1024
    seed: int = 0
    dtype: str = "auto"
    device: str = "cpu"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        counts = {"blocks": self.blocks, "chunk": self.chunk}
        if self.documents is not None:
            counts["documents"] = self.documents
        check_positive("calibrate", **counts)
        check_kind(self.rope)
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

    def __init__(
        self,
        asked: Calibration,
        loaded: Loaded,
        base: MSSwift,
        documents: list[list[int]],
        kept: Progress,
        step: Bar,
    ) -> None:
        self.asked, self.loaded, self.base, self.step = asked, loaded, base, step
        self.found = candidates(base, asked.budgets)
        self._documents, self._kept = documents, kept

    def measure(self, part: int, mechanisms: Any) -> None:
        """Keep a row for every document and layer, those of an interrupted run included."""
        for number, ids in enumerate(self._documents):
            if self._kept.find(part=part, document=number) is None:
                self._kept.add(*self._rows(part, number, self.tryout(part, number, mechanisms)))
            else:
                self.step(len(ids), "measured before")

    def tryout(self, part: int, number: int, mechanisms: Any) -> Tryout:
        """Let mechanisms work on blocks of a document that the dense model reads."""
        ids, block = self._documents[number], self.base.block
        half = Half(
            part=part,
            number=number,
            documents=len(self._documents),
            first=-(-self.base.crossover(self.asked.device) // block),
            end=-(-len(ids) // block),
            count=self.asked.blocks,
            seed=self.asked.seed,
        )
        tried = Tryout(mechanisms, block=block, sample=half.tried, criterion=self.asked.criterion)
        model = self.loaded.model
        with on_trial(model), torch.inference_mode():
            walk = Walk(model, ids, self.asked.chunk, self.step)
            walk.read(Rival(FULL, Full()), tried)
        return tried

    def every(self, _: int, kv_heads: int) -> dict[Any, Mechanism]:
        """Every candidate."""
        return {i: variant(self.base, c, kv_heads) for i, c in enumerate(self.found)}

    def _rows(self, part: int, number: int, tried: Tryout) -> list[dict[str, Any]]:
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
    """Calibrate, write the profile to ``output``, and check it on the half that did not choose it.

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

    target = writable(output, kind=FORMAT)
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
    loaded.extend(asked.max_length, asked.rope)
    # Earlier rows are exact; each half needs a stretch of the rest.
    least = base.crossover(asked.device) + 2 * STRETCH * base.block
    count = asked.documents
    text = samples(
        loaded,
        asked.file,
        length=asked.length,
        documents=count or DOCUMENTS,
        fewest=2 if count is None else None,
        least=least,
    )
    config: dict[str, Any] = json.loads(json.dumps(asdict(asked)))
    config.update(
        file=None if asked.file is None else Path(asked.file).name,
        model=loaded.name,
        length=len(text.documents[0]),
        documents=len(text.documents),
        text_sha256=text.sha256,
        model_sha256=loaded.fingerprint(),
    )
    result = Result(kind=KIND, config=config, seed=asked.seed, rows=[])
    kept = Progress(result, target, fresh=fresh)
    architecture = architecture_of(loaded.model)
    with bar(2 * text.tokens, "starting", shown=progress) as step:
        work = _Calibrator(asked, loaded, base, text.documents, kept, step)
        work.measure(CHOOSE, work.every)
        tried = pool(by_document(result.rows, CHOOSE))
        chosen = {
            layer: cheapest(one, work.found, architecture.kv_heads, asked.target)
            for layer, one in tried.items()
        }
        profile = Profile(
            architecture=architecture,
            attention=replace(base, collect=False),
            layers=chosen,
        )

        def both(layer: int, _: int) -> dict[Any, Mechanism]:
            return {PROFILE: profile.mechanism(layer), DEFAULT: base}

        work.measure(CHECK, both)
    result.summary.update(
        summarise(result.rows, profile, work.found, asked.target, asked.criterion)
    )
    result.summary["verdict"] = verdict(result, profile)
    known = ["model", "file", "length", "documents", "target", "criterion", "text_sha256"]
    known += ["max_length", "rope"] if asked.max_length is not None else []
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
