"""The shapes of the recipe's models, and a training forward whose window costs only the window."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from longswift.tiny.tokenizer import END_ID, PAD_ID

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["FAMILIES", "build", "hidden_states", "window_attention"]

FAMILIES = ("smollm3", "llama")
MAX_POSITIONS = 1 << 22


def build(
    *,
    family: str = "smollm3",
    vocab_size: int,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    feed_forward: int,
    window: int,
    rope_theta: float = 10000.0,
    positions: int = MAX_POSITIONS,
    seed: int,
) -> PreTrainedModel:
    """Create an untrained model.

    ``"smollm3"``: windows with positions and full layers without, in turn, so that nothing ends at
    the trained length. ``"llama"``: every layer is full and rotary, as in most models people have;
    longer texts than it was trained on need ``longswift.hf.extend``.

    Args:
        family: ``"smollm3"`` or ``"llama"``.
        vocab_size: Rows of the embedding.
        layers: Decoder layers; in ``"smollm3"`` even ones slide, odd ones see everything and know
            no positions.
        hidden: Width of the residual stream.
        heads: Query heads.
        kv_heads: Key and value heads.
        feed_forward: Width of the feed-forward layers.
        window: Tokens that a sliding layer sees, the current one included.
        rope_theta: Base of the rotary frequencies.
        positions: Longest sequence the configuration states.
        seed: Seed of the weights.

    Raises:
        ValueError: If the family is unknown or the widths do not divide.
    """
    if family not in FAMILIES:
        raise ValueError(f"expected a family among {FAMILIES}, got {family!r}; use one of those")
    if hidden % heads or heads % kv_heads:
        raise ValueError(
            f"expected hidden % heads == 0 and heads % kv_heads == 0, got hidden={hidden}, "
            f"heads={heads}, kv_heads={kv_heads}; choose widths that divide"
        )
    from transformers import LlamaConfig, LlamaForCausalLM, SmolLM3Config, SmolLM3ForCausalLM

    shape = dict(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        initializer_range=0.06,
        tie_word_embeddings=False,
        bos_token_id=END_ID,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
        attn_implementation="sdpa",
    )
    torch.manual_seed(seed)
    model: PreTrainedModel
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**shape))
    else:
        config = SmolLM3Config(
            use_sliding_window=True,
            sliding_window=window,
            no_rope_layers=[1 - i % 2 for i in range(layers)],
            layer_types=[("sliding_attention", "full_attention")[i % 2] for i in range(layers)],
            **shape,
        )
        model = SmolLM3ForCausalLM(config)
    with torch.no_grad():
        # A head near zero starts at the uniform guess instead of unlearning random logits.
        model.lm_head.weight.mul_(0.3)
    return model.float()


def window_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int
) -> torch.Tensor:
    """Causal attention to the last ``window`` keys, at a cost linear in the length.

    Args:
        q: Queries ``[batch, heads, length, dim]``.
        k: Keys, same shape.
        v: Values, same shape.
        window: Keys each query sees, its own position included.

    Returns:
        The output ``[batch, heads, length, dim]``.
    """
    batch, heads, length, dim = q.shape
    if length <= 2 * window:
        near = torch.ones(length, length, dtype=torch.bool, device=q.device)
        near = near.tril().triu(1 - window)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=near)
    blocks = -(-length // window)
    pad = blocks * window - length
    q, k, v = (F.pad(t, (0, 0, 0, pad)) for t in (q, k, v))

    def pairs(t: torch.Tensor) -> torch.Tensor:
        own = t.view(batch, heads, blocks, window, dim)
        before = F.pad(own[:, :, :-1], (0, 0, 0, 0, 1, 0))
        return torch.cat((before, own), dim=3).flatten(0, 2)

    place = torch.arange(window, device=q.device)[:, None]
    other = torch.arange(2 * window, device=q.device)[None]
    seen = (other <= place + window) & (other > place)
    bias = torch.zeros(blocks, window, 2 * window, device=q.device)
    bias.masked_fill_(~seen, float("-inf"))
    bias[0, :, :window] = float("-inf")
    scores = q.reshape(-1, window, dim) @ pairs(k).mT * dim**-0.5
    scores = scores.view(batch * heads, blocks, window, 2 * window) + bias
    out = scores.softmax(-1).flatten(0, 1) @ pairs(v)
    return out.view(batch, heads, blocks * window, dim)[:, :, :length]


def _rms(x: torch.Tensor, norm: Any) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)


def hidden_states(
    model: PreTrainedModel,
    ids: torch.Tensor,
    kept: torch.Tensor | None = None,
    *,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run the decoder as its own forward would, without the quadratic mask of the windows.

    Args:
        model: The model.
        ids: Token ids ``[rows, length]``.
        kept: Indices ``[kept]`` of the tokens whose states are wanted; all by default. The last
            layer, which must see everything, computes no others if these are at most half.
        positions: Positions ``[rows, length]`` of the tokens for the rotary layers; 0, 1, 2 and
            so on by default. Who sees whom goes by the order of the tokens whatever they are.

    Returns:
        The final states ``[rows, length or kept, hidden]``.
    """
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    config = model.config
    rotated = getattr(config, "no_rope_layers", [1] * config.num_hidden_layers)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    groups = config.num_attention_heads // config.num_key_value_heads
    dim = config.hidden_size // config.num_attention_heads

    def split(y: torch.Tensor) -> torch.Tensor:
        return y.view(*y.shape[:2], -1, dim).transpose(1, 2)

    length = ids.shape[1]
    # The mask that goes with few queries is dense: with many it would cost more than it saves.
    few = kept is not None and 2 * len(kept) <= length and kinds[-1] != "sliding_attention"
    x = model.model.embed_tokens(ids)
    if positions is None:
        positions = torch.arange(length, device=ids.device)[None]
    rotary = model.model.rotary_emb(x, positions)
    for i, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        y = _rms(x, layer.input_layernorm)
        k, v = split(attention.k_proj(y)), split(attention.v_proj(y))
        mask = None
        at_queries = rotary
        if kept is not None and few and i == config.num_hidden_layers - 1:
            x, y = x[:, kept], y[:, kept]
            at_queries = tuple(t[:, kept] for t in rotary)
            mask = torch.arange(length, device=ids.device) <= kept[:, None]
        q = split(attention.q_proj(y))
        if rotated[i]:
            q, _ = apply_rotary_pos_emb(q, q, *at_queries)
            k, _ = apply_rotary_pos_emb(k, k, *rotary)
        k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
        if kinds[i] == "sliding_attention":
            out = window_attention(q, k, v, config.sliding_window)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        x = x + attention.o_proj(out.transpose(1, 2).flatten(2))
        y = _rms(x, layer.post_attention_layernorm)
        x = x + mlp.down_proj(F.silu(mlp.gate_proj(y)) * mlp.up_proj(y))
    if kept is not None and not few:
        x = x[:, kept]
    return _rms(x, model.model.norm)
