"""Recall beyond the window: small models, equal but for their attention, trained from scratch.

``python benchmarks/recall.py [--attention infini,window] [--json results/recall.json]``

A sequence names a letter for each of 4 slots within its first 16 tokens and asks for slots 12 times
within its last 16, with noise in between. Answering takes nothing but a look back of 65 tokens or
more; two layers with a window of 16 reach 30. Guessing is right one time in 4. ``--told 2`` names
the letters within the 16 tokens after the first 32 instead, to see whether it matters where.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longswift import Full, SlidingWindow
from longswift.core.errors import InputError, LongSwiftError, problem
from longswift.eval.bench_plots import lines
from longswift.eval.plots import drawable, figure, save
from longswift.eval.results import Progress, Result, load, writable
from longswift.hf import LongSwiftConfig, LongSwiftLM, memory_parameters
from longswift.mechanisms.bigbird import BigBird
from longswift.mechanisms.linear import Linear
from longswift.mechanisms.longformer import Longformer
from longswift.memory.compressive import Infini
from longswift.memory.segment import TransformerXL

SLOTS = LETTERS = 4
QUESTIONS, NOISE = 12, 8
LENGTH, PART = 96, 16
# Vocabulary: slot-and-letter tokens, then questions, letters and noise.
QUESTION = SLOTS * LETTERS
ANSWER = QUESTION + SLOTS
FILLER = ANSWER + LETTERS
VOCABULARY = FILLER + NOISE

ATTENTIONS: dict[str, Any] = {
    "window": SlidingWindow(window=PART),
    "full": Full(),
    "infini": Infini(segment=PART),
    "infini-delta-unit": Infini(segment=PART, update="delta_unit"),
    "infini-delta-token": Infini(segment=PART, update="delta_token"),
    "infini-delta-segment": Infini(segment=PART, update="delta_segment"),
    "transformer-xl": TransformerXL(segment=PART, memory=LENGTH - PART),
    "linear": Linear(),
    "bigbird": BigBird(block=PART // 2, random_blocks=0, window_blocks=3, global_blocks=2),
    "longformer": Longformer(left=PART - 1, global_tokens=PART),
}


class Data(NamedTuple):
    """``ids [B, LENGTH]`` and ``labels``, which are -100 except at questions."""

    ids: Tensor
    labels: Tensor


def sequences(rows: int, generator: torch.Generator, part: int = 0) -> Data:
    """Random sequences of the task; labels are not shifted: the answer belongs to the question.

    Letters are named in part ``part`` of ``PART`` tokens.
    """
    ids = torch.randint(FILLER, VOCABULARY, (rows, LENGTH), generator=generator)
    labels = torch.full_like(ids, -100)
    letters = torch.randint(LETTERS, (rows, SLOTS), generator=generator)
    slots = torch.randint(SLOTS, (rows, QUESTIONS), generator=generator)
    told, asked = (
        torch.rand(rows, PART, generator=generator).argsort(1)[:, :count]
        for count in (SLOTS, QUESTIONS)
    )
    asked = asked + LENGTH - PART
    ids.scatter_(1, told + part * PART, torch.arange(SLOTS) * LETTERS + letters)
    ids.scatter_(1, asked, QUESTION + slots)
    labels.scatter_(1, asked, ANSWER + letters.gather(1, slots))
    return Data(ids, labels)


def build(name: str, seed: int) -> LongSwiftLM:
    """Two layers, everything equal but the attention."""
    torch.manual_seed(seed)
    config = LongSwiftConfig(
        attention=ATTENTIONS[name],
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        use_cache=False,
    )
    return LongSwiftLM(config)


def asked(model: LongSwiftLM, data: Data) -> tuple[Tensor, Tensor]:
    """Logits ``[questions, VOCABULARY]`` and answers."""
    wanted = data.labels >= 0
    return model(data.ids).logits[wanted], data.labels[wanted]


@torch.no_grad()
def accuracy(model: LongSwiftLM, seed: int, part: int) -> float:
    """Share of questions answered rightly, on sequences never trained on."""
    model.eval()
    unseen = torch.Generator().manual_seed(seed + 10_000)
    logits, answers = asked(model, sequences(128, unseen, part))
    model.train()
    return float((logits.argmax(-1) == answers).float().mean())


def gates(model: LongSwiftLM) -> list[float]:
    """Share of the memory in every head of every Infini layer; empty for other attentions."""
    found = [p for n, p in model.named_parameters() if n.endswith("gate_bias")]
    return [round(float(x), 4) for p in found for x in torch.sigmoid(p.detach())]


def train(name: str, seed: int, steps: int, rows: int, part: int = 0) -> dict[str, Any]:
    """Train one model and return its record."""
    model = build(name, seed)
    before = gates(model)
    new = memory_parameters(model)
    old = [p for p in model.parameters() if all(p is not other for other in new)]
    groups = [{"params": old, "lr": 3e-3}, {"params": new, "lr": 3e-2, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, (step + 1) / 50) * (1 - 0.9 * step / steps)
    )
    generator = torch.Generator().manual_seed(seed)
    curve, begin = [], time.perf_counter()
    for step in range(steps):
        logits, answers = asked(model, sequences(rows, generator, part))
        loss = torch.nn.functional.cross_entropy(logits, answers)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if (step + 1) % max(1, steps // 10) == 0:
            curve.append([step + 1, round(loss.item(), 4), round(accuracy(model, seed, part), 4)])
            print(f"{name:20} step {step + 1:5}  loss {curve[-1][1]:.3f}  right {curve[-1][2]:.3f}")
    return {
        "attention": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "right": curve[-1][2],
        "gate_before": before,
        "gate_after": gates(model),
        "seconds": round(time.perf_counter() - begin, 1),
        "curve": curve,
    }


def plot(result: Result, path: Path) -> Path:
    """Share of right answers against training steps."""
    fig = figure(8, 4)
    axis = fig.subplots()
    names = [row["attention"] for row in result.rows]
    looks = lines({name: name for name in names}, ["full"], "infini")
    for place, (name, row) in enumerate(zip(names, result.rows, strict=True)):
        steps, _, right = zip(*row["curve"], strict=True)
        # Curves that coincide stay visible: thinner than those beneath, every other one dashed.
        style = {**looks[name].style(), "linewidth": 5.0 - 0.45 * place, "zorder": 2}
        style |= {"linestyle": "--" if place % 2 else "-", "markersize": 8 - 0.5 * place}
        axis.plot(steps, right, label=name, **style)
    axis.axhline(1 / LETTERS, color="#999999", linestyle=":", label="guessing")
    axis.set_xlabel("training steps")
    axis.set_ylabel("questions answered rightly")
    axis.set_ylim(0, 1.02)
    axis.grid(True, alpha=0.3)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return save(fig, path)


def main() -> int:
    """Train every model that is not in the result yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--attention", default=",".join(ATTENTIONS))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rows", type=int, default=16, help="sequences per step")
    parser.add_argument("--told", type=int, default=0, help="part that names the letters")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=Path("results/recall.json"))
    parser.add_argument("--png", type=Path, help="draw the finished result")
    parser.add_argument("--fresh", action="store_true", help="forget an interrupted run")
    given = parser.parse_args()
    try:
        names = given.attention.split(",")
        unknown = [name for name in names if name not in ATTENTIONS]
        told = range(LENGTH // PART - 1)
        if unknown or given.steps < 1 or given.rows < 1 or given.told not in told:
            raise InputError(
                problem(
                    "recall",
                    expected=f"positive numbers, a part of {told.start} to {told[-1]}, and some of "
                    f"{', '.join(ATTENTIONS)}",
                    got=unknown or (given.steps, given.rows, given.told),
                    fix="Separate names by commas.",
                )
            )
        if given.png:
            drawable(given.png)
        config = {key: getattr(given, key) for key in ("steps", "rows", "told")}
        config |= {"attention": names}
        result = Result(kind="recall", config=config, seed=given.seed, rows=[])
        progress = Progress(result, writable(given.json), fresh=given.fresh)
        for name in names:
            if progress.find(attention=name) is None:
                progress.add(train(name, given.seed, given.steps, given.rows, given.told))
        result.save(given.json)
        progress.done()
        if given.png:
            plot(load(given.json, "recall"), given.png)
    except (LongSwiftError, OSError) as error:
        print(f"recall: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
