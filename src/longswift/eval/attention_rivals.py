"""What the attention benchmark times: the baseline, mechanisms and memories on equal inputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor

from longswift.core.errors import LongSwiftError
from longswift.core.mechanism import Mechanism
from longswift.eval import baselines, options
from longswift.mechanisms.full import Full
from longswift.mechanisms.ms_swift import MSSwift
from longswift.mechanisms.patterned import dense_keys
from longswift.mechanisms.recurrent import Recurrent
from longswift.memory.base import LayerShape, MemoryConfig, Project, Tokens
from longswift.memory.paged_kv import PagedKV

if TYPE_CHECKING:
    from longswift.eval.attention import AttentionBench

Attention = Mechanism | MemoryConfig
A = TypeVar("A", bound=Attention)


class Rival(NamedTuple):
    """Something to time in one direction; ``attention`` is None for the baseline."""

    name: str
    attention: Attention | None
    causal: bool

    @property
    def always_dense(self) -> bool:
        """Whether it scores every key, however long the text is."""
        return self.attention is None or isinstance(self.attention, Full)


class Done(NamedTuple):
    """What a call did.

    Attributes:
        out: ``[B, H, n, D]``.
        keys: Keys scored per query.
        density: The same as a share of what full attention scores.
        backend: What computed it.
        backward_seconds: Time of the gradients alone, or None where none were asked for.
    """

    out: Tensor
    keys: float
    density: float
    backend: str
    backward_seconds: float | None = None


def direction(attention: Attention, causal: bool) -> bool:
    """Whether ``attention`` runs causally where ``causal`` is wanted, if it can."""
    if isinstance(attention, MemoryConfig):
        return True
    return attention.supports_causal if causal else not attention.supports_bidirectional


def baseline_row(bench: AttentionBench, causal: bool) -> str:
    """How rows call the baseline in a direction."""
    if causal == bench.causal:
        return bench.against
    return f"{bench.against} ({'causal' if causal else 'bidirectional'})"


def rivals(bench: AttentionBench) -> list[Rival]:
    """The baseline in every direction that is needed, that of the bench first, and the others."""
    attentions = [options.attention_from_json(config) for config in bench.mechanisms]
    found = [Rival(a.name, a, direction(a, bench.causal)) for a in attentions]
    directions = [bench.causal]
    directions += [not bench.causal] * any(r.causal != bench.causal for r in found)
    return [Rival(baseline_row(bench, causal), None, causal) for causal in directions] + found


def runnable(attentions: Iterable[A], causal: bool) -> tuple[list[A], dict[str, str]]:
    """Those that attend to a few tokens, and what the others say instead.

    Args:
        attentions: To try.
        causal: The direction, for those that have both.
    """
    able, refused = [], {}
    x = torch.zeros(1, 1, 8, 16)
    for attention in attentions:
        try:
            _ready(attention, x, x, x, direction(attention, causal))()
            able.append(attention)
        except LongSwiftError as error:
            refused[attention.name] = str(error)
    return able, refused


def caller(
    bench: AttentionBench, rival: Rival, q: Tensor, k: Tensor, v: Tensor
) -> Callable[[], Done]:
    """Runs a rival on these inputs; gradients included when the bench asks for them."""
    if rival.attention is None:
        attend = baselines.get(bench.against).attend
        keys = dense_keys(q.shape[2], k.shape[2], rival.causal)

        def once() -> Done:
            return Done(attend(q, k, v, rival.causal), keys, 1.0, "torch")

    else:
        once = _ready(rival.attention, q, k, v, rival.causal)

    def finish() -> None:
        if q.device.type == "cuda":
            torch.cuda.synchronize(q.device)

    def run() -> Done:
        with torch.set_grad_enabled(bench.backward):
            done = once()
            if bench.backward:
                q.grad = k.grad = v.grad = None
                total = done.out.sum()
                finish()
                start = time.perf_counter()
                total.backward()
                finish()
                done = done._replace(backward_seconds=time.perf_counter() - start)
        finish()
        return done

    return run


def _ready(
    attention: Attention, q: Tensor, k: Tensor, v: Tensor, causal: bool
) -> Callable[[], Done]:
    if isinstance(attention, Mechanism):

        def attend() -> Done:
            out, _, stats = attention(q, k, v, causal=causal)
            return Done(out, stats.keys_per_query, stats.density, stats.backend)

        return attend
    shape, tokens, project = _layer(q, k, v)
    memory = attention.build(shape).to(q.device, q.dtype)
    keys = attention.keys_per_query(q.shape[2], shape)
    density = keys / dense_keys(q.shape[2], k.shape[2], True)

    def read() -> Done:
        return Done(memory(tokens, project=project)[0], keys, density, "torch")

    return read


def _layer(q: Tensor, k: Tensor, v: Tensor) -> tuple[LayerShape, Tokens, Project]:
    """A layer whose keys and values are ``k`` and ``v``.

    Its inputs are keys and values side by side and its projection the identity, so that a memory
    that projects inputs again pays for the product.
    """
    hidden = torch.cat([k.detach(), v.detach()], dim=1).transpose(1, 2).flatten(2)
    weight = torch.eye(hidden.shape[2], dtype=k.dtype, device=k.device)
    kv_heads, width = k.shape[1], k.shape[3]

    def project(x: Tensor) -> tuple[Tensor, Tensor]:
        heads = (x @ weight).unflatten(2, (2 * kv_heads, width)).transpose(1, 2)
        return heads[:, :kv_heads], heads[:, kv_heads:]

    shape = LayerShape(hidden.shape[2], q.shape[1], kv_heads, width)
    return shape, Tokens(hidden, q, k, v), project


@torch.no_grad()
def carried(rival: Rival, q: Tensor, k: Tensor, v: Tensor) -> int | None:
    """Bytes allocated for what must be kept of a text to decode behind it.

    Sums of a recurrence, the state of a memory, and otherwise keys and values as a cache holds
    them, room to grow and page summaries of MS-SWIFT included. None without causal order.
    """
    attention = rival.attention
    if not rival.causal:
        return None
    if isinstance(attention, Recurrent):
        return _allocated(*attention.step(q, k, v).state)
    if isinstance(attention, MemoryConfig):
        shape, tokens, project = _layer(q, k, v)
        _, state = attention.build(shape).to(q.device, q.dtype)(tokens, project=project)
        return _allocated(*state.sums.values(), *state.kept.values())
    pages = PagedKV()
    pages.append(k, v)
    if isinstance(attention, MSSwift):
        pages.summary()
    return _allocated(*pages.buffers)


def _allocated(*tensors: Tensor) -> int:
    """Bytes of the storages behind tensors; a view holds all of its storage."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())
