"""Tiny random Hugging Face models of every supported family, with their own logits as the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCABULARY = 211  # prime: no tensor-parallel size divides it, so padding is always at work

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "attention_dropout": 0.0,
    "initializer_range": 0.1,  # large enough that a wrong permutation shows
}
_MOE = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "head_dim": 16,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": False}),
    "qwen3_tied": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": False}),
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama31": (
        "Llama",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_theta": 500000.0,
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    "qwen3_moe": ("Qwen3Moe", _MOE),
    "qwen3_moe_mixed": ("Qwen3Moe", _MOE | {"mlp_only_layers": [0], "norm_topk_prob": False}),
}


def save_model(family: str, folder: Path, seed: int = 0) -> torch.nn.Module:
    """Write a random model of a family to `folder` in float32 and return it, in eval mode."""
    import transformers

    name, changes = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**(_COMMON | changes))
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{name}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too, which start at one and zero
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def documents(lengths: tuple[int, ...] = (8, 13, 5, 17), seed: int = 1) -> list[torch.Tensor]:
    """Random documents of awkward lengths, int64."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (length,), generator=generator) for length in lengths]


def reference_logits(model: torch.nn.Module, texts: list[torch.Tensor]) -> list[torch.Tensor]:
    """The model's logits of each document on its own, [length, vocabulary] float32."""
    with torch.no_grad():
        return [model(text[None]).logits[0] for text in texts]
