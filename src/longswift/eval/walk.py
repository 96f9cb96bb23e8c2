"""One document read by one model under different attention, watched, and nothing changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from longswift.core.errors import UnsupportedError, problem
from longswift.core.observe import Observed, Observer, observe
from longswift.eval.cost import Scored
from longswift.eval.progress import Bar
from longswift.eval.reading import hidden_states
from longswift.eval.rivals import Rival
from longswift.mechanisms.full import Full


@contextmanager
def on_trial(model: Any) -> Iterator[None]:
    """Room for ``stand_in``: afterwards the model's configuration is what it was before."""
    from longswift.hf import Extension, set_attention

    training = model.training
    with Extension(model, 0):
        set_attention(model, Full())
        model.eval()
        try:
            yield
        finally:
            model.train(training)


def _ignore(*_: Any) -> None:
    """Nothing is done with what was read."""


class Walk:
    """Readings of one document by one model."""

    def __init__(self, model: Any, ids: Sequence[int], chunk: int, step: Bar) -> None:
        self._model, self._ids, self._chunk, self._step = model, ids, chunk, step

    def read(
        self,
        rival: Rival,
        observer: Observer,
        see: Callable[[int, Tensor], None] = _ignore,
        after: Callable[[Any], None] = _ignore,
    ) -> None:
        """Read with ``rival``.

        Args:
            rival: What the full-attention layers run.
            observer: Sees their calls while reading.
            see: Called with the start and the hidden states of every chunk.
            after: Called with the cache, the rival still in place.
        """
        from longswift.hf import SwiftCache
        from longswift.hf.settings import stand_in

        def tell(call: Observed) -> None:
            if rival.used(call):
                observer(call)

        self._step(text=f"{rival.name}: reading")
        cache = SwiftCache(self._model.config)
        with stand_in(rival.choose):
            with observe(tell):
                start = 0
                for hidden in hidden_states(self._model, self._ids, cache, self._chunk):
                    see(start, hidden)
                    start += hidden.shape[1]
                    self._step(hidden.shape[1])
            after(cache)

    def keep(self, rival: Rival, also: Observer = _ignore) -> tuple[list[Tensor], float]:
        """The last hidden states of a reading, and the mean number of keys scored per query.

        ``also`` sees the rival's calls, too.
        """
        kept: list[Tensor] = []
        scored = Scored()

        def see(call: Observed) -> None:
            scored.add(call)
            also(call)

        self.read(rival, see, lambda _, hidden: kept.append(hidden))
        if not scored.queries:
            raise UnsupportedError(
                problem(
                    type(self._model).__name__,
                    expected="layers with full attention",
                    got="none that a mechanism could replace",
                    fix="There is nothing to measure in this model.",
                )
            )
        return kept, scored.keys / scored.queries
