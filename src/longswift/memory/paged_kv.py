"""Keys and values that grow in place, with page summaries kept up to date."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longswift.core.errors import InputError, problem
from longswift.core.softmax import accumulator_dtype
from longswift.core.summary import PAGE, KeySummary, PoolSums

_SLACK = 256


class PagedKV:
    """One layer's keys and values in buffers that grow geometrically.

    ``append`` writes behind the tokens already there and returns views, so that a decoded token
    costs O(1) copies (amortised). Summaries of complete pages are built on the first request and
    extended from then on; they equal ``KeySummary.build`` on the plain tensors after every
    operation.

    Buffers are shared only while no gradients are recorded. Under autograd ``append``
    concatenates instead, because writing in place would corrupt what the graph has saved.

    """

    page = PAGE

    def __init__(self) -> None:
        self.length = 0
        self._k: Tensor | None = None
        self._v: Tensor | None = None
        self._pages: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        self._starts: list[int] = []
        self._done: list[int] = []
        self._pools = PoolSums()
        # Whether a graph or a caller may hold the buffers, too.
        self._shared = False

    @property
    def keys(self) -> Tensor | None:
        """``[B, Hkv, length, D]``, a view; None before the first ``append``."""
        return None if self._k is None else self._k[:, :, : self.length]

    @property
    def values(self) -> Tensor | None:
        """``[B, Hkv, length, Dv]``, a view; None before the first ``append``."""
        return None if self._v is None else self._v[:, :, : self.length]

    @property
    def capacity(self) -> int:
        """Tokens that fit before the buffers must be copied."""
        return 0 if self._k is None else self._k.shape[2]

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """Everything held: keys, values and page summaries, room to grow included."""
        tensors = (self._k, self._v, *(self._pages or ()))
        return tuple(x for x in tensors if x is not None)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store ``k [B, Hkv, L, D]`` and ``v [B, Hkv, L, Dv]``; return all keys and values.

        Raises:
            InputError: The new tensors do not continue the stored ones.
        """
        self._check(k, v)
        end = self.length + k.shape[2]
        # A query that needs gradients saves these keys even if they need none themselves.
        if torch.is_grad_enabled():
            self._k = k if self.keys is None else torch.cat([self.keys, k], dim=2)
            self._v = v if self.values is None else torch.cat([self.values, v], dim=2)
            self._shared = True
        else:
            self._k = _room(self._k, k, self.length, end, self._shared)
            self._v = _room(self._v, v, self.length, end, self._shared)
            self._shared = False
            self._k[:, :, self.length : end] = k
            self._v[:, :, self.length : end] = v
        self.length = end
        return self._k[:, :, :end], self._v[:, :, :end]

    def crop(self, length: int) -> None:
        """Forget everything from position ``length`` on; a larger ``length`` changes nothing."""
        self.length = max(0, min(self.length, length))
        self._done = [
            min(done, max(0, self.length - start) // self.page)
            for start, done in zip(self._starts, self._done, strict=True)
        ]
        self._pools.crop(min(self._done, default=0))

    def select(self, rows: Tensor) -> None:
        """Keep the batch rows ``rows`` (int64 or bool), in that order; repeats are allowed."""
        if self._k is None or self._v is None:
            return
        index = rows.nonzero().flatten() if rows.dtype == torch.bool else rows
        index = index.to(self._k.device)
        self._pools.clear()
        self._k = self._k.index_select(0, index)
        self._v = self._v.index_select(0, index)
        if self._pages is None:
            return
        a, b, c, d = (x.index_select(0, index) for x in self._pages)
        self._pages = (a, b, c, d)
        if len(set(self._starts)) == len(set(self._done)) == 1:
            # Equal rows need no look at the indices, which may live on an accelerator.
            self._starts = self._starts[:1] * index.numel()
            self._done = self._done[:1] * index.numel()
        else:
            order = index.tolist()
            self._starts = [self._starts[row] for row in order]
            self._done = [self._done[row] for row in order]

    def repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row ``repeats`` times, copies next to each other."""
        if self._k is not None:
            rows = torch.arange(self._k.shape[0], device=self._k.device)
            self.select(rows.repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget everything, buffers included."""
        self.length = 0
        self._k = self._v = self._pages = None
        self._starts, self._done = [], []
        self._pools.clear()

    def summary(self, starts: Sequence[int] | None = None) -> KeySummary | None:
        """Summaries of the complete pages, brought up to date.

        Args:
            starts: First real position of each batch row; zeros when None. A row whose start
                changed is summarised anew.

        Returns:
            ``P`` pages, where ``P`` is the largest number any row has; a row's own pages come
            first. None while nothing is stored.
        """
        if self._k is None or self._v is None:
            return None
        batch = self._k.shape[0]
        wanted = [0] * batch if starts is None else [int(start) for start in starts]
        if len(wanted) != batch:
            raise InputError(
                problem(
                    "starts",
                    expected=f"{batch} positions, one per batch row",
                    got=len(wanted),
                    fix="Pass the first real position of every row.",
                )
            )
        if len(self._starts) != batch:
            self._starts, self._done = wanted, [0] * batch
            self._pools.clear()
        for row, start in enumerate(wanted):
            if self._starts[row] != start:
                self._starts[row], self._done[row] = start, 0
                self._pools.clear()
        total = [max(0, self.length - start) // self.page for start in wanted]
        with torch.no_grad():
            pages = self._extend_pages(self._k, self._v, total)
        count = max(total, default=0)
        k_min, k_max, k_sum, v_sum = (x[:, :, :count] for x in pages)
        return KeySummary(
            page=self.page,
            start=tuple(wanted),
            k_min=k_min,
            k_max=k_max,
            k_sum=k_sum,
            v_sum=v_sum,
            pools=self._pools,
        )

    def _extend_pages(
        self, k: Tensor, v: Tensor, total: list[int]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Summarise the pages completed since the last call, rows of one kind together."""
        pages = self._pages = self._page_room(k, v, max(total, default=0))
        groups: dict[tuple[int, int], list[int]] = {}
        for row, (start, done) in enumerate(zip(self._starts, self._done, strict=True)):
            if done < total[row]:
                groups.setdefault((start, done), []).append(row)
        for (start, done), rows in groups.items():
            last = total[rows[0]]
            tokens = slice(start + done * self.page, start + last * self.page)
            which: slice | list[int] = slice(None) if len(rows) == k.shape[0] else rows
            new = KeySummary.build(k[which][:, :, tokens], v[which][:, :, tokens], self.page)
            parts = (new.k_min, new.k_max, new.k_sum, new.v_sum)
            for buffer, part in zip(pages, parts, strict=True):
                buffer[which, :, done:last] = part
            for row in rows:
                self._done[row] = last
        return pages

    def _page_room(self, k: Tensor, v: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Summary buffers with room for ``count`` pages, kept from before where they exist."""
        old = self._pages
        if old is not None and old[0].shape[2] >= count and not _frozen(old[0]):
            return old
        room = max(count, 2 * old[0].shape[2] if old is not None else 0, 1)
        acc = accumulator_dtype(k.dtype)
        shape = (k.shape[0], k.shape[1], room)

        def grown(index: int, like: Tensor, dtype: torch.dtype) -> Tensor:
            new = torch.zeros(*shape, like.shape[-1], dtype=dtype, device=like.device)
            if old is not None:
                new[:, :, : old[index].shape[2]] = old[index]
            return new

        return (
            grown(0, k, k.dtype),
            grown(1, k, k.dtype),
            grown(2, k, acc),
            grown(3, v, acc),
        )

    def _check(self, k: Tensor, v: Tensor) -> None:
        pairs = ((k, self._k), (v, self._v))
        ok = k.dim() == 4 and v.dim() == 4 and k.shape[:3] == v.shape[:3]
        for new, old in pairs if ok else ():
            if old is not None:
                same = (new.shape[0], new.shape[1], new.shape[3]) == (
                    old.shape[0],
                    old.shape[1],
                    old.shape[3],
                )
                ok = ok and same and new.dtype == old.dtype and new.device == old.device
        if not ok:
            held = "nothing" if self._k is None else f"{tuple(self._k.shape)} {self._k.dtype}"
            raise InputError(
                problem(
                    "cache",
                    expected=f"k and v [B, Hkv, L, D] that continue what is stored ({held})",
                    got=f"k {tuple(k.shape)} {k.dtype}, v {tuple(v.shape)} {v.dtype}",
                    fix="Use a fresh cache for another batch, model or dtype.",
                )
            )


def _frozen(buffer: Tensor) -> bool:
    """A buffer made in inference mode cannot be written outside of it."""
    return buffer.is_inference() and not torch.is_inference_mode_enabled()


def _room(buffer: Tensor | None, new: Tensor, used: int, end: int, shared: bool) -> Tensor:
    """``buffer`` with room for ``end`` tokens; grows by half, so that copying is amortised O(1)."""
    if buffer is not None and buffer.shape[2] >= end and not shared and not _frozen(buffer):
        return buffer
    capacity = end + _SLACK if buffer is None else max(end, buffer.shape[2] * 3 // 2) + _SLACK
    batch, heads, _, width = new.shape
    grown = torch.empty(batch, heads, capacity, width, dtype=new.dtype, device=new.device)
    if buffer is not None and used:
        grown[:, :, :used] = buffer[:, :, :used].detach()
    return grown
