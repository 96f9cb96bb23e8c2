"""What mechanisms are timed against: full attention as PyTorch itself computes it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longswift.core.errors import ConfigError, problem

# FlexAttention's own default.
_BLOCK = 128

Attend = Callable[[Tensor, Tensor, Tensor, bool], Tensor]


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """Full attention of PyTorch.

    Attributes:
        name: What the command line and rows call it.
        implementation: Its ``attn_implementation`` in Transformers.
        attend: ``(q, k, v, causal) -> out`` in the layout of a mechanism; causal attention aligns
            bottom-right.
        compiled: A first call compiles, so that it must not be timed.
    """

    name: str
    implementation: str
    attend: Attend
    compiled: bool = False


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    rows, keys = q.shape[2], k.shape[2]
    # is_causal aligns top-left; one query sees everything.
    mask = None
    if causal and 1 < rows < keys:
        mask = torch.ones(rows, keys, dtype=torch.bool, device=q.device).tril(keys - rows)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=causal and rows == keys,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _flex(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    rows, keys = q.shape[2], k.shape[2]
    # One query sees everything.
    mask = _causal_blocks(rows, keys, str(q.device)) if causal and rows > 1 else None
    # The template it takes for few queries has no tile for some numbers of them.
    options = {"FORCE_USE_FLEX_ATTENTION": True} if 1 < rows < _BLOCK else None
    out: Tensor = _compiled_flex()(
        q,
        k,
        v,
        block_mask=mask,
        enable_gqa=q.shape[1] != k.shape[1],
        kernel_options=options,
    )
    return out


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    # Dynamic shapes: a compilation serves every length; a whole graph: no silent dense fallback.
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


@functools.lru_cache(maxsize=2)
def _causal_blocks(rows: int, keys: int, device: str) -> Any:
    """What ``create_block_mask`` makes, without its booleans of every row and key."""
    from torch.nn.attention.flex_attention import BlockMask

    offset = keys - rows

    def seen(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return row + offset >= key

    block = torch.arange(-(-keys // _BLOCK), dtype=torch.int32, device=device)
    top = torch.arange(0, rows, _BLOCK, dtype=torch.int32, device=device) + offset
    touched = (top + _BLOCK).clamp(max=keys).add(_BLOCK - 1) // _BLOCK
    # Rows that do not exist see nothing.
    whole = ((top + 1) // _BLOCK).where(top + _BLOCK <= keys, 0)
    partial = (whole[:, None] + block).clamp(max=len(block) - 1)
    every = block.expand_as(partial).contiguous()
    return BlockMask.from_kv_blocks(
        (touched - whole)[None, None],
        partial[None, None],
        whole[None, None],
        every[None, None],
        BLOCK_SIZE=_BLOCK,
        mask_mod=seen,
        seq_lengths=(rows, keys),
    )


_TABLE = {
    "sdpa": Baseline(name="sdpa", implementation="sdpa", attend=_sdpa),
    "flex": Baseline(name="flex", implementation="flex_attention", attend=_flex, compiled=True),
}
SDPA = "sdpa"


def names() -> list[str]:
    """Every baseline, whether it runs here or not."""
    return list(_TABLE)


def get(name: str) -> Baseline:
    """A baseline by name.

    Raises:
        ConfigError: There is none of that name.
    """
    if name not in _TABLE:
        raise ConfigError(
            problem(
                "--against", expected=f"one of {', '.join(_TABLE)}", got=repr(name), fix="Pick one."
            )
        )
    return _TABLE[name]


def check(
    name: str, *, dtype: torch.dtype, device: torch.device | str, backward: bool = False
) -> Baseline:
    """A baseline that was seen to run on 128 tokens here.

    Args:
        name: Its name.
        dtype: Of the inputs.
        device: Where it shall run.
        backward: Gradients are wanted.

    Raises:
        ConfigError: There is none of that name, or it does not run.
    """
    found = get(name)
    if not found.compiled:
        return found
    x = torch.ones(1, 1, 128, 64, dtype=dtype, device=device, requires_grad=backward)
    try:
        with torch.set_grad_enabled(backward):
            out = found.attend(x, x, x, True)
            if backward:
                out.sum().backward()
    except Exception as error:  # A compiler fails in its own ways: any of them means "not here".
        raise refusal(name, error) from None
    return found


def refusal(name: str, error: BaseException) -> ConfigError:
    """The error that says why a baseline does not run here, and which others there are."""
    while error.__context__ is not None:
        error = error.__context__
    why = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    others = ", ".join(other for other in _TABLE if other != name)
    return ConfigError(
        problem(
            "--against",
            expected=f"one that runs here: {others}",
            got=f"{name!r} ({why.rstrip('.')})",
            fix="Pick another.",
        )
    )
