"""One decoded token behind a long context: attention and cache, on random weights of Llama shape.

``python benchmarks/decode.py [--keys 32768,131072] [--json results/decode.json]``
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from longswift.core.errors import LongSwiftError
from longswift.eval.options import lengths
from longswift.eval.results import Result
from longswift.hf import SwiftCache

RIVALS = (
    ("sdpa", DynamicCache),
    ("sdpa", SwiftCache),
    ("ms_swift", DynamicCache),
    ("ms_swift", SwiftCache),
)
HEADS, KV_HEADS, HEAD_DIM, LAYERS = 8, 2, 64, 2


def model(longest: int) -> LlamaForCausalLM:
    """Two layers with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=HEADS * HEAD_DIM,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=longest + 4096,
    )
    return LlamaForCausalLM(config).eval()


@torch.inference_mode()
def milliseconds(llama: LlamaForCausalLM, name: str, cache_class: type, keys: int) -> list[float]:
    """Time of each of 20 tokens behind ``keys`` random keys."""
    llama.set_attn_implementation(name)
    cache = cache_class(config=llama.config)
    for layer in range(LAYERS):
        cache.update(*torch.randn(2, 1, KV_HEADS, keys, HEAD_DIM), layer)
    token = torch.zeros(1, 1, dtype=torch.long)
    samples = []
    for step in range(23):
        begin = time.perf_counter()
        llama(token, past_key_values=cache)
        if step >= 3:
            samples.append(1e3 * (time.perf_counter() - begin))
    return samples


def main() -> int:
    """Measure every rival at every length."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keys", default="32768,131072")
    parser.add_argument("--json", type=Path, default=Path("results/decode.json"))
    asked = parser.parse_args()
    try:
        keys = lengths(asked.keys)
        llama = model(max(keys))
        shape = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "layers": LAYERS}
        result = Result(kind="decode", config={**shape, "dtype": "float32"}, seed=0, rows=[])
        for count in keys:
            for name, cache_class in RIVALS:
                samples = milliseconds(llama, name, cache_class, count)
                row = {
                    "attention": name,
                    "cache": cache_class.__name__,
                    "keys": count,
                    "milliseconds": statistics.median(samples),
                    "fastest": min(samples),
                    "slowest": max(samples),
                }
                result.rows.append(row)
                print("{attention:9} {cache:13} {keys:7} {milliseconds:8.2f} ms".format(**row))
        result.save(asked.json)
    except (LongSwiftError, OSError) as error:
        print(f"decode: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
