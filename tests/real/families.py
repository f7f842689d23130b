"""Small models of transformers' own classes, with random weights, saved in several shards."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch

__all__ = ["FAMILIES", "save_small", "transformers"]

#: Without its types, which the checkers cannot follow.
transformers: Any = import_module("transformers")

FAMILIES = ["llama", "qwen3", "bert", "t5"]


def _config_of(family: str) -> Any:
    sizes: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 320}
    if family == "llama":
        return transformers.LlamaConfig(
            **sizes, intermediate_size=96, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False
        )
    if family == "qwen3":
        return transformers.Qwen3Config(
            **sizes, intermediate_size=96, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True
        )
    if family == "bert":
        return transformers.BertConfig(**sizes, intermediate_size=96, max_position_embeddings=64)
    return transformers.T5Config(
        vocab_size=320, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0
    )


def save_small(family: str, folder: Path, *, dtype: torch.dtype) -> Any:
    """Save a model of random weights in several shards, and return its class."""
    kind = {
        "llama": transformers.LlamaForCausalLM,
        "qwen3": transformers.Qwen3ForCausalLM,
        "bert": transformers.BertForMaskedLM,
        "t5": transformers.T5ForConditionalGeneration,
    }[family]
    torch.manual_seed(7)
    model = kind(_config_of(family)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms would be zeros and ones, all alike
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return kind
