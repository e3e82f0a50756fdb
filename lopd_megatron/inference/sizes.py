"""What fits into an engine, from the Hugging Face config alone: context, KV cache, scoring batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lopd_megatron.config import EngineConfig
from lopd_megatron.errors import UserError
from lopd_megatron.model.student_spec import read_hf_config

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Of vLLM's CPU attention; any other fails deep in the first forward pass."""
CPU_KV_CACHE_LIMIT = 1 << 30
CPU_KV_BLOCK = 128  # tokens
_COSMETIC = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"}


@dataclass(frozen=True)
class ModelShape:
    """The sizes that decide memory, and the whole config to compare architectures."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int | None
    architecture: dict[str, Any]


def read_shape(model: str) -> ModelShape:
    whole = read_hf_config(model)
    config = whole.get("text_config", whole)  # models that also see keep their language model here
    heads = config["num_attention_heads"]
    return ModelShape(
        num_layers=config["num_hidden_layers"],
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocab_size=config["vocab_size"],
        max_position_embeddings=config.get("max_position_embeddings"),
        architecture={key: value for key, value in whole.items() if key not in _COSMETIC},
    )


def check_fits(shape: ModelShape, config: EngineConfig, model: str, *, on_cpu: bool) -> None:
    """Refuse what vLLM would refuse later, or not at all."""
    limit = shape.max_position_embeddings
    if limit is not None and config.max_model_len > limit:
        raise UserError(
            f"engine.max_model_len={config.max_model_len} is more than the {limit} positions of {model}; "
            f"lower it to at most {limit}"
        )
    if on_cpu and shape.head_dim not in CPU_HEAD_SIZES:
        raise UserError(f"{model} has head_dim={shape.head_dim}; vLLM's CPU attention knows {CPU_HEAD_SIZES}")


def cpu_kv_cache_bytes(shape: ModelShape, config: EngineConfig, dtype_bytes: int) -> int:
    """Room for `max_num_seqs` documents of full length, at most 1 GiB, at least for one document."""
    per_token = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * dtype_bytes
    blocks = -(-(config.max_model_len + 1) // CPU_KV_BLOCK) + 1
    document = blocks * CPU_KV_BLOCK * per_token
    return max(document, min(config.max_num_seqs * document, CPU_KV_CACHE_LIMIT))


def scoring_batch_tokens(vocab_size: int, free_bytes: float) -> int:
    """Tokens per step whose scores fit in `free_bytes`, at least 256.

    vLLM's V1 runner holds logits, their log-softmax and a comparison for the ranks of all prompt tokens of a
    step at once, and its start-up profile does not count them: 17 bytes per token and word of the vocabulary,
    measured by tools/bench/bench_scoring.py.
    """
    return max(int(free_bytes / (17 * vocab_size)), 256)
