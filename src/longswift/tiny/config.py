"""Settings of the tiny model's recipe."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Config", "Stage"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of the run with one sequence length.

    Attributes:
        length: Tokens per sequence.
        tokens: Tokens of the whole stage.
        batch: Tokens per step; a step has at least one sequence.
        rate: Learning rate at the start and the end, as a share of the peak.
        kind: What the rows hold. "mixed": half hide secrets, a third is text, a sixth repeats
            passages. "sentences": the same, but most secrets are packed, as many as fit with next
            to no text between them. "streams": a third states numbers and states some again, a
            third hides secrets, half of them packed. "dense": two of three hide secrets. "packed":
            five of six pack them. "texts": two of three are text, a third hides secrets.
            "whole": three of four are text whose every token is scored, a fourth hides secrets.
    """

    length: int
    tokens: int
    batch: int
    rate: tuple[float, float] = (1.0, 1.0)
    kind: str = "mixed"

    @property
    def rows(self) -> int:
        """Sequences per step."""
        return max(1, self.batch // self.length)

    @property
    def steps(self) -> int:
        """Steps of the stage."""
        return max(1, round(self.tokens / (self.rows * self.length)))


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a run; the defaults are those of the packaged model.

    Attributes:
        stages: Sequence lengths in the order of the run.
        family: Architecture, see ``longswift.tiny.network.build``.
        vocab_size: Pieces of the tokenizer.
        layers: Decoder layers.
        hidden: Width of the residual stream.
        heads: Query heads.
        kv_heads: Key and value heads.
        feed_forward: Width of the feed-forward layers.
        window: Tokens that a sliding layer sees.
        muon_lr: Peak learning rate of the hidden matrices.
        adam_lr: Peak learning rate of embedding, head and norms.
        weight_decay: Decay of the hidden matrices.
        warmup: Steps of linear warm-up.
        seed: Seed of weights and data.
        threads: CPU threads.
        checkpoint_seconds: Time between checkpoints.
        max_steps: Stop early, with a checkpoint, after this many steps.
        corpus_limit: Characters read of each document; everything by default.
        words: Words prepared for secrets.
    """

    stages: tuple[Stage, ...] = field(
        default=(
            Stage(length=192, tokens=700 * 6144, batch=6144, kind="sentences"),
            Stage(length=384, tokens=748 * 6144, batch=6144, kind="sentences"),
            # Words are told apart within some hundred steps of this, and not before.
            Stage(length=192, tokens=300 * 6144, batch=6144, kind="streams"),
            Stage(length=384, tokens=300 * 6144, batch=6144, kind="streams"),
            Stage(length=768, tokens=400 * 6144, batch=6144, kind="streams"),
            Stage(length=2048, tokens=400 * 8192, batch=8192, rate=(1.0, 0.7)),
            Stage(length=8192, tokens=120 * 16384, batch=16384, rate=(0.7, 0.35)),
            Stage(length=16384, tokens=80 * 16384, batch=16384, rate=(0.35, 0.15)),
            Stage(length=16384, tokens=60 * 16384, batch=16384, rate=(0.15, 0.02)),
            # Far text disturbs the prediction of text until long texts have been read for a while.
            Stage(length=16384, tokens=110 * 16384, batch=16384, rate=(0.35, 0.02), kind="texts"),
            Stage(length=16384, tokens=150 * 16384, batch=16384, rate=(0.5, 0.02), kind="whole"),
        )
    )
    family: str = "smollm3"
    vocab_size: int = 2048
    layers: int = 4
    hidden: int = 192
    heads: int = 6
    kv_heads: int = 2
    feed_forward: int = 512
    window: int = 128
    muon_lr: float = 0.02
    adam_lr: float = 3e-3
    weight_decay: float = 0.0
    warmup: int = 50
    seed: int = 1
    threads: int = 1
    checkpoint_seconds: float = 120.0
    max_steps: int | None = None
    corpus_limit: int | None = None
    words: int = 60_000

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return sum(stage.steps for stage in self.stages)

    def locate(self, step: int) -> tuple[Stage, int]:
        """Return the stage that a step belongs to, and its number within the stage."""
        inside = step
        for stage in self.stages:
            if inside < stage.steps:
                return stage, inside
            inside -= stage.steps
        raise ValueError(f"expected a step below {self.total_steps}, got {step}; train no further")

    def rate(self, step: int) -> float:
        """Return the learning rate of a step as a share of the peak."""
        stage, inside = self.locate(step)
        first, last = stage.rate
        flat = first + (last - first) * inside / stage.steps
        return min((step + 1) / max(1, self.warmup), flat)
