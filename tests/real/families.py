"""Small models of transformers' own classes, with random weights, saved in several shards."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch

__all__ = ["ALL_FAMILIES", "FAMILIES", "logits_of", "save_small", "transformers"]

#: Without its types, which the checkers cannot follow.
transformers: Any = import_module("transformers")

#: Those whose checkpoints have the model's own names.
FAMILIES = ["llama", "qwen3", "bert", "t5", "mamba"]

#: Also those that transformers converts (experts that the model fuses), and models without token numbers.
ALL_FAMILIES = [*FAMILIES, "qwen3-moe", "mixtral", "gpt2", "vit"]

_SIZES: dict[str, object] = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 320}
_GATED: dict[str, object] = {**_SIZES, "intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 64}

#: The model's class, its configuration's, and what that is made with.
_KINDS: dict[str, tuple[str, str, dict[str, object]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**_GATED, "tie_word_embeddings": False}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_GATED, "head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**_GATED, "head_dim": 16, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
    ),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_GATED, "num_local_experts": 4}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 320}),
    "bert": ("BertForMaskedLM", "BertConfig", {**_SIZES, "intermediate_size": 96, "max_position_embeddings": 64}),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 96,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": 320,
            "decoder_start_token_id": 0,
        },
    ),
    "mamba": (  # has a hook for loading
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": 320, "hidden_size": 64, "state_size": 8, "num_hidden_layers": 3},
    ),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        {**_SIZES, "intermediate_size": 96, "image_size": 16, "patch_size": 4, "num_labels": 5},
    ),
}


def save_small(family: str, folder: Path, *, dtype: torch.dtype, **changes: object) -> Any:
    """Save a model of random weights in several shards, and return its class. `changes`: of the configuration."""
    kind_name, config_name, sizes = _KINDS[family]
    kind: Any = getattr(transformers, kind_name)
    torch.manual_seed(7)
    model = kind(getattr(transformers, config_name)(**{**sizes, **changes})).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms would be zeros and ones, all alike
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return kind


def logits_of(family: str, model: Any, device: torch.device | str = "cpu") -> torch.Tensor:
    """What a model of a family makes of the same input each time."""
    if family == "vit":
        pixels = torch.arange(2 * 3 * 16 * 16).reshape(2, 3, 16, 16) % 17 / 17
        inputs = {"pixel_values": pixels.to(device, model.dtype)}
    else:
        inputs = {"input_ids": torch.arange(2 * 24).reshape(2, 24).to(device) * 5 % 320}
    if family == "t5":
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :6]
    with torch.no_grad():
        logits: torch.Tensor = model(**inputs).logits
    assert logits.std() > 0.01, "constant logits prove nothing"
    return logits
