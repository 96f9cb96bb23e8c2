"""What the phases of a model's work consist of, as functions to be timed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil
import torch
from torch import Tensor

from longswift.core.errors import ConfigError, problem
from longswift.core.mechanism import Mechanism
from longswift.core.registry import unknown_name
from longswift.eval import baselines, options
from longswift.eval.cost import Scored, count_keys
from longswift.eval.models import Loaded, load
from longswift.eval.normal import normal
from longswift.eval.reading import hidden_states, next_token_logits

if TYPE_CHECKING:
    from longswift.eval.phases import PhaseBench

ATTENTION, MODEL = "attention", "model"
RANDOM = "random-llama"
# Shapes of models whose weights are drawn; the second is that of Llama 3 8B.
_SHAPES: dict[str, dict[str, Any]] = {
    RANDOM: {},
    f"{RANDOM}-8b": {
        "heads": 32,
        "kv_heads": 8,
        "head_dim": 128,
        "layers": 32,
        "intermediate": 14_336,
        "vocabulary": 128_256,
    },
}
# Positions beyond the text that decoding may need.
_ROOM = 4096


class Place(NamedTuple):
    """One case: a part of the work, tokens, and sequences per call."""

    part: str
    length: int
    batch: int


class Job:
    """One rival's work in one case.

    Args:
        run: Does it once; returns when the device has finished.
        mechanism: What attends, or None for the baseline.
        dense: Keys full attention scores per query.
    """

    def __init__(self, run: Callable[[], object], mechanism: Mechanism | None, dense: float):
        self._run, self._mechanism, self._dense = run, mechanism, dense
        self._scored = Scored()

    def run(self) -> None:
        """Do it once and count the keys that are scored."""
        with count_keys(self._mechanism, self._scored):
            self._run()

    def keys_per_query(self) -> float:
        """Mean over all runs so far."""
        if self._mechanism is None:
            return self._dense
        return self._scored.keys / max(1, self._scored.queries)


class Work:
    """The model of a bench, and the jobs it gives.

    Args:
        bench: What is measured.
    """

    def __init__(self, bench: PhaseBench) -> None:
        self.bench = bench
        self.loaded = _load(bench)
        self.rivals: dict[str, Mechanism | None] = {bench.against: None}
        self.rivals |= {m["name"]: options.from_json(m) for m in bench.mechanisms}

    def jobs(self, place: Place) -> dict[str, Job]:
        """A job for every rival, all on the same data."""
        make = getattr(self, f"_{self.bench.phase}_{place.part}")
        dense = place.length if self.bench.phase == "decode" else (place.length + 1) / 2
        run: Callable[[Mechanism | None], Callable[[], object]] = make(place)
        found = {name: Job(run(m), m, float(dense)) for name, m in self.rivals.items()}
        if self.bench.dynamic_cache and place.part == MODEL:
            run = self._decode_model(place, dynamic=True)
            other = {f"{name}, DynamicCache": m for name, m in self.rivals.items()}
            found |= {name: Job(run(m), m, float(dense)) for name, m in other.items()}
        return found

    def _decode_attention(self, place: Place) -> Callable[..., Callable[[], object]]:
        """A query against a cache that a token is added to first."""
        from longswift.hf import SwiftCache

        heads, kv_heads, width = _shape(self.loaded)
        cache, draw = SwiftCache(), self._numbers()
        with torch.inference_mode():
            _fill(
                cache, [0], lambda tokens: draw(place.batch, kv_heads, tokens, width), place.length
            )
        q = draw(place.batch, heads, 1, width)
        new = [draw(place.batch, kv_heads, 1, width) for _ in "kv"]
        pages = cache.layers[0].pages
        attend = baselines.get(self.bench.against).attend

        def rival(mechanism: Mechanism | None) -> Callable[[], object]:
            @torch.inference_mode()
            def run() -> None:
                for _ in range(self.bench.tokens):
                    k, v = cache.update(*new, 0)
                    if mechanism is None:
                        attend(q, k, v, True)
                    else:
                        mechanism(q, k, v, causal=True, summary=pages.summary())
                self._wait()

            return run

        return rival

    def _decode_model(
        self, place: Place, dynamic: bool = False
    ) -> Callable[..., Callable[[], object]]:
        """Greedy tokens behind a cache of random keys and values."""
        from longswift.hf.cache import SwiftCache, dynamic_cache

        model = self.loaded.model
        _, kv_heads, width = _shape(self.loaded)
        cache: Any = (dynamic_cache if dynamic else SwiftCache)(model.config)
        draw = self._numbers()
        with torch.inference_mode():
            layers = range(len(cache.layers))
            _fill(cache, layers, lambda n: draw(place.batch, kv_heads, n, width), place.length)
        first = torch.zeros(place.batch, 1, dtype=torch.long, device=model.device)

        def rival(mechanism: Mechanism | None) -> Callable[[], object]:
            @torch.inference_mode()
            def run() -> None:
                self._use(mechanism)
                token = first
                for _ in range(self.bench.tokens):
                    out = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
                    token = out.logits[:, -1].argmax(-1, keepdim=True)
                self._wait()

            return run

        return rival

    def _prefill_model(self, place: Place) -> Callable[..., Callable[[], object]]:
        """From the text to the first token, in chunks."""
        from longswift.hf import SwiftCache

        model, ids = self.loaded.model, self._ids(place)

        def rival(mechanism: Mechanism | None) -> Callable[[], object]:
            @torch.inference_mode()
            def run() -> None:
                self._use(mechanism)
                cache, last = SwiftCache(model.config), ids[:, :0]
                for hidden in hidden_states(model, ids, cache, self.bench.chunk):
                    last = hidden[:, -1]
                next_token_logits(model, last).argmax(-1)
                self._wait()

            return run

        return rival

    def _train_attention(self, place: Place) -> Callable[..., Callable[[], object]]:
        """Forward and gradients of q, k and v."""
        heads, kv_heads, width = _shape(self.loaded)
        draw = self._numbers()
        q, k, v = (
            draw(place.batch, count, place.length, width).requires_grad_()
            for count in (heads, kv_heads, kv_heads)
        )
        attend = baselines.get(self.bench.against).attend

        def rival(mechanism: Mechanism | None) -> Callable[[], object]:
            def run() -> None:
                q.grad = k.grad = v.grad = None
                if mechanism is None:
                    out = attend(q, k, v, True)
                else:
                    out = mechanism(q, k, v, causal=True).out
                out.sum().backward()
                self._wait()

            return run

        return rival

    def _train_model(self, place: Place) -> Callable[..., Callable[[], object]]:
        """Loss of the next tokens and gradients of all weights; no step of an optimiser."""
        model, ids = self.loaded.model, self._ids(place)
        model.train()
        if self.bench.checkpointing:
            _recompute(model)

        def rival(mechanism: Mechanism | None) -> Callable[[], object]:
            def run() -> None:
                self._use(mechanism)
                model.zero_grad(set_to_none=True)
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                self._wait()

            return run

        return rival

    def _use(self, mechanism: Mechanism | None) -> None:
        if mechanism is None:
            name = baselines.get(self.bench.against).implementation
            self.loaded.model.set_attn_implementation(name)
        else:
            self.loaded.use(mechanism)

    def _ids(self, place: Place) -> Tensor:
        generator = torch.Generator().manual_seed(self.bench.seed)
        vocabulary = self.loaded.model.get_input_embeddings().num_embeddings
        ids = torch.randint(vocabulary, (place.batch, place.length), generator=generator)
        return ids.to(self.bench.device)

    def _numbers(self) -> Callable[..., Tensor]:
        return normal(self.bench.seed, self.bench.device, options.dtype(self.bench.dtype))

    def _wait(self) -> None:
        if self.loaded.model.device.type == "cuda":
            torch.cuda.synchronize(self.loaded.model.device)


def _fill(cache: Any, layers: Iterable[int], draw: Callable[[int], Tensor], length: int) -> None:
    """Fills a cache with ``length`` tokens, and room for more: growing would hit a random rival."""
    for layer in layers:
        cache.update(draw(length + _ROOM), draw(length + _ROOM), layer)
    cache.crop(-_ROOM)


def _load(bench: PhaseBench) -> Loaded:
    """The model, with positions for the longest text: its time does not depend on training."""
    from longswift.hf import extend
    from longswift.hf.extending import limit_of
    from longswift.hf.loading import random_llama

    longest = max(bench.lengths) + _ROOM
    if bench.model in _SHAPES:
        _check_memory(bench)
        drawn: dict[str, Any] = {"dtype": options.dtype(bench.dtype), "device": bench.device}
        model = random_llama(longest, bench.seed, **_SHAPES[bench.model], **drawn)
        return Loaded(model=model, tokenizer=None, name=bench.model)
    shaped = bench.model.startswith("random-") and "/" not in bench.model
    if shaped and not Path(bench.model).is_dir():
        raise unknown_name("model", bench.model, list(_SHAPES), "a directory", "a hub name")
    loaded = load(bench.model, dtype=bench.dtype, device=bench.device)
    limit = limit_of(loaded.model)
    if limit is not None and limit < longest:
        extend(loaded.model, longest, attention=None)
    return loaded


def _check_memory(bench: PhaseBench) -> None:
    """Raise ``ConfigError`` where the weights alone do not fit; a system out of memory kills."""
    needed = _parameters(**_SHAPES[bench.model]) * options.dtype(bench.dtype).itemsize
    free = psutil.virtual_memory().available
    if torch.device(bench.device).type == "cpu" and needed > free:
        raise ConfigError(
            problem(
                bench.model,
                expected=f"{needed / 2**30:.1f} GiB of free memory for weights in {bench.dtype}",
                got=f"{free / 2**30:.1f} GiB",
                fix=f"Use --device cuda, or {RANDOM}.",
            )
        )


def _parameters(
    *,
    heads: int = 0,
    kv_heads: int = 0,
    head_dim: int = 0,
    layers: int = 0,
    intermediate: int = 0,
    vocabulary: int = 0,
) -> int:
    """How many numbers a shape of ``_SHAPES`` has; what it leaves out is too few to count."""
    hidden, keys = heads * head_dim, kv_heads * head_dim
    layer = 2 * hidden * (hidden + keys) + 3 * hidden * intermediate + 2 * hidden
    return 2 * vocabulary * hidden + layers * layer + hidden


def _shape(loaded: Loaded) -> tuple[int, int, int]:
    """Query heads, key/value heads and width of a head.

    Raises:
        ConfigError: The model does not say.
    """
    config: Any = loaded.model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    if not heads or not getattr(config, "hidden_size", None):
        raise ConfigError(
            problem(
                loaded.name,
                expected="a model with num_attention_heads and hidden_size",
                got=type(loaded.model).__name__,
                fix=f"Use another model, or {RANDOM}.",
            )
        )
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, getattr(config, "num_key_value_heads", None) or heads, width


def _recompute(model: Any) -> None:
    """Turn activation checkpointing on, by the name this version of Transformers has for it."""
    newer = getattr(model, "activation_checkpointing_enable", None)
    (newer or model.gradient_checkpointing_enable)()
