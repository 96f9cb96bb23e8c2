"""A result in two parts: rows computed exactly, and the others after them."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from longswift.core.inputs import tracked
from longswift.core.mechanism import Call
from longswift.core.softmax import accumulator_dtype
from longswift.core.types import Partial


def room_for(backend: ModuleType, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Partial | None:
    """Memory for the whole result, if the backend writes its part of it there."""
    if not getattr(backend, "WRITES_INTO", False) or tracked(q, k, v) or call.bias is not None:
        return None
    return Partial(
        q.new_empty(*q.shape[:3], v.shape[3]),
        torch.empty(q.shape[:3], dtype=accumulator_dtype(q.dtype), device=q.device),
    )


def joined(first: Partial, rest: Partial, room: Partial | None) -> Partial:
    """Both one after the other; what stands in ``room`` already is left there."""
    rows = first.lse.shape[2]
    if room is None or rest.out.data_ptr() != room.out[:, :, rows:].data_ptr():
        return Partial(*(torch.cat([a, b], 2) for a, b in zip(first, rest, strict=True)))
    for place, part in zip(room, first, strict=True):
        place[:, :, :rows].copy_(part)
    return room
