"""Tiny models of every architecture the adapter is tested on, random but reproducible."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import longswift.hf  # noqa: F401  (registers the attention functions)
from longswift import MSSwift

# What older versions cannot do themselves is not tested there.
recent = pytest.mark.skipif(
    not hasattr(hf.DynamicCache, "get_max_length"), reason="needs a recent version of Transformers"
)

# Small enough to leave keys out of 150 tokens.
SPARSE = MSSwift(windows=(32, 64), sinks=4, key_tokens=8, block=32, remainder=64, dense_below=32)

VOCAB = 97
PAD = 0
_DECODER = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    pad_token_id=PAD,
    bos_token_id=1,
    eos_token_id=2,
    initializer_range=0.3,
)
_ENCODER = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=128,
    pad_token_id=PAD,
    initializer_range=0.3,
)


def _llama(**more: Any) -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**_DECODER, **more}))


def _qwen3() -> Any:
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**_DECODER))


def _mistral() -> Any:
    return hf.MistralForCausalLM(hf.MistralConfig(**_DECODER, sliding_window=7))


def _gemma3() -> Any:
    config = hf.Gemma3TextConfig(
        **_DECODER,
        sliding_window=7,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"],
    )
    return hf.Gemma3ForCausalLM(config)


def gemma3_encoder() -> Any:
    """EmbeddingGemma's kind: a decoder's layers that see both ways."""
    config = hf.Gemma3TextConfig(
        **_DECODER,
        sliding_window=12,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"],
        use_bidirectional_attention=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        return hf.Gemma3TextModel(config).eval()


def _gpt_neox() -> Any:
    shared = {k: v for k, v in _DECODER.items() if k not in ("num_key_value_heads", "head_dim")}
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**shared, rope_parameters=rope))


def _smollm3() -> Any:
    config = hf.SmolLM3Config(
        **_DECODER,
        use_sliding_window=True,
        sliding_window=7,
        no_rope_layers=[1, 0],
        layer_types=["sliding_attention", "full_attention"],
    )
    return hf.SmolLM3ForCausalLM(config)


def _gpt2() -> Any:
    config = hf.GPT2Config(
        vocab_size=VOCAB,
        n_positions=128,
        n_embd=32,
        n_layer=2,
        n_head=4,
        initializer_range=0.3,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=2,
    )
    return hf.GPT2LMHeadModel(config)


def _opt() -> Any:
    config = hf.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        init_std=0.3,
        dropout=0.0,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=2,
    )
    return hf.OPTForCausalLM(config)


def _bert() -> Any:
    config = hf.BertConfig(**_ENCODER, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0)
    return hf.BertForMaskedLM(config)


def _modernbert() -> Any:
    config = hf.ModernBertConfig(
        **_ENCODER, local_attention=10, global_attn_every_n_layers=2, bos_token_id=1, eos_token_id=2
    )
    return hf.ModernBertForMaskedLM(config)


def _vit() -> Any:
    config = hf.ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        initializer_range=0.3,
    )
    return hf.ViTModel(config)


def _gemma2() -> Any:
    config = hf.Gemma2Config(**_DECODER, sliding_window=7, query_pre_attn_scalar=8)
    return hf.Gemma2ForCausalLM(config)


def _gpt_oss() -> Any:
    config = hf.GptOssConfig(
        **_DECODER, num_local_experts=2, num_experts_per_tok=1, sliding_window=7
    )
    return hf.GptOssForCausalLM(config)


def _llama4() -> Any:
    config = hf.Llama4TextConfig(
        **_DECODER,
        intermediate_size_mlp=48,
        num_local_experts=1,
        attention_chunk_size=8,
        layer_types=["chunked_attention", "full_attention"],
    )
    return hf.Llama4ForCausalLM(config)


def _bart() -> Any:
    config = hf.BartConfig(
        vocab_size=VOCAB,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=64,
        init_std=0.3,
        dropout=0.0,
    )
    return hf.BartForConditionalGeneration(config)


def _deepseek_v3() -> Any:
    config = hf.DeepseekV3Config(
        **{k: v for k, v in _DECODER.items() if k not in ("head_dim", "num_key_value_heads")},
        num_key_value_heads=4,
        moe_intermediate_size=16,
        first_k_dense_replace=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=12,
    )
    return hf.DeepseekV3ForCausalLM(config)


BUILDERS: dict[str, Callable[[], Any]] = {
    "llama": _llama,
    "qwen3": _qwen3,
    "mistral": _mistral,
    "gemma3": _gemma3,
    "gpt_neox": _gpt_neox,
    "smollm3": _smollm3,
    "gpt2": _gpt2,
    "opt": _opt,
    "deepseek_v3": _deepseek_v3,
    "bert": _bert,
    "modernbert": _modernbert,
    "vit": _vit,
    "gemma2": _gemma2,
    "gpt_oss": _gpt_oss,
    "llama4": _llama4,
    "bart": _bart,
}
DECODERS = list(BUILDERS)[:9]
ENCODERS = ["bert", "modernbert"]


def build(name: str) -> Any:
    """A new model in evaluation mode, the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        model = BUILDERS[name]().eval()
    if getattr(model, "generation_config", None) is not None:
        # Random models stop at random; tests want the same length everywhere.
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = PAD
    return model


@functools.cache
def shared(name: str) -> Any:
    """The model of this architecture that tests share; they may switch its attention only."""
    return build(name)


def with_attention(name: str, implementation: str) -> Any:
    """The shared model, running ``implementation``."""
    model = shared(name)
    # Not set_attn_implementation, which older versions refuse for some architectures.
    model.config._attn_implementation = implementation
    return model


def batch(length: int = 24, padding: str = "left", seed: int = 0) -> dict[str, Tensor]:
    """Three rows with 0, 5 and ``length - 1`` padded positions on one side."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (3, length), generator=generator)
    mask = torch.ones_like(ids)
    for row, padded in enumerate((0, 5, length - 1) if padding != "none" else ()):
        if padding == "left":
            mask[row, :padded] = 0
        elif padded:
            mask[row, length - padded :] = 0
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}
