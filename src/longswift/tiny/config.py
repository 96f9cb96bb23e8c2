"""Settings of the tiny models' recipes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from longswift.core.errors import ConfigError, check_positive, problem
from longswift.core.registry import unknown_name

# What every generator of random numbers takes.
_SEEDS = 2**63

__all__ = ["RECIPES", "Config", "Stage", "recipe"]


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
            third hides secrets, half of them packed. "bare": two of three are such statements at
            their shortest, some with nothing between a word and its number. "copies": two of three
            repeat passages. "dense": two of three hide secrets. "packed": five of six pack them.
            "texts": two of three are text, a third hides secrets. "whole": three of four are text
            whose every token is scored, a fourth hides secrets.
        leaps: Share of the rows whose positions leap, up to ``Config.reach``.
    """

    length: int
    tokens: int
    batch: int
    rate: tuple[float, float] = (1.0, 1.0)
    kind: str = "mixed"
    leaps: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.leaps <= 1:
            raise ValueError(
                f"expected leaps from 0 to 1, got {self.leaps}; give a share of the rows"
            )

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

    Raises:
        ConfigError: Threads, seed or steps are no such numbers.
        ValueError: If positions are to leap and ``reach`` is None, or the family is not rotary.

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
        rope_theta: Base of the rotary frequencies.
        reach: Positions that leaping rows are spread over, as a count: the longest text a
            ``"llama"`` learns the distances of. None: no row leaps. See
            ``longswift.tiny.positions.draw``.
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
    # Long texts come by extension, so a small base spends all frequencies on the trained ones.
    rope_theta: float = 10000.0
    reach: int | None = None
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

    def __post_init__(self) -> None:
        check_run(threads=self.threads, seed=self.seed, max_steps=self.max_steps)
        if self.reach is None and any(stage.leaps for stage in self.stages):
            raise ValueError("expected a reach for stages that leap, got None; set Config.reach")
        if self.reach is not None and self.family != "llama":
            raise ValueError(
                f"expected family 'llama' with a reach, got {self.family!r}; "
                "the windows of the others know no far positions, so leave reach out"
            )

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


def check_run(*, threads: int, seed: int, max_steps: int | None = None) -> None:
    """Raise ``ConfigError`` unless a run can have so many threads and steps, and this seed."""
    check_positive("tiny", threads=threads)
    if max_steps is not None:
        check_positive("tiny", max_steps=max_steps)
    if type(seed) is not int or not 0 <= seed < _SEEDS:
        raise ConfigError(
            problem(
                "tiny.seed",
                expected="a whole number from 0 to 2**63 - 1",
                got=repr(seed),
                fix="Give a small one, for example 1.",
            )
        )


# Who repeats what it has read can say the number that follows its word directly. From there to a
# number behind two words that all statements share is a step; at once it is not found.
_LOOKING_UP = (
    Stage(length=96, tokens=300 * 6144, batch=6144, kind="copies"),
    Stage(length=96, tokens=300 * 6144, batch=6144, kind="bare"),
    Stage(length=192, tokens=300 * 6144, batch=6144, kind="streams"),
    Stage(length=384, tokens=250 * 6144, batch=6144, kind="streams"),
    Stage(length=768, tokens=200 * 6144, batch=6144, kind="streams"),
)
_STRETCHING = (
    Stage(length=384, tokens=100 * 6144, batch=6144, kind="streams"),
    Stage(length=768, tokens=200 * 6144, batch=6144, kind="streams"),
    Stage(length=2048, tokens=180 * 8192, batch=8192, rate=(1.0, 0.7), kind="dense"),
    Stage(length=4096, tokens=90 * 8192, batch=8192, rate=(0.7, 0.5), kind="dense"),
    Stage(length=8192, tokens=50 * 16384, batch=16384, rate=(0.5, 0.5)),
    Stage(length=8192, tokens=60 * 16384, batch=16384, rate=(0.5, 0.4), kind="whole"),
    Stage(length=16384, tokens=80 * 16384, batch=16384, rate=(0.4, 0.1), kind="whole"),
    Stage(length=32768, tokens=12 * 32768, batch=32768, rate=(0.1, 0.01), kind="whole"),
)

_ROTARY = Config(
    stages=_LOOKING_UP + tuple(replace(stage, leaps=0.5) for stage in _STRETCHING),
    family="llama",
    hidden=256,
    heads=4,
    kv_heads=2,
    feed_forward=640,
    rope_theta=500_000.0,
    reach=33_000,
    seed=2,
)

RECIPES = {"packaged": Config(), "rotary": _ROTARY}


def recipe(name: str) -> Config:
    """Return the settings of a named recipe.

    ``"packaged"`` makes the model that comes with the package. ``"rotary"`` makes a Llama of which
    every layer is full and rotary, with distances of up to 33000 learnt by leaping positions: a
    second judge of what mechanisms leave out.

    Raises:
        ConfigError: If there is none of that name.
    """
    if name not in RECIPES:
        raise unknown_name("recipe", name, list(RECIPES))
    return RECIPES[name]
