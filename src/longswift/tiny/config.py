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
    """

    length: int
    tokens: int
    batch: int

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
        decay: Share of the run, at its end, over which the rate falls to ``floor``.
        floor: Last learning rate as a share of the peak.
        seed: Seed of weights and data.
        threads: CPU threads.
        checkpoint_seconds: Time between checkpoints.
        max_steps: Stop early, with a checkpoint, after this many steps.
        corpus_limit: Characters read of each document; everything by default.
        words: Words prepared for secrets.
    """

    stages: tuple[Stage, ...] = field(
        default=(
            Stage(length=192, tokens=420 * 6144, batch=6144),
            Stage(length=384, tokens=1_500_000, batch=6144),
            Stage(length=768, tokens=2_000_000, batch=6144),
            Stage(length=2048, tokens=3_000_000, batch=8192),
            Stage(length=4096, tokens=2_000_000, batch=8192),
            Stage(length=8192, tokens=2_700_000, batch=8192),
        )
    )
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
    decay: float = 0.45
    floor: float = 0.03
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

    def stage_at(self, step: int) -> Stage:
        """Return the stage that a step belongs to."""
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        raise ValueError(f"expected a step below {self.total_steps}, got one past the end")

    def rate(self, step: int) -> float:
        """Return the learning rate of a step as a share of the peak: up, flat, then down."""
        total = self.total_steps
        left = (total - step) / max(1.0, self.decay * total)
        return min((step + 1) / max(1, self.warmup), max(self.floor, min(1.0, left)))
