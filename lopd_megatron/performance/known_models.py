"""config.json of models by name, for plans without the files: the Qwen3 and Llama shapes of the table."""

from __future__ import annotations

from typing import Any

from lopd_megatron.performance.published import model_key
from lopd_megatron.performance.published_models import PUBLISHED_MODELS
from lopd_megatron.performance.shapes import Attention, Experts, Mlp

TIED = {"qwen3-4b"}
NAMES = sorted(
    name for name in PUBLISHED_MODELS if name.startswith(("qwen3-", "llama3")) and "next" not in name
)


def known_config(name: str) -> dict[str, Any] | None:
    """Hugging Face configuration of a model named like `Qwen3-8B`, or None."""
    key = model_key(name.rstrip("/").split("/")[-1].removesuffix("-Base"))
    if key not in NAMES:
        return None
    shape = PUBLISHED_MODELS[key]
    attention, mlp = shape.layers[0]
    assert isinstance(attention, Attention)
    qwen = key.startswith("qwen3")
    config: dict[str, Any] = {
        "model_type": "qwen3" if qwen else "llama",
        "hidden_act": "silu",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "num_hidden_layers": len(shape.layers),
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.qk_dim,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": key in TIED,
        "attention_bias": False,
    }
    if isinstance(mlp, Mlp):
        return config | {"intermediate_size": mlp.width}
    assert isinstance(mlp, Experts)
    return config | {
        "model_type": "qwen3_moe",
        "intermediate_size": 3 * shape.hidden,
        "num_experts": mlp.count,
        "num_experts_per_tok": mlp.topk,
        "moe_intermediate_size": mlp.width,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
