"""Small Hugging Face configurations of every family."""

from __future__ import annotations

from typing import Any

from lopd_megatron.config import RunConfig
from lopd_megatron.model.student_spec import StudentSpec, student_spec

QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
QWEN2 = QWEN3 | {"model_type": "qwen2"}
LLAMA31 = QWEN3 | {
    "model_type": "llama",
    "tie_word_embeddings": True,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
MOE = QWEN3 | {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}
FAMILIES = {
    "qwen3": QWEN3,
    "qwen2": QWEN2,
    "llama31": LLAMA31,
    "moe": MOE,
    "mixed": MOE | {"mlp_only_layers": [0]},
}


def spec_of(hf: dict[str, Any], **parallel: Any) -> StudentSpec:
    """The spec of a configuration under a layout."""
    config = RunConfig()
    for name, value in parallel.items():
        setattr(config.parallel, name, value)
    return student_spec(hf, config, attention="sdpa")
