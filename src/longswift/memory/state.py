"""What a memory carries from one call to the next, row by row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class State:
    """State of one layer; operations return a new one, so that nothing is updated twice.

    Attributes:
        seen: Real tokens each row has read since it was new (or reset).
        sums: Tensors ``[B, ...]`` of a fixed size.
        kept: Tensors ``[B, ..., T, width]`` of the tokens still held one by one; how many of the
            ``T`` slots belong to a row follows from ``seen`` and the memory's configuration, the
            rest are empty and come last.
    """

    seen: tuple[int, ...]
    sums: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        tensors = (*self.sums.values(), *self.kept.values())
        return sum(x.numel() * x.element_size() for x in tensors)

    def select(self, rows: Tensor | Sequence[int]) -> State:
        """Rows ``rows``, in that order; a row may occur several times."""
        index = torch.as_tensor(rows)
        index = index.nonzero().flatten() if index.dtype == torch.bool else index
        taken = self._each(lambda x: x.index_select(0, index.to(x.device)))
        return replace(taken, seen=tuple(self.seen[row] for row in index.tolist()))

    def repeat_interleave(self, repeats: int) -> State:
        """Every row ``repeats`` times, copies next to each other."""
        return self.select(torch.arange(len(self.seen), device="cpu").repeat_interleave(repeats))

    def reset(self, rows: Sequence[int]) -> State:
        """Rows ``rows`` start a new document and forget everything."""
        fresh = torch.zeros(len(self.seen), dtype=torch.bool, device="cpu")
        fresh[list(rows)] = True

        def cleared(x: Tensor) -> Tensor:
            which = fresh.to(x.device).view(-1, *(1,) * (x.dim() - 1))
            return x.masked_fill(which, 0)

        seen = tuple(0 if fresh[row] else count for row, count in enumerate(self.seen))
        return replace(self._each(cleared), seen=seen)

    def detach(self) -> State:
        """The same values without their history: gradients stop here."""
        return self._each(Tensor.detach)

    def _each(self, change: Callable[[Tensor], Tensor]) -> State:
        return State(
            self.seen,
            {name: change(x) for name, x in self.sums.items()},
            {name: change(x) for name, x in self.kept.items()},
        )


def join(parts: Sequence[State], rows: Sequence[int]) -> State:
    """One state from parts whose rows, one part after another, are the batch rows ``rows``."""
    if len(parts) == 1 and list(rows) == list(range(len(rows))):
        return parts[0]
    longest = {
        name: max(part.kept[name].shape[-2] for part in parts) for name in _names(parts, "kept")
    }
    together = State(
        tuple(count for part in parts for count in part.seen),
        {name: torch.cat([p.sums[name] for p in parts]) for name in _names(parts, "sums")},
        {
            name: torch.cat(
                [pad(p.kept[name], (0, 0, 0, size - p.kept[name].shape[-2])) for p in parts]
            )
            for name, size in longest.items()
        },
    )
    return together.select(torch.tensor(rows, device="cpu").argsort())


def _names(parts: Sequence[State], kind: str) -> list[str]:
    """Tensors that every part has; rows that did nothing may lack an optional one."""
    common = set.intersection(*(set(getattr(part, kind)) for part in parts))
    return [name for name in getattr(parts[0], kind) if name in common]
