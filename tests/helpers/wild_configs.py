"""One field of `config.json` at a time dropped, emptied or set to what it should not be, for every family."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.helpers.wild_folders import random_model

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MIXTURE = {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "tied": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "mixture": ("Qwen3Moe", MIXTURE | {"norm_topk_prob": True}),
    "qwen2": ("Qwen2", {}),
    "llama": ("Llama", {"rope_parameters": LLAMA3}),
}
FOREIGN: dict[str, Any] = {
    # Fields that other versions, programs and families write.
    "attention_bias": True,
    "mlp_bias": True,
    "partial_rotary_factor": 0.5,
    "rope_theta": 2e5,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "sliding_window": 8,
    "use_sliding_window": True,
    "layer_types": ["full_attention", "sliding_attention"],
    "head_dim": 32,
    "num_experts": 2,
    "num_local_experts": 2,
    "n_shared_experts": 1,
    "quantization_config": {"quant_method": "fp8"},
    "tie_word_embeddings": True,
    "logit_scale": 2.0,
    "torch_dtype": "float64",
    "architectures": ["Qwen3ForSequenceClassification"],
    "text_config": {"hidden_size": 32},
}


def write(out: Path, every: int = 1) -> Iterator[str]:
    """Names of every so-manyth folder, written below `out` one by one; the weights of a family are links."""
    count = itertools.count()
    for family, (kind, settings) in FAMILIES.items():
        source = out / family
        random_model(kind, **settings).save_pretrained(source)
        yield family
        config = json.loads((source / "config.json").read_text())
        for name, changed in _changes(config):
            if next(count) % every:
                continue
            folder = out / f"{family}-{name}"
            folder.mkdir()
            (folder / "model.safetensors").symlink_to(source / "model.safetensors")
            (folder / "config.json").write_text(json.dumps(changed))
            yield folder.name


def _changes(config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for key, value in config.items():
        yield f"{key}-dropped", {name: kept for name, kept in config.items() if name != key}
        for number, other in enumerate(_others(value)):
            yield f"{key}-{number}", config | {key: other}
        if isinstance(value, dict):
            for inner, inside in value.items():
                rest = {name: kept for name, kept in value.items() if name != inner}
                yield f"{key}.{inner}-dropped", config | {key: rest}
                for number, other in enumerate(_others(inside)):
                    yield f"{key}.{inner}-{number}", config | {key: value | {inner: other}}
    for key, value in FOREIGN.items():
        yield f"{key}-foreign", config | {key: value}


def _others(value: Any) -> list[Any]:
    common: list[Any] = [None, "text", [], {}, -1, 0]
    if isinstance(value, bool):
        return [*common, not value]
    if isinstance(value, int):
        return [*common, value + 1, value * 2, str(value), float(value), value + 0.5, True, 10**30]
    if isinstance(value, float):
        return [*common, value * 3, str(value), float("nan"), float("inf"), 1]
    return common
